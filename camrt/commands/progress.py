"""Shows the progress of work in stages."""

from __future__ import annotations

import sys


class Progress:
    """Shows the stage that is running and how long it has taken."""

    def __enter__(self) -> Progress:
        from tqdm import tqdm

        self._bar = tqdm(bar_format="{elapsed} {desc} {postfix}", leave=False, disable=None)
        return self

    def __call__(self, stage: str) -> None:
        if self._bar.disable:
            print(stage, file=sys.stderr)
        self._bar.set_description_str(stage)

    def detail(self, text: str) -> None:
        """Shows a detail of the running stage, on a terminal only."""
        self._bar.set_postfix_str(text)

    def __exit__(self, *_: object) -> None:
        self._bar.close()
