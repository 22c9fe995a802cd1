"""What the commands do that change nothing: inspect, evaluate; heavy imports begin here."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Any

from torch import nn

from cria_prune.cli import show, target
from cria_prune.cli.inventory import inventory
from cria_prune.cli.job import rounded
from cria_prune.cli.outline import folded, frozen, outline, shares
from cria_prune.cli.settings import Params, pick_device, texts_of
from cria_prune.cli.sources import load_source, parse_shape
from cria_prune.cli.talk import Talk
from cria_prune.cli.target import Target
from cria_prune.cli.tree import drawn, module_tree
from cria_prune.config import PlanConfig
from cria_prune.errors import ConfigError
from cria_prune.progress import clock
from cria_prune.stages import discover


def inspect(params: Params) -> None:
    """The unit groups of a model from anywhere, what they cost and why some are frozen."""
    talk = Talk(params["quiet"] or params["json"])
    floor = PlanConfig(**({} if params["floor"] is None else {"floor": params["floor"]})).floor
    with redirect_stdout(sys.stderr):  # what the user's code prints is no part of the answer
        source = load_source(params["model"], parse_shape(params["example"]), params["meta"])
        groups = discover(source.model, source.example)
    found = inventory(groups, floor)
    show.model(talk, source, found)
    if params["tree"]:
        talk.tree(drawn(module_tree(source.model, found.rows, params["everything"])))
        frozen(talk, folded(found.rows, params["everything"]))
        shares(talk, found)
    else:
        outline(talk, found, params["everything"])
    answer = {
        "target": source.name,
        "source": source.kind,
        "model": type(source.model).__name__,
        "recipe": None if source.target is None else source.target.task.name,
        **found.to_dict(),
        "prunable_groups": sum(row.status == "prunable" for row in found.rows),
        "residual_groups": sum(row.status == "residual" for row in found.rows),
        "frozen_groups": sum(row.status == "frozen" for row in found.rows),
    }
    talk.answer(answer if params["json"] else {**answer, "groups": len(found.rows)})


def evaluate(params: Params) -> None:
    """The metric on the test split, or on texts of the user; or tasks of lm-eval."""
    found, talk = target.find(params["target"], texts_of(params)), Talk(params["quiet"])
    seconds: dict[str, float] = {}
    device, seed = pick_device(params["device"]), params["seed"] or 0
    with clock(seconds, "model"):
        model = found.model(device, seed, talk.progress)
    metrics: dict[str, Any] = {}
    with clock(seconds, "evaluate"):
        if params["tasks"]:
            metrics = harness_of(params, found, model)
        else:
            check_measured(found, params["target"])
            value = found.task.evaluate(model, found.task.test_batches(), talk.progress)
            metrics = {found.task.metric: value, **found.task.further(model, talk.progress)}
    parameters = sum(item.numel() for item in model.parameters())
    talk.table(["target", "parameters"], [[params["target"], f"{parameters:,}"]])
    show.further(talk, "", metrics)
    talk.answer(
        {
            "target": params["target"],
            **found.named(),
            **metrics,
            "parameters": parameters,
            "seed": seed,
            "device": str(device),
            "seconds": rounded(seconds),
        }
    )


def check_measured(found: Target, name: str) -> None:
    """Raise a ConfigError if the test split lacks what the metric needs."""
    if not found.task.measured:
        raise ConfigError(
            f"An {found.task.metric} of {name}", "the texts have no labels",
            "Give --dataset with a column label",
        )  # fmt: skip


def harness_of(params: Params, found: Target, model: nn.Module) -> dict[str, float]:
    """Return what lm-eval measures on the tasks that were named."""
    from cria_prune.tasks.harness import harness

    if not found.pretrained:
        raise ConfigError(
            f"Tasks of lm-eval for {params['target']}",
            "it is no language model of transformers",
            "Leave out --tasks",
        )
    names = [name.strip() for name in params["tasks"].split(",") if name.strip()]
    return harness(model, found.task.tokenizer, names, folder=params["task_folder"], limit=params["limit"])
