"""Tables as plain text that fits a screen, for what `print` shows of a result."""

from __future__ import annotations

from collections.abc import Sequence

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
