"""`cria prune --offload`: a folder of transformers, layer by layer; its model is never whole in memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from cria_prune.artifact.rebuild import peak_memory, provenance
from cria_prune.base.errors import ConfigError
from cria_prune.base.metrics import metric
from cria_prune.base.ranks import world
from cria_prune.cli import show
from cria_prune.cli.folder import claimed
from cria_prune.cli.job import COUNTS, PRUNED, rounded
from cria_prune.cli.output import Output
from cria_prune.cli.settings import Prune, prune_config
from cria_prune.offload.prune import checked, prune_offloaded
from cria_prune.recipes.registry import TASKS
from cria_prune.result import changed_said, remarks_said, repairs_of, said_of
from cria_prune.tasks.folder import FolderTask, folder_task
from cria_prune.tasks.loading import CONFIG, find_folder, load_pretrained

UNUSED = {
    "export": "padding", "scores": "kept scores", "watch": "a metric for every round",
    "text": "measuring the perplexity", "loader": "a network of your own",
}  # fmt: skip
"""Options of `cria prune` that need the whole model, or keep what this does not."""


def prune(request: Prune, out: Output) -> None:
    """Prune a folder of transformers layer by layer, and save it shard by shard."""
    if request.resume and request.output is None:
        raise ConfigError("Resuming", "no --output was given", "Name the folder of the interrupted run")
    task = _task(request)
    defaults = {**task.prune_defaults, "plan": {**task.prune_defaults["plan"], "rounds": 1}}
    config = checked(prune_config(request, defaults))
    seed, device = request.base_seed, request.torch_device
    batches = task.calibration(config.record.examples, config.record.seed)
    origin = provenance(seed, request.command, task.fingerprint(), device)
    head: dict[str, Any] = {"recipe": None, "model": task.name, "seed": seed, "device": str(device)}
    with claimed(request.output, f"{task.name}-pruned", request.overwrite) as folder:
        state = folder.with_name(f".{folder.name}.offload")
        if not request.resume:
            shutil.rmtree(state, ignore_errors=True)
        out.kept = f"what is finished is kept (go on with: the same command, --output {folder} --resume)"
        done = prune_offloaded(
            task.folder, folder, batches, config, device=device, overwrite=request.overwrite,
            provenance=origin, results={**head, "stage": PRUNED}, progress=out.progress,
            state=state, data=task.fingerprint(),
        )  # fmt: skip
    report, turns = done.plan.report, sum(item.turns for item in done.rounds)
    show.rounds(out, done.rounds, metric(task.metric))
    out.say(
        f"parameters {report['parameters_dense']:,.0f} before, {report['parameters']:,.0f} after, recorded "
        f"layer by layer in {turns} turn{'' if turns == 1 else 's'}"
    )
    told = {"changed": changed_said(done.rounds), "remarks": remarks_said(done.rounds[-1])}
    told = {name: item for name, item in told.items() if item}
    show.untrained(out, {**told, "fidelity": said_of(done.rounds[-1])})
    out.say(f"folder {done.path}: plain transformers loads it (measure it with cria eval)")
    out.answer({
        **head,
        "criterion": config.score.criterion,
        "asked": report["asked"],
        "of": config.plan.of,
        "reduction": done.rounds[-1].report["reached"],
        **{name: report[name] for name in COUNTS if name in report},
        "rounds": len(done.rounds),
        "turns": turns,
        "masked_equals_pruned": done.difference,
        "fidelity": said_of(done.rounds[-1]),
        **told,
        **repairs_of(done.rounds[-1]),
        "output": str(done.path),
        "seconds": rounded(done.seconds),
        "memory": peak_memory(device),
    })  # fmt: skip


def _task(request: Prune) -> FolderTask:
    """Return the texts for a folder, its model without values.

    Raises:
        ConfigError: it is no folder of transformers, or an option asks for what needs the whole model.
    """
    name, asked = request.target, f"Pruning {request.target} layer by layer (--offload)"
    if world().size > 1:
        raise ConfigError(asked, f"{world().size} processes were launched for it", "Start it alone")
    for option, what in UNUSED.items():
        if getattr(request, option):
            raise ConfigError(
                f"{asked} with --{option}", f"{what} is not there for a model that is not in memory",
                f"Leave out --{option}, or --offload",
            )  # fmt: skip
    if request.policy not in (None, "uniform") or request.plan.given().get("uniform") is False:
        raise ConfigError(asked, "layers that differ were asked for", "Leave out --policy and --no-uniform")
    folder = Path() if name in TASKS else find_folder(name)
    if name in TASKS or not (folder / CONFIG).is_file():
        kind = "a recipe" if name in TASKS else f"no {CONFIG} there"
        raise ConfigError(
            asked, f"found {kind}", "Give the folder of a Hugging Face model, or leave out --offload"
        )
    return folder_task(folder, request.texts, load_pretrained(folder, meta=True))
