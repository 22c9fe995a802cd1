"""What the commands do that change nothing: inspect, evaluate; heavy imports begin here."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Any

from torch import nn

from cria_prune.base.errors import ConfigError
from cria_prune.base.progress import clock
from cria_prune.cli import show, target
from cria_prune.cli.job import rounded
from cria_prune.cli.outline import drawn, folded, frozen, inventory, module_tree, outline, shares
from cria_prune.cli.output import Output
from cria_prune.cli.settings import Eval, Inspect
from cria_prune.cli.target import Target, load_source, parse_shape
from cria_prune.stages import discover


def inspect(request: Inspect, out: Output) -> None:
    """The unit groups of a model from anywhere, what they cost and why some are frozen."""
    out.quiet |= request.as_json
    with redirect_stdout(sys.stderr):  # what the user's code prints is no part of the answer
        source = load_source(request.model, parse_shape(request.example), request.meta)
        groups = discover(source.model, source.example)
    found = inventory(groups, request.plan.floor)
    show.model(out, source, found)
    if request.tree:
        out.tree(drawn(module_tree(source.model, found.rows, request.all)))
        frozen(out, folded(found.rows, request.all))
        shares(out, found)
    else:
        outline(out, found, request.all)
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
    out.answer(answer if request.as_json else {**answer, "groups": len(found.rows)})


def evaluate(request: Eval, out: Output) -> None:
    """The metric on the test split, or on texts of the user; or tasks of lm-eval."""
    found = target.find(request.target, request.texts)
    seconds: dict[str, float] = {}
    device, seed = request.torch_device, request.base_seed
    with clock(seconds, "model"):
        model = found.model(device, seed, out.progress)
    metrics: dict[str, Any] = {}
    with clock(seconds, "evaluate"):
        if request.tasks:
            metrics = harness_of(request, found, model)
        else:
            check_measured(found, request.target)
            value = found.task.evaluate(model, found.task.test_batches(), out.progress)
            metrics = {found.task.metric: value, **found.task.further(model, out.progress)}
    parameters = sum(item.numel() for item in model.parameters())
    out.table(["target", "parameters"], [[request.target, f"{parameters:,}"]])
    show.further(out, "", metrics)
    out.answer(
        {
            "target": request.target,
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


def harness_of(request: Eval, found: Target, model: nn.Module) -> dict[str, float]:
    """Return what lm-eval measures on the tasks that were named."""
    from cria_prune.tasks.harness import harness

    if not found.pretrained:
        raise ConfigError(
            f"Tasks of lm-eval for {request.target}",
            "it is no language model of transformers",
            "Leave out --tasks",
        )
    names = [name.strip() for name in (request.tasks or "").split(",") if name.strip()]
    return harness(model, found.task.tokenizer, names, folder=request.task_folder, limit=request.limit)
