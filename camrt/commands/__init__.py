"""The commands of the command line, one a file: HELP, add_arguments(parser), run(options) -> exit code."""
