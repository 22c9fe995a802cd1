"""What is shown: the progress of long steps, by a bar or plain lines; tables cut to a screen; silence."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Field = float | int | str | None
Item = TypeVar("Item")

LINE_SECONDS = 2.0
LINE_SHARE = 0.1
SILENCE_SECONDS = 30.0


class Progress:
    """Opens bars, one per long step.

    Args:
        quiet: show nothing (the default: a library call is silent).
        stream: where to write; standard error if None. A bar is drawn if it is a terminal;
            otherwise plain lines are written, one per 10 % and not more than one in two seconds.
        clock: seconds as a float, for tests.
    """

    def __init__(
        self,
        quiet: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quiet, self.clock = quiet, clock
        self.stream = sys.stderr if stream is None else stream
        self._rich: RichProgress | None = None
        self._open = 0

    def bar(self, label: str, total: int | None = None) -> Bar:
        """Return a context manager whose `update` shows how far a step of `total` parts is."""
        return Bar(self, label, total)

    def _enter(self) -> RichProgress | None:
        if self.quiet or not self.stream.isatty():
            return None
        if self._rich is None:
            self._rich = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(file=self.stream),
            )
            self._rich.start()
        self._open += 1
        return self._rich

    def _leave(self) -> None:
        self._open -= 1
        if self._open == 0 and self._rich is not None:
            self._rich.stop()
            self._rich = None


class Bar:
    """One step's progress; use it as a context manager."""

    def __init__(self, owner: Progress, label: str, total: int | None) -> None:
        self.owner, self.label, self.total = owner, label, total
        self.done = 0
        self.fields: dict[str, Field] = {}
        self._rich: RichProgress | None = None
        self._task = TaskID(0)
        self._start = self._last_time = 0.0
        self._last_done = -1

    def __enter__(self) -> Self:
        self._rich = self.owner._enter()
        if self._rich is not None:
            self._task = self._rich.add_task(self.label, total=self.total, note="")
        self._start = self._last_time = self.owner.clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            # A step within another one comes again with the next part of that one, round after round.
            if self.owner._open > 1:
                self._rich.remove_task(self._task)
            self.owner._leave()
        elif not self.owner.quiet and self.done != self._last_done:
            self._line(self.owner.clock())

    def update(self, advance: int = 1, **fields: Field) -> None:
        """Go forward by `advance` parts and show the fields (a loss, a metric) beside the bar."""
        self.done += advance
        self.fields.update(fields)
        if self.owner.quiet:
            return
        if self._rich is not None:
            self._rich.update(self._task, advance=advance, note=self._note())
            return
        now = self.owner.clock()
        quiet_for = now - self._last_time
        share = (self.done - max(self._last_done, 0)) / self.total if self.total else 0.0
        if quiet_for >= SILENCE_SECONDS or (quiet_for >= LINE_SECONDS and share >= LINE_SHARE):
            self._line(now)

    def _line(self, now: float) -> None:
        spent = now - self._start
        head = f"{self.label}: {self.done}"
        if self.total:
            head += f"/{self.total} ({self.done / self.total:.0%})"
            if 0 < self.done < self.total:
                head += f", {spent * (self.total - self.done) / self.done:.0f} s left"
        if not self.total or self.done >= self.total:
            head += f", {spent:.0f} s"
        note = self._note()
        print(f"{head}, {note}" if note else head, file=self.owner.stream, flush=True)
        self._last_time, self._last_done = now, self.done

    def _note(self) -> str:
        return ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self.fields.items()
            if value is not None
        )


QUIET = Progress(quiet=True)


def track(
    iterable: Iterable[Item], total: int | None = None, label: str = "", progress: Progress | None = None
) -> Iterator[Item]:
    """Yield the items of `iterable` and show how many of `total` are done (silent without `progress`)."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with (progress or QUIET).bar(label, total) as bar:
        for item in iterable:
            yield item
            bar.update()


@contextmanager
def clock(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of a block to `seconds[stage]`."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


LINES, WIDTH = 40, 110


def screenful(lines: Sequence[str], groups: Sequence[int] | None = None) -> list[str]:
    """Return the first 40 lines, cut at 110 characters; a last one says how many groups are left out.

    Args:
        lines: rows of a table.
        groups: how many groups each line stands for, one by default; 0 for a heading.

    >>> screenful(["up", "down"] * 21)[-2:]
    ['down', '... and 2 more groups']
    """
    shown = [line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…" for line in lines[:LINES]]
    hidden = sum((groups or [1] * len(lines))[LINES:])
    return [*shown, f"... and {hidden} more groups"] if hidden else shown


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and warnings of transformers away; its settings are put back."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
