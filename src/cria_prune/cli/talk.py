"""What a command says: tables and one JSON line on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from cria_prune.errors import CriaError

if TYPE_CHECKING:
    from cria_prune.progress import Progress

WIDTH = 120


class Talk:
    """Prints for a person, unless quiet, and ends with one line for a program.

    Args:
        quiet: leave out everything but the last line.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    @property
    def progress(self) -> Progress:
        """Where long steps show how far they are: stderr, or nowhere."""
        from cria_prune.progress import Progress

        return Progress(quiet=self.quiet)

    def say(self, text: str = "") -> None:
        """Print a line for a person."""
        if not self.quiet:
            print(text, flush=True)

    def note(self, text: str) -> None:
        """Print a line about the progress, on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
        """Print a table; the first `left` columns are flush left, the others flush right."""
        if self.quiet:
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table

        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="")
        for number, name in enumerate(columns):
            drawn.add_column(name, justify="left" if number < left else "right", overflow="fold")
        for row in rows:
            drawn.add_row(*row)
        width = shutil.get_terminal_size((WIDTH, 24)).columns
        console = Console(file=sys.stdout, width=width, highlight=False, markup=False)
        with console.capture() as drawing:
            console.print(drawn)
        lines = (line.rstrip() for line in drawing.get().strip("\n").splitlines())
        print("\n" + "\n".join(line for line in lines if line) + "\n", flush=True)

    def answer(self, values: Mapping[str, Any]) -> None:
        """Print the last line: one JSON object."""
        print(json.dumps(values, allow_nan=False), flush=True)


class Kept:
    """What an interrupted command leaves behind, in words; the command keeps it up to date."""

    def __init__(self) -> None:
        self.text = "nothing was saved"


@contextmanager
def answering() -> Iterator[Kept]:
    """Turn the errors of Cria and Ctrl-C into one line on stderr and an exit code: 2 and 130."""
    kept = Kept()
    try:
        yield kept
    except CriaError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print(f"interrupted: {kept.text}", file=sys.stderr)
        raise typer.Exit(130) from None


def percent(share: float | None) -> str:
    """Return a share as per cent with two digits: 0.9339 is 93.39 %."""
    return "" if share is None else f"{share * 100:.2f} %"


def command_line(context: typer.Context) -> list[str]:
    """Return the command with the options that were given, as it would be typed."""
    words = ["cria", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif value is False:
            words += parameter.secondary_opts[:1]
        else:
            words += [parameter.opts[0]] if value is True else [parameter.opts[0], str(value)]
    return words
