"""The options of the command line: one annotated type each, so that every command spells them alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Recipe = Annotated[
    str,
    Argument(
        help="digits, cifar10-resnet20, cifar10-resnet56, sst2-minilm or llama-shakespeare.",
        show_default=False,
    ),
]
Target = Annotated[
    str,
    Argument(
        help="A recipe, the folder of a checkpoint or of a Hugging Face model, or a model of the hub.",
        show_default=False,
    ),
]
Model = Annotated[
    str,
    Argument(
        help="A recipe, the folder of a checkpoint or of a Hugging Face model, or package.module:function "
        "(without arguments, gives a module or (module, example)).",
        show_default=False,
    ),
]
Checkpoint = Annotated[str, Argument(help="The folder of a checkpoint.", show_default=False)]

Reduction = Annotated[
    float | None,
    Option(
        "--reduction", "--reduce",
        help="Share to remove, between 0 and 1 [default: 0.5].", show_default=False,
    ),
]  # fmt: skip
Reductions = Annotated[
    list[float] | None,
    Option(
        "--reduction", "--reduce",
        help="Share to remove, between 0 and 1; several make a family [default: the recipe's].",
        show_default=False,
    ),
]  # fmt: skip
Of = Annotated[
    str | None,
    Option(help="What it is a share of: parameters (default), prunable, non-embedding or macs."),
]
Criterion = Annotated[str | None, Option(help="How units are scored [default: innovation].")]
Preset = Annotated[str | None, Option(help="A named configuration to start from: paper.")]
Rounds = Annotated[int | None, Option(help="Rounds of scoring and cutting [default: 4].")]
Ranking = Annotated[
    str | None,
    Option(
        help="uniform (default): the same share of every group; global: groups compete by scores relative to "
        "their mean; loss: by the scores as they are."
    ),
]
Residual = Annotated[
    bool | None,
    Option("--residual/--no-residual", help="Prune the width of residual streams too [default: no]."),
]
Compensate = Annotated[
    bool | None,
    Option(
        "--compensate/--no-compensate",
        help="Repair the consumers in closed form after every cut, without training [default: yes].",
    ),
]
BatchNorm = Annotated[
    bool | None,
    Option(
        "--batch-norm/--no-batch-norm",
        help="Measure batch-norm statistics again after the last cut, without training [default: yes].",
    ),
]
Floor = Annotated[float | None, Option(help="Share of each group's units that always stays [default: 0.1].")]
Units = Annotated[
    str | None,
    Option(help="all (default); neurons: feed-forward neurons and channels alone; heads: heads alone."),
]
Policy = Annotated[
    str | None,
    Option(
        help="How a model of transformers is cut and saved. uniform: alike layers stay alike, so that plain "
        "from_pretrained loads it; per-layer: layers compete, cria_prune.load loads it "
        "[default: uniform for a folder, what suits the recipe else]."
    ),
]
Uniform = Annotated[
    bool | None,
    Option("--uniform/--no-uniform", help="Alike groups keep the same number of units [default: no]."),
]
Multiple = Annotated[
    int | None,
    Option(help="Neurons and channels that stay are a multiple of it, or all of them [default: 1]."),
]
Examples = Annotated[int | None, Option(help="Calibration examples [default: 1024].")]
Positions = Annotated[int | None, Option(help="Spatial positions drawn per image and layer [default: 8].")]
Watch = Annotated[bool, Option("--watch", help="Evaluate after every round, on the validation split.")]

Offload = Annotated[
    bool,
    Option(
        "--offload",
        help="For a folder whose model is larger than the memory: layer by layer, in one round unless "
        "--rounds says more.",
    ),
]

Quick = Annotated[
    bool, Option("--quick", help="Train the dense model for less: 8,000 sentences, or one epoch of text.")
]
Base = Annotated[
    str | None,
    Option(help="Folder or hub name of the pretrained encoder of sst2-minilm.", show_default=False),
]
Calibration = Annotated[
    Path | None,
    Option(
        path_type=Path, help="File of plain text for a Hugging Face model to look at.", show_default=False
    ),
]
Dataset = Annotated[
    str | None,
    Option(
        help="Parquet file, folder of parquet files, or data set of the hub, in place of --calibration.",
        show_default=False,
    ),
]
Text = Annotated[
    Path | None,
    Option(
        path_type=Path,
        help="File of plain text to measure the perplexity on [default: the end of the other, kept apart].",
        show_default=False,
    ),
]
Export = Annotated[
    str | None,
    Option(help="padded: also write a twin in OUTPUT-padded, filled up with zeros, that loads everywhere."),
]
Teacher = Annotated[
    str | None,
    Option(help="Folder or hub name of the dense model, for --distill.", show_default=False),
]
Tasks = Annotated[
    str | None, Option(help="Tasks of lm-eval, separated by commas, in place of a text.", show_default=False)
]
TaskFolder = Annotated[
    Path | None, Option(path_type=Path, help="Folder with further task files of lm-eval.", show_default=False)
]
Limit = Annotated[int | None, Option(help="Examples per task of lm-eval at most.", show_default=False)]
Epochs = Annotated[int | None, Option(help="Epochs of the recovery, 0 for none [default: the recipe's].")]
Lr = Annotated[float | None, Option(help="Learning rate of the recovery [default: the recipe's].")]
Distill = Annotated[
    float | None, Option(help="Weight of the dense model's soft targets, 0 to 1 [default: 0].")
]

Lora = Annotated[
    int | None,
    Option(help="Rank of LoRA adapters to train and merge, in place of all weights [default: 0, none]."),
]
Compile = Annotated[
    bool | None,
    Option(
        "--compile",
        help="Train what torch.compile makes of the model (and of a teacher); the first step waits for it.",
        show_default=False,
    ),
]
Fsdp = Annotated[
    bool | None,
    Option(
        "--fsdp",
        help="Under torchrun: share weights, gradients and the optimizer's state out over the processes.",
        show_default=False,
    ),
]
Resume = Annotated[
    bool,
    Option("--resume", help="Go on with what an interrupted run of the same command left for --output."),
]
Seed = Annotated[
    int | None, Option(help="Of every random choice, the training of digits included [default: 0].")
]
Device = Annotated[str, Option(help="cpu, cuda, cuda:1, ..., or auto: cuda where there is one.")]
Output = Annotated[
    Path | None,
    Option(
        path_type=Path, help="Folder for the results [default: the first free runs/NAME, runs/NAME-2, ...]."
    ),
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace results that are there already.")]
Config = Annotated[
    Path | None,
    Option(path_type=Path, help="YAML or JSON file of a PruneConfig; options given here win over it."),
]
Quiet = Annotated[
    bool, Option("--quiet", "-q", help="Print the last line, the JSON object, and nothing else.")
]
Example = Annotated[
    str | None, Option(help="Shape of the (main) input, like 1,3,32,32 [default: what suits the model].")
]
Meta = Annotated[bool, Option("--meta", help="Shapes alone: leave the weights, take no memory for them.")]
Tree = Annotated[bool, Option("--tree", help="Along the modules in place of a table.")]
All = Annotated[bool, Option("--all", help="Every group by itself, repeated layers too, names in full.")]
Json = Annotated[bool, Option("--json", help="Print everything as one JSON object, and no table.")]
ReportFolder = Annotated[
    Path,
    Argument(
        path_type=Path,
        help="What cria run or cria prune wrote, or a folder of a bench's result files.",
        show_default=False,
    ),
]
Layer = Annotated[
    str | None,
    Option(help="Whose neuron graphs are drawn [default: the widest of at most 256 units that lost any]."),
]
Page = Annotated[
    Path | None, Option(path_type=Path, help="HTML file for the page [default: report.html in the folder].")
]
Shares = Annotated[
    str | None,
    Option(
        help="Shares of every group's units to remove, separated by commas [default: 0.1 to 0.9 by 0.1].",
        show_default=False,
    ),
]
RandomSeeds = Annotated[int, Option(help="Random orders to compare with.")]
TestLimit = Annotated[
    int | None,
    Option(
        "--limit", help="Test examples at most, for a quick look; results say so [default: all].",
        show_default=False,
    ),
]  # fmt: skip
ScoreFolder = Annotated[
    Path | None,
    Option(
        path_type=Path, help="Folder to keep the scores in, for cria prune --scores and cria sweep --scores."
    ),
]
Scores = Annotated[
    Path | None,
    Option(
        path_type=Path,
        help="Folder of cria score: prune by these scores, in one round, without recording again.",
    ),
]
SweepReductions = Annotated[
    list[float] | None,
    Option(
        "--reduction", "--reduce",
        help="Share to remove, between 0 and 1; several [default: 0.1 to 0.7].", show_default=False,
    ),
]  # fmt: skip
DryRun = Annotated[
    bool, Option("--dry-run", help="Predict memory and passes, and say what is reachable; score nothing.")
]
PlanFile = Annotated[
    Path | None,
    Option(path_type=Path, help="JSON file for the plan, or with --dry-run for what was predicted."),
]
Suite = Annotated[
    str,
    Argument(
        help="digits, resnet20, resnet56, sst2-minilm or llama-shakespeare, or a folder of YAML files.",
        show_default=False,
    ),
]
Criteria = Annotated[list[str] | None, Option("--criterion", help="Only these criteria of the suite.")]
OnlyReductions = Annotated[
    list[float] | None, Option("--reduction", "--reduce", help="Only these reductions of the suite.")
]
Seeds = Annotated[list[int] | None, Option("--seed", help="Only these seeds of the suite.")]
