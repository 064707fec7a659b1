"""A progress bar with the time left: live on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

LOG_INTERVAL_S = 10.0
"""Seconds between two lines where there is no terminal: enough to see life, few enough to read the log."""


class Progress:
    """Count work done and show it, with rate and time left.

    Args:
        total: how much work there is, in `unit`.
        what: the phase, in a word or two.
        unit: the unit of the work, such as ``slices``.
        done: how much of it was done before, by a run that this one continues.
        stream: where to show it; standard error by default.
    """

    def __init__(self, total: int, *, what: str, unit: str, done: int = 0, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.total, self.what, self.unit = total, what, unit
        self.done = self.done_before = done
        self.note = ""
        self.started_s = self.shown_s = time.monotonic()
        live = self.stream.isatty()
        self.bar = (
            tqdm(
                total=total,
                initial=done,
                desc=what,
                unit=f" {unit}",
                file=self.stream,
                smoothing=0.1,
                dynamic_ncols=True,
            )
            if live
            else None
        )

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Add `amount` to the work done; `note` is shown behind the bar."""
        self.done += amount
        self.note = note
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(amount)
        elif time.monotonic() - self.shown_s > LOG_INTERVAL_S:
            self._print_line()

    def _print_line(self) -> None:
        self.shown_s = time.monotonic()
        elapsed_s = self.shown_s - self.started_s
        line = tqdm.format_meter(
            self.done,
            self.total,
            elapsed_s,
            ncols=0,
            prefix=self.what,
            unit=f" {self.unit}",
            postfix=self.note or None,
            initial=self.done_before,
        )
        print(line, file=self.stream, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.total and kind is None:
            self._print_line()
