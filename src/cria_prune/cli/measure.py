"""`cria ablate` and `cria eval`: what a criterion is worth, and what a model is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from cria_prune.ablation import COLUMNS, SHARES, Ablation, ablation_of, check_seeds, check_shares
from cria_prune.artifact.facts import EVAL
from cria_prune.artifact.rebuild import provenance
from cria_prune.base.batches import Batch, batch_size
from cria_prune.base.errors import ConfigError
from cria_prune.base.files import without_places, write_json
from cria_prune.base.progress import clock
from cria_prune.cli import show, target
from cria_prune.cli.deploy import kept
from cria_prune.cli.folder import claimed, interrupts_wait, picture
from cria_prune.cli.job import rounded
from cria_prune.cli.output import Output
from cria_prune.cli.settings import Ablate, Eval, prune_config
from cria_prune.cli.target import Target, own_of
from cria_prune.config import REPAIRED
from cria_prune.repair.fidelity import fidelity
from cria_prune.report.curves import plot_ablation
from cria_prune.stages import prepare, rank
from cria_prune.tasks.kinds import NO_METRIC
from cria_prune.tasks.own import OwnTask

RESULT, PICTURE = "ablation.json", "ablation.png"


def ablate(request: Ablate, out: Output) -> None:
    """Score the units once, then measure what is left without the lowest, the highest and random ones."""
    found = target.find(request.target, request.texts, own_of(request))
    config = prune_config(request, found.prune_defaults())
    shares, seed, limit = given_shares(request.shares), request.base_seed, request.limit
    seeds = check_seeds(range(seed, seed + request.random_seeds))
    if limit is not None and limit < 1:
        raise ConfigError("A limit of test examples", f"found {limit}", "Give 1 or more, or leave it out")
    if not found.task.embeds:  # an encoder is measured beside the dense one
        check_measured(found, request.target)
    device, seconds = request.torch_device, dict[str, float]()
    with claimed(request.output, f"{found.task.name}-ablation", request.overwrite) as folder:
        with clock(seconds, "data"):
            origin = provenance(seed, request.command, found.task.fingerprint(), device)
            batches, tested_on = test_split(found, limit)
            calibration = found.task.calibration(config.record.examples, config.record.seed)
        with clock(seconds, "model"):
            model = found.model(device, seed, out.progress)
        found.task.compare_with(model)
        proven = config.model_copy(update={"verify": True})
        prepared = prepare(model, calibration, proven, example=found.task.example)
        ranking = rank(prepared, loss=found.task.loss)
        seconds |= {"structure": prepared.seconds, **ranking.seconds}
        with clock(seconds, "ablate"):
            result = ablation_of(
                prepared, ranking, lambda network: found.task.evaluate(network, batches), shares, seeds=seeds,
                measure=found.metric, progress=out.progress,
            )  # fmt: skip
        head = {
            "target": request.target,
            **found.named(),
            "criterion": config.score.criterion,
            "limit": limit,
            "tested_on": tested_on,
        }
        show_ablation(out, result, head)
        asked = config.model_dump(mode="json")
        asked["plan"] = {key: asked["plan"][key] for key in ("residual", "experts", "units", "vanilla")}
        used = {key: asked[key] for key in ("record", "score", "plan")}
        values = {**result.to_dict(), **head, "config": used, "provenance": origin}
        title = f"{request.target}, {config.score.criterion}, {REPAIRED[config.repair]}: {tested_on}"
        with interrupts_wait():
            drawn = picture(folder / PICTURE, title, (5.4, 3.6), partial(plot_ablation, values))
            write_json(folder / RESULT, without_places(values), allow_nan=False)
        out.say(f"result {folder / RESULT}, {drawn}")
    answer = {key: value for key, value in result.to_dict().items() if key != "curves"}
    out.answer(
        {**head, **answer, "seed": seed, "device": str(device), "output": str(folder),
         "seconds": rounded(seconds)}
    )  # fmt: skip


def given_shares(text: str | None) -> tuple[float, ...]:
    """Return the shares that were given, ascending.

    Raises:
        ConfigError: a share is no number.
        TargetError: see `check_shares`.
    """
    if text is None:
        return SHARES
    try:
        shares = [float(word) for word in text.split(",") if word.strip()]
    except ValueError as error:
        raise ConfigError(
            f"The shares {text!r}", str(error), "Give numbers between 0 and 1, such as 0.25,0.5"
        ) from error
    return check_shares(shares)


def test_split(found: Target, limit: int | None) -> tuple[Iterable[Batch], str]:
    """Return the test batches and what they are, in words: a quick look is not to pass for the whole."""
    batches = found.task.test_batches(limit)
    if limit is None:
        return batches, found.task.tested_on
    return batches, f"the first {sum(map(batch_size, batches)):,} test examples"


def show_ablation(out: Output, result: Ablation, head: dict[str, Any]) -> None:
    """Print the table, what was removed in it and what it says of the criterion."""
    name = result.metric.name
    out.say(f"dense {name:<14} {result.metric.text(result.dense):>9}  ({head['tested_on']})")
    out.table(COLUMNS, result.rows(), left=0)
    out.say(
        f"{name} after removing units by {head['criterion']}, lowest or highest first, or in "
        f"{len(result.seeds)} random orders (mean, lowest to highest);"
    )
    out.say("units removed: the same share of every group, rounded to whole units, one at least stays")
    out.say(f"every network is measured {REPAIRED[result.repair]}, without training")
    out.say(f"largest difference between masked and pruned: {result.difference:.0e}")
    out.say(result.verdict)


def evaluate(request: Eval, out: Output) -> None:
    """The metric on the test split, or on texts of the user; or tasks of lm-eval; how far from another model.

    Against another model texts without labels will do: then no metric is measured.
    """
    found = target.find(request.target, request.texts, own_of(request))
    seconds: dict[str, float] = {}
    device, seed = request.torch_device, request.base_seed
    with clock(seconds, "model"):
        model = found.model(device, seed, out.progress)
    metrics, distance = dict[str, Any](), None
    if request.against is not None:
        with clock(seconds, "model"):
            dense = against_of(request, found).model(device, seed, out.progress)
        found.task.compare_with(dense)
        with clock(seconds, "fidelity"):
            distance = fidelity(dense, model, found.task.test_batches())
    with clock(seconds, "evaluate"):
        if request.tasks:
            metrics = harness_of(request, found, model)
        elif found.task.measured or distance is None:
            check_measured(found, request.target)
            value = found.task.evaluate(model, found.task.test_batches(), out.progress)
            metrics = {found.task.metric: value, **found.task.further(model, out.progress)}
    parameters = sum(item.numel() for item in model.parameters())
    out.table(["target", "parameters"], [[request.target, f"{parameters:,}"]])
    show.further(out, "", metrics)
    if distance is not None:
        out.say(f"from {request.against}: {distance}")
        metrics |= {"against": request.against, "fidelity": distance.to_dict()}
    keep_evaluation(out, found, metrics)
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


def against_of(request: Eval, found: Target) -> Target:
    """Return the model that another one is compared with; one of the user's own by the same functions."""
    name = str(request.against)
    if not isinstance(found.task, OwnTask):
        return target.find(name)
    if name == found.task.factory:
        return Target(found.task, base=name)
    return target.find(name, own=replace(found.task.own, factory=found.task.factory))


def keep_evaluation(out: Output, found: Target, metrics: Mapping[str, Any]) -> None:
    """Keep a metric and a distance in the folder of a pruned model, beside what was kept before."""
    value = metrics.get(found.task.metric)
    new = {} if value is None else {"metric": found.task.metric, "value": value}
    new |= {"fidelity": metrics["fidelity"]} if "fidelity" in metrics else {}
    if found.checkpoint is None or not new:
        return
    kept(out, found.checkpoint, EVAL, new)


def check_measured(found: Target, name: str) -> None:
    """Raise a ConfigError if the test split lacks what the metric needs."""
    if found.task.metric == NO_METRIC:
        raise ConfigError(
            f"A metric of {name}", "its task has none",
            "Compare it with the dense model: --against FOLDER",
        )  # fmt: skip
    if not found.task.measured and found.task.embeds:
        raise ConfigError(
            f"What the embeddings of {name} are worth", "no scored pairs and no dense one were given",
            "Give --against the dense folder; or --calibration with pairs of texts and a column score",
        )  # fmt: skip
    if not found.task.measured:
        raise ConfigError(f"A measure of {name}", *found.task.lacking)


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
