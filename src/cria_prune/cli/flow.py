"""The stages of `run`, `prune` and `recover`, in the order of the recipe, on one `Job`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cria_prune.artifact.checkpoint import load
from cria_prune.artifact.provenance import provenance
from cria_prune.batches import Batch, batch_size, model_inputs, move
from cria_prune.cli import show
from cria_prune.cli.folder import interrupts_wait, keep
from cria_prune.cli.talk import Kept, Talk
from cria_prune.cli.target import Target
from cria_prune.config import PruneConfig, RecoverConfig
from cria_prune.errors import ArtifactError
from cria_prune.loss import logits_of
from cria_prune.pipeline import PruneResult, clock, compose, prune
from cria_prune.plan import Plan
from cria_prune.recover import RecoverResult, recover


@dataclass
class Job:
    """One command at work.

    Attributes:
        target: recipe or checkpoint.
        output: the folder for the results.
        device: where the models run.
        seed: of the dense training and of what the configurations do not seed.
        talk: where to print.
        kept: told what an interruption would leave.
        command: the command line, for the provenance.
        seconds: stage -> wall time.
        results: the JSON object so far.
    """

    target: Target
    output: Path
    device: torch.device
    seed: int
    talk: Talk
    kept: Kept
    command: list[str]
    seconds: dict[str, float] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    def begin(self) -> None:
        """Load the data, and note where the results come from."""
        with clock(self.seconds, "data"):
            data = self.target.task.fingerprint()
        self.origin = provenance(self.seed, self.command, data, self.device)
        self.results |= {"recipe": self.target.task.name, "seed": self.seed, "device": str(self.device)}
        if self.target.task.options:
            self.results["options"] = dict(self.target.task.options)
        if self.target.checkpoint is not None:
            self.results["checkpoint"] = str(self.target.checkpoint)

    def measure(self, model: nn.Module, name: str) -> float:
        """Evaluate a model on the test split, print and note the metric and what else there is to say."""
        task = self.target.task
        with clock(self.seconds, "evaluate"):
            value = task.evaluate(model, task.test_batches(), self.talk.progress)
            further = task.further(model, self.talk.progress)
        self.results[name] = value
        said = self.target.metric.text(value)
        self.talk.say(f"{name + ' ' + task.metric:<20} {said:>9}  (all test examples)")
        if further:
            self.results.setdefault("further", {})[name] = further
            show.further(self.talk, name, further)
        return value

    def keep(self, model: nn.Module, plan: Plan, config: Mapping[str, Any], stage: str) -> None:
        """Save a checkpoint into the output folder; `stage` says what an interruption leaves."""
        results = self.results | {"stage": stage, "seconds": rounded(self.seconds)}
        keep(
            self.output,
            model,
            plan,
            architecture=self.target.task.architecture,
            config=config,
            provenance=self.origin,
            results=results,
        )
        self.kept.text = f"{stage} is kept in {self.output} (go on with: cria recover {self.output})"


def prune_stage(job: Job, model: nn.Module, config: PruneConfig, watch: bool) -> tuple[PruneResult, Plan]:
    """Prune, keep every finished round; return the result and the plan relative to the dense network."""
    task, before = job.target.task, job.target.plan

    def whole(result: PruneResult) -> Plan:
        return result.plan if before is None else compose(before, result.plan)

    def on_round(result: PruneResult) -> None:
        note_costs(job, result, whole(result))
        stage = f"round {len(result.rounds)} of {config.plan.rounds}"
        with clock(job.seconds, "save"):
            job.keep(result.model, whole(result), {"prune": config.model_dump(mode="json")}, stage)

    with clock(job.seconds, "data"):
        batches = task.calibration(config.record.examples, config.record.seed)
    held = list(task.validation_batches()) if watch else []
    result = prune(
        model,
        batches,
        config,
        evaluate=(lambda smaller: task.evaluate(smaller, held)) if watch else None,
        on_round=on_round,
        progress=job.talk.progress,
    )
    job.seconds["structure"] = result.seconds
    for item in result.rounds:
        for stage, spent in item.seconds.items():
            job.seconds[stage] = job.seconds.get(stage, 0.0) + spent
    job.seconds["forward"] = forward_seconds(model, batches, job.device)
    milliseconds = 1000 / sum(map(batch_size, batches))
    job.results["milliseconds_before"] = job.seconds["forward"] * milliseconds
    job.results["milliseconds"] = forward_seconds(result.model, batches, job.device) * milliseconds
    first = result.rounds[0].seconds
    scoring = first.get("record", 0.0) + first.get("score", 0.0)
    job.results["scoring_over_forward"] = round(scoring / max(job.seconds["forward"], 1e-9), 2)
    return result, whole(result)


def note_costs(job: Job, result: PruneResult, plan: Plan) -> None:
    """Note what was asked and reached; counts of the dense network come from the whole plan."""
    report, said = result.report, plan.report
    job.results |= {
        "criterion": result.config.score.criterion,
        "asked": result.config.plan.reduction,
        "of": result.config.plan.of,
        "reduction": report["reached"],
        "reachable": report["reachable"],
        "parameters_dense": said["parameters_dense"],
        "parameters": said["parameters"],
        "macs_dense": said["macs_dense"],
        "macs": said["macs"],
        "rounds": len(result.rounds),
    }
    checks = [item.verification.difference for item in result.rounds if item.verification is not None]
    if checks:
        job.results["masked_equals_pruned"] = max(checks)
    if job.target.plan is not None:
        job.results["parameters_before"] = report["parameters_dense"]


def forward_seconds(model: nn.Module, batches: list[Batch], device: torch.device) -> float:
    """Return the wall time of a plain forward pass over the batches: the median of three."""

    def passed(items: list[Batch]) -> float:
        start = time.perf_counter()
        for batch in items:
            args, kwargs = model_inputs(move(batch, device))
            model(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    model.eval()
    with torch.no_grad():
        return statistics.median(passed(batches) for _ in range(3))


def recover_stage(
    job: Job, model: nn.Module, plan: Plan, config: RecoverConfig, dense: nn.Module | None, described: Any
) -> RecoverResult:
    """Fine-tune in place; an interruption keeps the best epoch so far and goes on up."""
    task = job.target.task
    held = list(task.validation_batches())
    try:
        with clock(job.seconds, "recover"):
            return recover(
                model,
                task.train_batches(config.seed),
                config,
                evaluate=lambda network: task.evaluate(network, held),
                teacher=dense if config.distill else None,
                lower_is_better=not job.target.metric.higher_is_better,
                device=job.device,
                progress=job.talk.progress,
            )
    except KeyboardInterrupt:
        with interrupts_wait():
            job.keep(model, plan, described, "the best epoch so far of the interrupted recovery")
        raise


def save_and_reload(job: Job, model: nn.Module, plan: Plan, config: Mapping[str, Any], stage: str) -> None:
    """Save the checkpoint, load it again and check that the logits are equal bit for bit.

    Raises:
        ArtifactError: they are not.
    """
    model = model.to("cpu").eval()
    with clock(job.seconds, "save"):
        job.results["output"], job.results["reloaded"] = str(job.output), "bit-equal"
        job.keep(model, plan, config, stage)
        example = next(iter(job.target.task.validation_batches()))
        args, kwargs = model_inputs(example)
        again = load(job.output).model
        with torch.no_grad():
            expected, found = (logits_of(network(*args, **kwargs)) for network in (model, again))
    if not torch.equal(expected, found):
        distance = float((expected - found).abs().max())
        raise ArtifactError(
            f"Reloading the checkpoint in {job.output}",
            f"its logits differ by {distance:.3g} from those of the model that was saved",
            "Please report this; the checkpoint should not be used",
        )
    job.talk.say(f"checkpoint {job.output}: reloaded, the logits are equal bit for bit")


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return wall times to the millisecond."""
    return {stage: round(spent, 3) for stage, spent in seconds.items()}
