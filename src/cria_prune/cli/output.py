"""What a command says: tables and one JSON line on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from cria_prune.base.errors import CriaError
from cria_prune.cli import launch

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.measure import Measurement
    from rich.tree import Tree

    from cria_prune.base.progress import Progress

PIECE = re.compile(r"\S+?(?:\.(?=[^\W\d]))|\S+\s*")
FURTHER = 2


class Breakable:
    """A text for a rich table that may be broken at spaces and after dots; further lines are indented.

    Args:
        text: one line; spaces in front of it are kept on every line.
    """

    def __init__(self, text: str) -> None:
        self.pieces = PIECE.findall(text)
        self.margin = " " * (len(text) - len(text.lstrip()))
        self.width = len(text)

    def lines(self, width: int) -> Iterator[str]:
        """Return the text in lines of at most `width` characters, if no piece is longer."""
        line = self.margin
        for number, piece in enumerate(self.pieces):
            if number and len(line) + len(piece.rstrip()) > width:
                yield line.rstrip()
                line = self.margin + " " * FURTHER
            line += piece
        yield line.rstrip()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        longest = max((len(piece.rstrip()) for piece in self.pieces), default=0)
        return Measurement(min(self.width, len(self.margin) + FURTHER + longest), max(self.width, 1))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield Text("\n".join(self.lines(options.max_width)), overflow="fold")


WIDTH, GAP, INDENT, MARK = 120, 3, "    ", "\ue000"


class Output:
    """Prints for a person, unless quiet, and ends with one line for a program.

    Of several processes the first alone says anything.

    Attributes:
        quiet: leave out everything but the last line.
        kept: what an interruption would leave behind, in words; the command keeps it up to date.
    """

    def __init__(self) -> None:
        self.quiet = self._silent = launch.rank() > 0
        self.kept = "nothing was saved"
        self._spaced = False

    @property
    def progress(self) -> Progress:
        """Where long steps show how far they are: stderr, or nowhere."""
        from cria_prune.base.progress import Progress

        return Progress(quiet=self.quiet)

    def say(self, text: str = "") -> None:
        """Print a line for a person."""
        if not self.quiet:
            print(text, flush=True)
            self._spaced = False

    def heading(self, text: str) -> None:
        """Print a line that begins a part of a long output."""
        if not self.quiet:
            self._block([text, "=" * len(text)])

    def note(self, text: str) -> None:
        """Print a line about the progress, on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        left: int = 1,
        remarks: Sequence[str] | None = None,
    ) -> None:
        """Print a table.

        Args:
            columns: their names.
            rows: cells in the order of the columns.
            left: so many columns are flush left, the others flush right.
            remarks: a title and one text per row, in a last column if it fits, else below each row.
        """
        if self.quiet:
            return
        from rich import box
        from rich.table import Table

        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="")
        beside, below = _placed(columns, rows, remarks or [], self._width)
        for number, name in enumerate([*columns, *beside[:1]]):
            flush = number < left or number == len(columns)
            title = f"{name}\n{INDENT}{below[0]}" if below and number == 0 else name
            drawn.add_column(title, justify="left" if flush else "right", overflow="fold", no_wrap=not flush)
        for number, row in enumerate(rows, start=1):
            drawn.add_row(*map(Breakable, row[:left]), *row[left:], *beside[number : number + 1])
            if below and below[number]:
                drawn.add_row(f"{MARK}{number}")
        lines: list[str] = []
        for line in self._drawn(drawn):
            remark = INDENT + below[int(line[1:])] if line.startswith(MARK) else None
            lines += [line] if remark is None else Breakable(remark).lines(self._width)
        self._block(lines)

    def tree(self, tree: Tree) -> None:
        """Print a tree."""
        if not self.quiet:
            self._block(self._drawn(tree))

    @property
    def _width(self) -> int:
        return shutil.get_terminal_size((WIDTH, 24)).columns

    def _drawn(self, item: RenderableType) -> list[str]:
        from rich.console import Console

        console = Console(file=sys.stdout, width=self._width, highlight=False, markup=False)
        with console.capture() as drawing:
            console.print(item)
        return [line.rstrip() for line in drawing.get().splitlines() if line.strip()]

    def _block(self, lines: Sequence[str]) -> None:
        """Print lines between blank ones, one blank line between two blocks."""
        print(("" if self._spaced else "\n") + "\n".join(lines) + "\n", flush=True)
        self._spaced = True

    def answer(self, values: Mapping[str, Any]) -> None:
        """Print the last line: one JSON object."""
        if not self._silent:
            print(json.dumps(values, allow_nan=False), flush=True)


@contextmanager
def answering(several: bool = False) -> Iterator[Output]:
    """Turn the errors of Cria and Ctrl-C into one line on stderr and an exit code: 2 and 130.

    Args:
        several: the command can be shared out over several processes.
    """
    out = Output()
    try:
        with launch.sharing(several):
            yield out
    except CriaError as error:
        where = f" on rank {launch.rank()}" if launch.size() > 1 else ""
        print(f"error{where}: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print(f"interrupted: {out.kept}", file=sys.stderr)
        raise typer.Exit(130) from None


def _placed(
    columns: Sequence[str], rows: Sequence[Sequence[str]], remarks: Sequence[str], width: int
) -> tuple[Sequence[str], Sequence[str]]:
    """Return the remarks as (beside the rows, below them): one of the two is empty."""
    widths = [max(map(len, cells)) + GAP for cells in zip(columns, *rows, strict=True)]
    fits = sum(widths) + max(map(len, remarks), default=0) <= width
    return (remarks, []) if fits else ([], remarks)
