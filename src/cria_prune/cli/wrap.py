"""Long module names in narrow tables: broken after a dot, never inside a word or a number."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement

PIECE = re.compile(r"\S+?(?:\.(?=[^\W\d]))|\S+\s*")
INDENT = 2


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
                line = self.margin + " " * INDENT
            line += piece
        yield line.rstrip()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        longest = max((len(piece.rstrip()) for piece in self.pieces), default=0)
        return Measurement(min(self.width, len(self.margin) + INDENT + longest), max(self.width, 1))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield Text("\n".join(self.lines(options.max_width)), overflow="fold")
