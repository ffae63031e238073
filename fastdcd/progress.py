"""How far long work has come: a bar on a terminal, a line every half minute in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 30.0
_LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {percentage:.0f} %, {rate_noinv_fmt}, {remaining} to go{postfix}"


class ProgressBar:
    """tqdm on a terminal. Elsewhere a line on stderr at most every LINE_SECONDS, so that a log shows a run alive."""

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        *,
        initial: int = 0,
        shown: bool = True,
        leave: bool = True,
        scaled: bool = False,
    ) -> None:
        """`shown` is false on all processes but one; `leave` keeps a finished bar on the terminal; `scaled` writes large
        numbers as 1.2G."""
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc=what,
            total=total,
            initial=initial,
            unit=unit if scaled else f" {unit}",
            unit_scale=scaled,
            disable=not (shown and terminal),
            leave=leave,
        )
        self._scaled = scaled
        self._lines = shown and not terminal
        self._what, self._unit, self._total, self._done, self._initial = what, unit, total, initial, initial
        self._begin = self._said = time.monotonic()
        self._note = ""

    @property
    def left(self) -> int:
        """How many are not done."""
        return self._total - self._done

    def update(self, count: int = 1) -> None:
        """`count` more are done."""
        self._bar.update(count)
        self._done += count
        if self._lines and time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)  # noqa: T201

    def _line(self) -> str:
        return tqdm.format_meter(
            self._done,
            self._total,
            time.monotonic() - self._begin,
            prefix=self._what,
            unit=f" {self._unit}",
            initial=self._initial,
            postfix=self._note,
            bar_format=_LINE,
            unit_scale=self._scaled,
        )

    def note(self, text: str) -> None:
        """What to say beside the numbers from now on."""
        self._note = text
        self._bar.set_postfix_str(text)

    def describe(self, what: str) -> None:
        """Another name for the work."""
        self._what = what
        self._bar.set_description(what)

    def close(self) -> None:
        self._bar.close()
