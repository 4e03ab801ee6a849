"""The command line. A command is a file in commands/ with HELP, add_arguments and run, and its name in COMMANDS."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence

from . import __version__
from .runtime.errors import CamrtError, first_line

COMMANDS = (
    *("export", "recipe", "info", "build", "cache", "compile", "page", "serve", "deploy"),
    *("methods", "explain", "map", "evaluate", "verify", "check", "bench", "tune", "demo"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code.

    0: success; 1: a check failed; 2: an error, one line on stderr; 130: interrupted.
    """
    options = parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_: print(f"camrt: {message}", file=sys.stderr)
    try:
        return options.run(options)
    except BrokenPipeError:
        return 0
    except CamrtError as error:
        print(f"camrt: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"camrt: a package cannot be imported ({first_line(error)}): install it again", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"camrt: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("camrt: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    top = argparse.ArgumentParser(prog="camrt", description="Explanations of vision models at production speed.")
    top.add_argument("--version", action="version", version=f"camrt {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f".commands.{name}", __package__)
        command = commands.add_parser(name, help=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top
