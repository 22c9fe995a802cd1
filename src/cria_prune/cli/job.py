"""One command at work: its stages, what it has measured so far, and how its models are kept."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import nn

from cria_prune.artifact.card import Card
from cria_prune.artifact.checkpoint import load
from cria_prune.artifact.pretrained import save_padded, save_pretrained
from cria_prune.artifact.rebuild import provenance
from cria_prune.base.batches import Batch, batch_size, model_inputs, move, outputs
from cria_prune.base.errors import ArtifactError, ConfigError
from cria_prune.base.files import without_places
from cria_prune.base.progress import clock
from cria_prune.base.ranks import alone, world
from cria_prune.cli import show
from cria_prune.cli.folder import interrupts_wait, keep
from cria_prune.cli.output import Output
from cria_prune.cli.settings import Resuming
from cria_prune.cli.target import Target
from cria_prune.cli.used import said, used
from cria_prune.config import (
    PlanConfig,
    PruneConfig,
    RecoverConfig,
    ScoreConfig,
    repair_of_before,
    score_of_before,
)
from cria_prune.pipeline import prune
from cria_prune.planning.plan import Plan, compose
from cria_prune.planning.serving import checked_for
from cria_prune.recovery.loop import RecoverResult
from cria_prune.recovery.tune import recover
from cria_prune.result import PruneResult, fidelity_rows, given_back_said, repairs_of, said_of
from cria_prune.scores import Scored
from cria_prune.stages import Prepared

RECOVERED, PRUNED = "the recovered model", "the pruned model"
COUNTS = ("parameters_dense", "parameters", "macs_dense", "macs")
SPEEDS = ("ranking", "speedup_asked", "speedup_predicted", "speedup")


@dataclass
class Job:
    """One command at work.

    Attributes:
        target: recipe, checkpoint or Hugging Face model.
        request: what was asked: the seed, whether to go on or to replace what is there.
        output: the folder for the results.
        device: where the models run.
        out: where to print; told what an interruption would leave.
        padded: also write the padded twin of a Hugging Face model.
        seconds: stage -> wall time.
        results: the JSON object so far.
        origin: provenance.
        served: for which server the model was cut, in words.
    """

    target: Target
    request: Resuming
    output: Path
    device: torch.device
    out: Output
    padded: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    served: str = ""

    def begin(self) -> None:
        """Load the data, and note where the results come from."""
        with clock(self.seconds, "data"):
            data = self.target.task.fingerprint()
        self.origin = provenance(self.request.base_seed, self.request.command, data, self.device)
        self.results |= {**self.target.named(), "seed": self.request.base_seed, "device": str(self.device)}
        if self.target.task.options:
            self.results["options"] = dict(self.target.task.options)
        if self.target.checkpoint is not None:
            self.results["checkpoint"] = str(self.target.checkpoint)
        if self.target.task.measured:
            self.results["test_data"] = self.target.task.fingerprint("test")
        if not self.target.task.architecture and not self.target.pretrained:  # nothing else says its name
            self.results["metric"] = self.target.task.metric
        for line in self.target.task.notes:
            self.out.note(line)

    def inherit_dense(self) -> None:
        """Note the checkpoint's figure of the dense model, if it was measured on the same test split."""
        before = self.target.results
        if "dense" in before and before.get("test_data") == self.results.get("test_data"):
            self.results["dense"] = before["dense"]

    def part(self, name: str) -> Job:
        """Return a job for one size of a family: the same until now, its results in a folder below."""
        output = self.output / name
        if not self.target.pretrained and world().first:
            output.mkdir(exist_ok=True)
        return replace(self, output=output, seconds=dict(self.seconds), results=dict(self.results))

    def may_replace(self) -> bool:
        """Say whether the output folder may be overwritten: asked for, or left by an interrupted run."""
        return self.request.overwrite or (
            self.request.resume and (self.rounds.exists() or self.recovery.exists())
        )

    def finished(self, described: Mapping[str, Any], stage: str) -> dict[str, Any] | None:
        """Return the results that lie in the output folder, if they are of this stage and configuration."""
        return world().lead("The output folder", lambda: self._finished(described, stage))

    def _finished(self, described: Mapping[str, Any], stage: str) -> dict[str, Any] | None:
        manifest = self.there()
        results = manifest.get("results")
        if not isinstance(results, dict) or results.get("stage") != stage:
            return None
        keys = ("recipe", "model", "options", "seed", "checkpoint")
        both = [(results.get(key), self.results.get(key)) for key in keys]
        same = all(there in (here, without_places(here)) for there, here in both)
        data = (manifest.get("provenance") or {}).get("data") == self.origin["data"]
        asked = manifest.get("config")
        as_kept = [described, without_places(described)]
        alike = any(item in as_kept for item in (asked, _as_now(asked)))
        return {**results, "output": str(self.output)} if same and data and alike else None

    def ended(self, described: Mapping[str, Any], stage: str) -> bool:
        """Answer with the results of the same command, if it is to be resumed and had ended already.

        Raises:
            ArtifactError: the output folder holds the result of another command.
        """
        found = self.finished(described, stage) if self.request.resume else None
        if found is None:
            if self.request.resume:
                world().lead("The output folder", self._check_same)
            return False
        self.forget()
        self.out.say(f"already in {self.output}")
        self.out.answer(found)
        return True

    def _check_same(self) -> None:
        results = self.there().get("results") or {}
        if not self.may_replace() and results.get("stage") in (RECOVERED, PRUNED):
            raise ArtifactError(
                f"Resuming in {self.output}",
                f"it holds {results['stage']} of another command, or of other settings",
                "Name another --output, or pass --overwrite to start anew",
            )

    def there(self) -> Mapping[str, Any]:
        """Return the manifest of what lies in the output folder; empty if nothing whole does."""
        try:
            return load(self.output, self.target.task.blank()).manifest
        except ArtifactError:
            return {}

    @property
    def recovery(self) -> Path:
        """Where the fine-tune keeps its state until the result is saved: hidden, beside the output."""
        return self.output.with_name(f".{self.output.name}.recovery")

    @property
    def rounds(self) -> Path:
        """Where the pruning keeps its rounds until the result is saved: hidden, beside the output."""
        return self.output.with_name(f".{self.output.name}.rounds")

    def forget(self) -> None:
        """Remove the states of the rounds and of the fine-tune: they are not needed any more."""
        for folder in (self.rounds, self.recovery) if world().first else ():
            shutil.rmtree(folder, ignore_errors=True)

    def measure(self, model: nn.Module, name: str) -> None:
        """Evaluate a model on the test split, print and note the metric and what else there is to say."""
        task = self.target.task
        if not task.measured:
            self.out.note(f"the {name} model is not measured: {task.lacking[0]}")
            return
        with clock(self.seconds, "evaluate"):
            progress = self.out.progress
            value, further = world().lead(
                "Measuring",
                lambda: (task.evaluate(model, task.test_batches(), progress), task.further(model, progress)),
            )
        self.results[name] = value
        said = self.target.metric.text(value)
        self.out.say(f"{name + ' ' + task.metric:<20} {said:>9}  ({task.tested_on})")
        if further:
            self.results["further"] = {**self.results.get("further", {}), name: further}
            show.further(self.out, name, further)

    def keep(self, model: nn.Module, plan: Plan, config: Mapping[str, Any], stage: str) -> None:
        """Save a checkpoint into the output folder; `stage` says what an interruption leaves.

        The rounds of a Hugging Face model are not kept: its folder is there whole and certified, or not.
        """
        if self.target.pretrained:
            return
        architecture, results = self.target.task.architecture or None, self._said(stage)
        described = {"config": config, "provenance": self.origin, "results": results}
        world().lead("Saving", lambda: keep(self.output, model, plan, architecture=architecture, **described))
        self._kept(stage)

    def save(self, model: nn.Module, plan: Plan, config: Mapping[str, Any], stage: str) -> None:
        """Save the result, load it again and compare: the last step but the report.

        Raises:
            ArtifactError, CertificateError: what was loaded computes something else.
        """
        model = model.to("cpu").eval()
        save = self._save_pretrained if self.target.pretrained else self._save_checkpoint
        with clock(self.seconds, "save"):
            world().lead("Saving", lambda: save(model, plan, config, stage))

    def _save_checkpoint(self, model: nn.Module, plan: Plan, config: Mapping[str, Any], stage: str) -> None:
        self.results["output"], self.results["reloaded"] = str(self.output), "bit-equal"
        self.keep(model, plan, config, stage)
        example = next(iter(self.target.task.validation_batches()))
        again = load(self.output, self.target.task.blank()).model
        pairs = list(zip(outputs(model, example), outputs(again, example), strict=True))
        if not all(torch.equal(expected, found) for expected, found in pairs):
            distance = max(float((expected - found).abs().max()) for expected, found in pairs)
            raise ArtifactError(
                f"Reloading the checkpoint in {self.output}",
                f"its logits differ by {distance:.3g} from those of the model that was saved",
                "Please report this; the checkpoint should not be used",
            )
        self.out.say(f"checkpoint {self.output}: reloaded, the logits are equal bit for bit")
        if self.target.task.named:
            self.out.say(f"go on with: cria recover {self.output}{self.target.task.named}")

    def _save_pretrained(self, model: nn.Module, plan: Plan, config: Mapping[str, Any], stage: str) -> None:
        self.results["output"] = str(self.output)
        self.out.note(f"saving to {self.output}, and loading it in a fresh process")
        card = Card(
            base=self.target.base,
            command=self.request.command,
            measured=show.measured(self.results, self.target.metric),
            changed=", ".join(filter(None, [str(self.results.get("changed", "")), self.served])),
            data=said(self.results["calibration"]) if "calibration" in self.results else "",
            fidelity=fidelity_rows(show.known_fidelity(self.results)),
            repaired=list(filter(None, [
                given_back_said(self.results.get("repairs", ())), "; ".join(self.results.get("remarks", ())),
            ])),
        )  # fmt: skip
        with TemporaryDirectory(prefix="cria-") as scratch:
            common: dict[str, Any] = {
                "source": self.target.task.pretrained_source(Path(scratch)), "config": config,
                "provenance": self.origin, "results": self._said(stage), "card": card,
                "overwrite": self.may_replace(), "example": self.target.task.real_example(),
            }  # fmt: skip
            certificate = save_pretrained(
                self.output, model, plan, policy=cast(Any, self.target.policy), **common
            )
            self._kept(stage)
            self.out.say(f"folder {self.output}: {certificate}")
            if self.padded:
                twin = padded_folder(self.output)
                padded = save_padded(twin, model, plan, **common)
                self.out.say(f"padded twin {twin}: {padded}")
                self.results["padded"] = str(twin)
        self.results["policy"] = self.target.policy
        self.results["reloaded"] = "bit-equal" if certificate.equal else certificate.relative

    def _said(self, stage: str) -> dict[str, Any]:
        return self.results | {"stage": stage, "seconds": rounded(self.seconds)}

    def _kept(self, stage: str) -> None:
        command = f"cria recover {self.output}{self.target.task.named}"
        self.out.kept = f"{stage} is kept in {self.output} (go on with: {command})"


def _as_now(config: Any) -> Any:
    """Return a kept configuration as it would be said now: before, a ridge stood there that was
    not read, of the repair whether there was one, and a plan said nothing of single groups.
    """
    if not isinstance(config, dict) or not isinstance(config.get("prune"), dict):
        return config
    prune = config["prune"]
    try:
        prune = repair_of_before(prune)
        score = ScoreConfig(**score_of_before(prune.get("score", {})))
        plan = PlanConfig(**prune.get("plan", {}))
    except (ConfigError, TypeError):  # of another version: not the same
        return config
    sections = {"score": score.model_dump(mode="json"), "plan": plan.model_dump(mode="json")}
    return {**config, "prune": {**prune, **sections}}


def padded_folder(output: Path) -> Path:
    """Return the folder of the padded twin: beside the other, its name with `-padded`."""
    return output.with_name(f"{output.name}-padded")


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return wall times to the millisecond."""
    return {stage: round(spent, 3) for stage, spent in seconds.items()}


def prune_stage(
    job: Job, prepared: Prepared, config: PruneConfig, watch: bool, scored: Scored | None = None
) -> tuple[PruneResult, Plan]:
    """Prune, keep every finished round; return the result and the plan relative to the dense network."""
    task, before = job.target.task, job.target.plan
    model, batches = prepared.model, list(prepared.batches)
    job.results["calibration"] = used(task, batches, prepared.groups, config.record)
    job.out.say(f"calibrated on {said(job.results['calibration'])}")

    def whole(result: PruneResult) -> Plan:
        return result.plan if before is None else compose(before, result.plan)

    def on_round(result: PruneResult) -> None:
        note_costs(job, result, whole(result))
        stage = f"round {len(result.rounds)} of {config.plan.rounds}"
        with clock(job.seconds, "save"):
            job.keep(result.model, whole(result), {"prune": config.model_dump(mode="json")}, stage)
        job.out.kept = f"{stage} is kept (go on with: the same command, --output {job.output} --resume)"

    held = list(task.validation_batches()) if watch else []
    if not job.request.resume:
        job.forget()
    job.served = checked_for(config.plan, model)
    result = prune(
        model,
        prepared.batches,
        config,
        loss=task.loss,
        prepared=prepared,
        evaluate=(lambda smaller: task.evaluate(smaller, held)) if watch else None,
        on_round=on_round,
        progress=job.out.progress,
        graphs=True,
        state=job.rounds,
        data=job.origin["data"],
        scores=scored,
    )
    stages = result.seconds_by_stage
    job.seconds["structure"] = stages.pop("discover")
    job.seconds |= {stage: job.seconds.get(stage, 0.0) + spent for stage, spent in stages.items()}
    job.seconds["forward"] = forward_seconds(model, batches, job.device)
    milliseconds = 1000 / sum(map(batch_size, batches))
    job.results["milliseconds_before"] = job.seconds["forward"] * milliseconds
    job.results["milliseconds"] = forward_seconds(result.model, batches, job.device) * milliseconds
    if scored is None:
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
        **{name: said[name] for name in COUNTS},
        **{name: report[name] for name in SPEEDS if name in report},
        "rounds": len(result.rounds),
    }
    earlier = job.target.results.get("changed")
    changed = [result.changed, f"before this cut {earlier}" if earlier else ""]
    if any(changed):
        job.results["changed"] = ", ".join(filter(None, changed))
    for name in ("remarks", "repairs", "unrepaired"):  # of the last round alone
        job.results.pop(name, None)
    if result.remarks:
        job.results["remarks"] = result.remarks
    job.results |= repairs_of(result.rounds[-1])
    if result.rounds[-1].fidelity:
        job.results["fidelity"] = said_of(result.rounds[-1])
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
    here = world()
    if not job.request.resume:
        here.lead("The recovery", lambda: shutil.rmtree(job.recovery, ignore_errors=True))
    held = list(task.validation_batches())
    if task.embeds:  # its loss asks the dense one itself
        dense, config = None, config.model_copy(update={"distill": 0.0})
    try:
        with clock(job.seconds, "recover"):
            found = recover(
                model,
                task.train_batches(config.seed, device=job.device),
                config,
                evaluate=(lambda network: task.evaluate(network, held))
                if task.measured or task.embeds
                else None,
                loss=task.loss,
                teacher=dense if config.distill else None,
                lower_is_better=not job.target.metric.higher_is_better,
                device=job.device,
                progress=job.out.progress,
                state=job.recovery,
                data=job.origin["data"],
            )
            job.results["best_epoch"] = found.best_epoch
            return found
    except Exception:
        if here.first:
            shutil.rmtree(job.recovery, ignore_errors=True)
        raise
    except KeyboardInterrupt:
        if not here.first:
            raise
        with interrupts_wait(), alone():
            job.save(model, plan, described, "the best epoch so far of the interrupted recovery")
        raise
