"""What the user sees: lines, tables, and the driver's progress."""

import logging
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType

import rich.progress
from rich.console import Console
from rich.table import Table

from services import logs

_LINE_SECONDS = 10.0

_console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line."""
    if logs.style():
        logs.event(text)
        return
    _console.print(text, markup=False)


def complain(text: str) -> None:
    """Print an error."""
    if logs.style():
        logs.event(text, level=logging.ERROR)
        return
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; all columns but the first are aligned right."""
    view = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        view.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        view.add_row(*(str(cell) for cell in row))
    # a pipe has no width of its own: let the table have what it needs
    (_console if sys.stdout.isatty() else Console(highlight=False, width=160)).print(view)


def size(count: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d} min"


def ago(moment: float) -> str:
    """How long ago a moment was, in seconds since the epoch, for people."""
    seconds = max(0.0, time.time() - moment)
    return duration(seconds) if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


class _Bars:
    """One live display for all bars of this process: a terminal has room for one."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        columns = rich.progress
        self._display = columns.Progress(
            columns.TextColumn("{task.description}"),
            columns.BarColumn(),
            columns.MofNCompleteColumn(),
            columns.TextColumn("{task.fields[note]}"),
            console=_console,
        )

    def open(self, title: str, total: int, done: int) -> rich.progress.TaskID:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._display.start()
            return self._display.add_task(title, total=total, completed=done, note="")

    def update(self, bar: rich.progress.TaskID, done: int, note: str) -> None:
        self._display.update(bar, completed=done, note=note)

    def close(self, bar: rich.progress.TaskID) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            self._display.stop()
            for task in self._display.task_ids:  # they stay on the screen, and do not come again with the next
                self._display.remove_task(task)


_bars = _Bars()


class Progress:
    """Images done, images/s and time left: a bar on a terminal, else a line every few seconds.

    An image here is one view of an image: one forward pass of the teacher.
    """

    def __init__(self, title: str, total: int, done: int) -> None:
        self._title, self._total, self._done, self._first = title, total, done, done
        self._failed = 0
        self._started = self._printed = time.monotonic()
        self._bar: rich.progress.TaskID | None = None

    def __enter__(self) -> "Progress":
        if _console.is_terminal and not logs.style():
            self._bar = _bars.open(self._title, self._total, self._done)
        else:
            say(f"{self._title}: {self._total - self._done:,} of {self._total:,} images to compute")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            _bars.close(self._bar)
        elif error is None:
            say(f"{self._title}: {self._state()}")

    def begin(self, moment: float | None) -> None:
        """The first unit was handed out then (``time.monotonic``): the rate does not count the time before."""
        self._started = self._started if moment is None else moment

    def advance(self, done: int, failed: int) -> None:
        """Count a unit's images."""
        self._done += done
        self._failed += failed
        now = time.monotonic()
        if self._bar is not None:
            _bars.update(self._bar, self._done + self._failed, self._state())
        elif now - self._printed > _LINE_SECONDS:
            self._printed = now
            say(f"{self._title}: {self._state()}")

    def notice(self, text: str) -> None:
        """Print a line beside the bar."""
        say(f"{self._title}: {text}")

    def _state(self) -> str:
        seconds = max(1e-6, time.monotonic() - self._started)
        rate = (self._done - self._first + self._failed) / seconds
        left = duration((self._total - self._done - self._failed) / rate) if rate else "unknown"
        failed = f", {self._failed:,} failed" if self._failed else ""
        return f"{self._done:,} of {self._total:,} images{failed}, {rate:.1f} images/s, {left} left"
