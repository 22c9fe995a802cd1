"""The command `cria`: what can be typed. Every command's work is in `commands`."""

from __future__ import annotations

import typer

from cria_prune.cli import options as o
from cria_prune.cli.launch import launched
from cria_prune.cli.talk import answering, command_line

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


@app.command()
def run(
    context: typer.Context,
    recipe: o.Recipe,
    reduction: o.Reductions = None,
    of: o.Of = None,
    criterion: o.Criterion = None,
    preset: o.Preset = None,
    rounds: o.Rounds = None,
    ranking: o.Ranking = None,
    residual: o.Residual = None,
    compensate: o.Compensate = None,
    batch_norm: o.BatchNorm = None,
    floor: o.Floor = None,
    units: o.Units = None,
    policy: o.Policy = None,
    uniform: o.Uniform = None,
    multiple: o.Multiple = None,
    examples: o.Examples = None,
    positions: o.Positions = None,
    watch: o.Watch = False,
    quick: o.Quick = False,
    base: o.Base = None,
    epochs: o.Epochs = None,
    lr: o.Lr = None,
    distill: o.Distill = None,
    lora: o.Lora = None,
    compile: o.Compile = None,
    fsdp: o.Fsdp = None,
    resume: o.Resume = False,
    seed: o.Seed = None,
    device: o.Device = "auto",
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
    quiet: o.Quiet = False,
) -> None:
    """Do a whole recipe: dense model, pruning, one recovery, checkpoint and report."""
    with answering(several=True) as kept:
        from cria_prune.cli import commands

        commands.run(context.params, command_line(context), kept)


@app.command()
def inspect(
    context: typer.Context,
    model: o.Model,
    example: o.Example = None,
    meta: o.Meta = False,
    floor: o.Floor = None,
    tree: o.Tree = False,
    everything: o.All = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Show what can be removed from a network, what a unit costs, and why the rest cannot."""
    with answering():
        from cria_prune.cli import looks

        looks.inspect(context.params)


@app.command()
def score(
    context: typer.Context,
    target: o.Target,
    calibration: o.Calibration = None,
    dataset: o.Dataset = None,
    text: o.Text = None,
    criterion: o.Criterion = None,
    preset: o.Preset = None,
    residual: o.Residual = None,
    compensate: o.Compensate = None,
    examples: o.Examples = None,
    positions: o.Positions = None,
    seed: o.Seed = None,
    device: o.Device = "auto",
    output: o.ScoreFolder = None,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
    quiet: o.Quiet = False,
) -> None:
    """Score the units of every group and show how far the scores can be trusted; cut nothing.

    With --output the scores are kept, and what repair needs, to prune to any size later.
    """
    with answering(several=True):
        from cria_prune.cli import scores

        scores.score(context.params, command_line(context))


@app.command()
def plan(
    context: typer.Context,
    target: o.Target,
    calibration: o.Calibration = None,
    dataset: o.Dataset = None,
    text: o.Text = None,
    dry_run: o.DryRun = False,
    reduction: o.Reduction = None,
    of: o.Of = None,
    criterion: o.Criterion = None,
    preset: o.Preset = None,
    rounds: o.Rounds = None,
    ranking: o.Ranking = None,
    residual: o.Residual = None,
    compensate: o.Compensate = None,
    batch_norm: o.BatchNorm = None,
    floor: o.Floor = None,
    units: o.Units = None,
    policy: o.Policy = None,
    uniform: o.Uniform = None,
    multiple: o.Multiple = None,
    examples: o.Examples = None,
    positions: o.Positions = None,
    seed: o.Seed = None,
    device: o.Device = "auto",
    output: o.PlanFile = None,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
    quiet: o.Quiet = False,
) -> None:
    """Show which units would stay after one round, and cut nothing; with --dry-run what it all would take.

    --dry-run runs no calibration: it says what is reachable, the passes over the data and the peak memory.
    """
    with answering():
        from cria_prune.cli import plans

        plans.plan(context.params, command_line(context))


@app.command()
def ablate(
    context: typer.Context,
    target: o.Target,
    calibration: o.Calibration = None,
    dataset: o.Dataset = None,
    text: o.Text = None,
    criterion: o.Criterion = None,
    preset: o.Preset = None,
    residual: o.Residual = None,
    examples: o.Examples = None,
    positions: o.Positions = None,
    shares: o.Shares = None,
    random_seeds: o.RandomSeeds = 3,
    limit: o.TestLimit = None,
    seed: o.Seed = None,
    device: o.Device = "auto",
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
    quiet: o.Quiet = False,
) -> None:
    """Measure a criterion: remove the lowest-scored, the highest-scored and random units, share by share."""
    with answering():
        from cria_prune.cli import ablate as command

        command.ablate(context.params, command_line(context))


@app.command()
def prune(
    context: typer.Context,
    target: o.Target,
    calibration: o.Calibration = None,
    dataset: o.Dataset = None,
    text: o.Text = None,
    export: o.Export = None,
    scores: o.Scores = None,
    reduction: o.Reduction = None,
    of: o.Of = None,
    criterion: o.Criterion = None,
    preset: o.Preset = None,
    rounds: o.Rounds = None,
    ranking: o.Ranking = None,
    residual: o.Residual = None,
    compensate: o.Compensate = None,
    batch_norm: o.BatchNorm = None,
    floor: o.Floor = None,
    units: o.Units = None,
    policy: o.Policy = None,
    uniform: o.Uniform = None,
    multiple: o.Multiple = None,
    examples: o.Examples = None,
    positions: o.Positions = None,
    watch: o.Watch = False,
    offload: o.Offload = False,
    resume: o.Resume = False,
    seed: o.Seed = None,
    device: o.Device = "auto",
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
    quiet: o.Quiet = False,
) -> None:
    """Cut a share out of a network and save it, without recovery; a checkpoint can be cut again.

    A Hugging Face model needs texts, --calibration or --dataset; plain transformers loads the result.
    """
    with answering(several=True) as kept:
        from cria_prune.cli import commands

        if offload:
            from cria_prune.cli import offload as by_layers

            by_layers.prune(context.params, command_line(context), kept)
            return
        commands.prune(context.params, command_line(context), kept)


@app.command()
def sweep(
    context: typer.Context,
    target: o.Target,
    calibration: o.Calibration = None,
    dataset: o.Dataset = None,
    text: o.Text = None,
    scores: o.Scores = None,
    reduction: o.SweepReductions = None,
    of: o.Of = None,
    criterion: o.Criterion = None,
    preset: o.Preset = None,
    ranking: o.Ranking = None,
    residual: o.Residual = None,
    compensate: o.Compensate = None,
    batch_norm: o.BatchNorm = None,
    floor: o.Floor = None,
    units: o.Units = None,
    policy: o.Policy = None,
    uniform: o.Uniform = None,
    multiple: o.Multiple = None,
    examples: o.Examples = None,
    positions: o.Positions = None,
    resume: o.Resume = False,
    seed: o.Seed = None,
    device: o.Device = "auto",
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
    quiet: o.Quiet = False,
) -> None:
    """Score a network once and prune it to several sizes, each in one round: a family, and its trade-off."""
    with answering(several=True) as kept:
        from cria_prune.cli import sweep as command

        command.sweep(context.params, command_line(context), kept)


@app.command()
def recover(
    context: typer.Context,
    checkpoint: o.Checkpoint,
    calibration: o.Calibration = None,
    dataset: o.Dataset = None,
    text: o.Text = None,
    teacher: o.Teacher = None,
    epochs: o.Epochs = None,
    lr: o.Lr = None,
    distill: o.Distill = None,
    lora: o.Lora = None,
    compile: o.Compile = None,
    fsdp: o.Fsdp = None,
    resume: o.Resume = False,
    seed: o.Seed = None,
    device: o.Device = "auto",
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
) -> None:
    """Fine-tune a checkpoint once and save the result."""
    with answering(several=True) as kept:
        from cria_prune.cli import commands

        commands.recover(context.params, command_line(context), kept)


@app.command()
def report(
    folder: o.ReportFolder,
    layer: o.Layer = None,
    output: o.Page = None,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
) -> None:
    """Make one HTML page of a run or a bench, from the files in its folder."""
    with answering():
        from cria_prune.cli import reports

        reports.report(
            {"folder": folder, "layer": layer, "output": output, "overwrite": overwrite, "quiet": quiet}
        )


@app.command()
def bench(
    context: typer.Context,
    suite: o.Suite,
    criterion: o.Criteria = None,
    reduction: o.OnlyReductions = None,
    seed: o.Seeds = None,
    device: o.Device = "auto",
    output: o.Output = None,
    quiet: o.Quiet = False,
) -> None:
    """Measure criteria against each other, one result file per cell; what is there is not measured again."""
    with answering() as kept:
        from cria_prune.cli import benches

        benches.bench(context.params, command_line(context), kept)


@app.command(name="eval")
def evaluate(
    context: typer.Context,
    target: o.Target,
    calibration: o.Calibration = None,
    dataset: o.Dataset = None,
    text: o.Text = None,
    tasks: o.Tasks = None,
    task_folder: o.TaskFolder = None,
    limit: o.Limit = None,
    seed: o.Seed = None,
    device: o.Device = "auto",
    quiet: o.Quiet = False,
) -> None:
    """Evaluate a recipe's dense model or a checkpoint on the test split, any language model on a text."""
    with answering():
        from cria_prune.cli import looks

        looks.evaluate(context.params)
