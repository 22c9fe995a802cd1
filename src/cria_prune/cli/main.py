"""The command `cria`: its commands, and where their work is. What they can be asked is in `options`."""

from __future__ import annotations

from typing import Annotated

import typer

from cria_prune.cli import settings as asked
from cria_prune.cli.launch import launched
from cria_prune.cli.options import command
from cria_prune.cli.talk import Kept

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


@command(app, several=True)
def run(request: asked.Run, kept: Kept) -> None:
    """Do a whole recipe: dense model, pruning, one recovery, checkpoint and report."""
    from cria_prune.cli import commands

    commands.run(request, kept)


@command(app)
def inspect(request: asked.Inspect, kept: Kept) -> None:
    """Show what can be removed from a network, what a unit costs, and why the rest cannot."""
    from cria_prune.cli import inspect

    inspect.inspect(request)


@command(app, several=True)
def score(request: asked.Score, kept: Kept) -> None:
    """Score the units of every group and show how far the scores can be trusted; cut nothing.

    With --output the scores are kept, and what repair needs, to prune to any size later.
    """
    from cria_prune.cli import scores

    scores.score(request)


@command(app)
def plan(request: asked.Plan, kept: Kept) -> None:
    """Show which units would stay after one round, and cut nothing; with --dry-run what it all would take.

    --dry-run runs no calibration: it says what is reachable, the passes over the data and the peak memory.
    """
    from cria_prune.cli import plans

    plans.plan(request)


@command(app)
def ablate(request: asked.Ablate, kept: Kept) -> None:
    """Measure a criterion: remove the lowest-scored, the highest-scored and random units, share by share."""
    from cria_prune.cli import ablate

    ablate.ablate(request)


@command(app, several=True)
def prune(request: asked.Prune, kept: Kept) -> None:
    """Cut a share out of a network and save it, without recovery; a checkpoint can be cut again.

    A Hugging Face model needs texts, --calibration or --dataset; plain transformers loads the result.
    """
    if request.offload:
        from cria_prune.cli import offload

        offload.prune(request, kept)
        return
    from cria_prune.cli import commands

    commands.prune(request, kept)


@command(app, several=True)
def sweep(request: asked.Sweep, kept: Kept) -> None:
    """Score a network once and prune it to several sizes, each in one round: a family, and its trade-off."""
    from cria_prune.cli import sweep

    sweep.sweep(request, kept)


@command(app, several=True)
def recover(request: asked.Recover, kept: Kept) -> None:
    """Fine-tune a checkpoint once and save the result."""
    from cria_prune.cli import commands

    commands.recover(request, kept)


@command(app)
def report(request: asked.Report, kept: Kept) -> None:
    """Make one HTML page of a run or a bench, from the files in its folder."""
    from cria_prune.cli import report

    report.report(request)


@command(app)
def bench(request: asked.Bench, kept: Kept) -> None:
    """Measure criteria against each other, one result file per cell; what is there is not measured again."""
    from cria_prune.cli import benches

    benches.bench(request, kept)


@command(app, name="eval")
def evaluate(request: asked.Evaluate, kept: Kept) -> None:
    """Evaluate a recipe's dense model or a checkpoint on the test split, any language model on a text."""
    from cria_prune.cli import inspect

    inspect.evaluate(request)
