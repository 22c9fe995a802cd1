"""The command `cria`: its commands, in the order of --help. What they can be asked is in `settings`."""

from __future__ import annotations

from typing import Annotated

import typer

from cria_prune.cli import settings
from cria_prune.cli.launch import launched
from cria_prune.cli.options import add_command

app = typer.Typer(
    name="cria",
    help="Make a trained neural network smaller: score its neurons, cut the least, restore the task.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line of this process; ends in SystemExit: 0, 2 after an error, 130 after Ctrl-C."""
    with launched():
        app()


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"cria-prune {version('cria-prune')}")
        raise typer.Exit


@app.callback()
def cria(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """What every command has."""


for request in (
    *(settings.Run, settings.Inspect, settings.Score, settings.Plan, settings.Ablate, settings.Prune),
    *(settings.Sweep, settings.Recover, settings.Report, settings.Bench, settings.Eval),
    *(settings.Export, settings.Latency),
):
    add_command(app, request)
