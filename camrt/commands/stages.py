"""Progress of work that has stages."""

from __future__ import annotations

import sys


class Stages:
    """Shows the stage that is running and how long it has taken."""

    def __enter__(self) -> Stages:
        from tqdm import tqdm

        self._bar = tqdm(bar_format="{elapsed} {desc}", leave=False, disable=None)
        return self

    def __call__(self, stage: str) -> None:
        if self._bar.disable:
            print(stage, file=sys.stderr)
        self._bar.set_description_str(stage)

    def __exit__(self, *_: object) -> None:
        self._bar.close()
