"""Progress of long work: a bar on a terminal, log lines elsewhere. The same in every folder."""

import os
import sys
from collections.abc import Iterable

from tqdm import tqdm

EVERY = 30.0  # seconds between log lines; work that takes less says nothing


class Lines(tqdm):
    """A bar as lines of a log: `AT seed 0: 120 of 400, 00:31 gone, 01:12 left`."""

    @staticmethod
    def status_printer(file):
        def print_status(text: str) -> None:
            if text.strip():
                file.write(text.strip() + "\n")
                file.flush()

        return print_status

    def set_postfix(self, ordered_dict=None, refresh=False, **kwargs) -> None:
        super().set_postfix(ordered_dict, refresh=False, **kwargs)  # a new number is no reason for a new line


def progress(
    iterable: Iterable | None = None,
    desc: str = "",
    total: int | None = None,
    initial: int = 0,
    hide: bool = False,
    unit: str = "it",
) -> tqdm:
    """tqdm's bar over an iterable, or by hand (`update`); `hide` for all but one of several processes.

    Log lines take its place where stderr is no terminal, or TQDM_DISABLE is set: a bar is noise in a log, and silence
    for hours is worse.
    """
    given = {"desc": desc, "total": total, "initial": initial, "unit": unit, "disable": hide, "file": sys.stderr}
    if sys.stderr.isatty() and os.environ.get("TQDM_DISABLE", "") in ("", "0"):
        return tqdm(iterable, **given)
    form = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}"
    return Lines(iterable, **given, bar_format=form, mininterval=EVERY, maxinterval=EVERY, delay=EVERY)
