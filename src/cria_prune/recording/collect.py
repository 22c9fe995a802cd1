"""One pass over the calibration batches: the moments of every group's signals, in bounded memory.

Legend: B = examples of a batch, n = features of an activation, S = samples.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from cria_prune.base.batches import Batch, batch_size, by_name, forward, limited, map_tensors, told_apart
from cria_prune.base.errors import DataError
from cria_prune.base.events import passed
from cria_prune.base.experts import watched_experts
from cria_prune.base.inputs import Inputs, read
from cria_prune.base.kinds import of_plain_models
from cria_prune.base.metrics import Loss, cross_entropy
from cria_prune.base.modules import buffers_kept, digest, named_tensors, unchanged
from cria_prune.base.ranks import world
from cria_prune.config import RecordConfig
from cria_prune.recording.gradients import FisherSums, TaylorSums
from cria_prune.recording.routed import Routed, RoutedSums
from cria_prune.recording.signals import Collector
from cria_prune.recording.states import EVERYTHING, Read, States, reads_of
from cria_prune.recording.taps import Taps
from cria_prune.structure.groups import UnitGroups


@of_plain_models
def record(
    model: nn.Module,
    groups: UnitGroups,
    batches: Iterable[Batch],
    config: RecordConfig | None = None,
    *,
    loss: Loss | None = None,
    gradients: bool = False,
    consumed: bool = False,
    per_example: bool = False,
    reads: frozenset[Read] = EVERYTHING,
    graphs: Collection[str] = (),
    device: torch.device | str = "cpu",
    inputs: Inputs | None = None,
) -> States:
    """Run the model over calibration batches and return what its prunable units do.

    With several processes (`base.ranks`) all go through the same batches and each runs its share of
    them; all get the same states, those of one process up to the rounding of sums.

    The model runs in evaluation mode; afterwards, also after an exception, its modes, gradients and
    the global random generators are as before.

    Args:
        model: the live model, already on `device`.
        groups: its unit groups; frozen ones are passed over.
        batches: tensors, (inputs, target) pairs or mappings; at most `config.examples` examples are
            used, the last batch is cut. Positions where a mapping's `attention_mask` is 0 are left out.
        config: examples, positions, tokens, sketches and the seed.
        loss: (model, batch) to a scalar, for `gradients`; cross-entropy by default.
        gradients: also take first-order Taylor importances, by one backward pass per batch.
        consumed: also keep the second moments of the features that each consumer reads, to repair `once`.
        per_example: with `gradients`, which it switches on, also take Fisher importances, from the
            gradients of each example; the loss is then a mean over the batch. It holds a copy of every
            input-side signal of a batch.
        reads: what to keep beyond the outputs' means and variances: `input`, the input side; `output`, the
            second moments between the units on the output side; `positive`, the share of outputs above 0.
            Criteria say what they read; second moments are most of the work.
        graphs: names of groups of which both sides are kept in any case.
        device: where the batches go.
        inputs: as in `prune`.

    Returns:
        The states of every prunable group: per side its moments, and those of the even and the odd
        examples apart; of whole experts what they did, in `routed`. The draw of positions and tokens
        depends only on the seed and the example's index.

    Raises:
        DataError: no batches, batches of a wrong kind, or the model fails on one.
        SignalError: a signal holds NaN or infinity, or a group was never reached.
        CriterionError: `gradients` without a target or a usable loss; `per_example` where a batch's
            examples share a signal.
        StructureError: the groups are those of another model.
        RankError: another process failed, is gone, or has other weights or batches.
    """
    passed("record", model=model, groups=groups)
    config, batches = config or RecordConfig(), read(model, batches, inputs)
    gradients = gradients or per_example
    reads |= reads_of(frozenset({"examples"})) if per_example else frozenset()
    start = time.perf_counter()
    examples = count = 0
    here, seen = world(), hashlib.sha256()
    with unchanged(model), buffers_kept(model), torch.set_grad_enabled(gradients):
        model.eval()
        with here.together("Recording", seen.hexdigest):
            if here.size > 1:
                seen.update(digest("", named_tensors(model)).encode())
            collector = Collector(groups.recorded, config, consumed, reads, graphs)
            whole = RoutedSums(model, groups.prunable)
            taylor = TaylorSums(model, groups.recorded, loss or cross_entropy) if gradients else None
            fisher = FisherSums(groups.recorded) if per_example else None
            with_taps = Taps(model, collector.wanted, collector.receive, fisher.watch if fisher else None)
            for batch in limited(batches, config.examples):
                size, first = batch_size(batch), examples
                examples, count = examples + size, count + 1
                if here.size > 1:
                    seen.update(told_apart(batch).encode())
                if not here.mine(count - 1):
                    continue
                mask = by_name(batch).get("attention_mask")
                collector.begin(first, size, mask)
                whole.begin(first, size, mask)
                if fisher:
                    fisher.begin(size)
                # A copy: a forward may write into its input, and the next round needs it as it was.
                batch = map_tensors(batch, lambda item: item.to(device, copy=True))
                with with_taps, watched_experts(whole.receive):
                    forward(model, batch, taylor.add if taylor else None)
                if fisher:
                    fisher.finish()
                passed("batch", number=count, examples=examples)
        # The same names in every process, whichever of them a process has seen.
        routed = _no_rows(model, groups)
        if here.size > 1:
            # All is sums over samples, so adding them up is exact, and
            # one process or many give the same scores up to rounding.
            collector.pool(here.total, device)
            whole.pool(here.total)
            for sums in (taylor.sums if taylor else {}, fisher.sums if fisher else {}):
                sums.update({name: here.total(value) for name, value in sums.items()})
            routed = {name: here.total(with_taps.routed.get(name, rows)) for name, rows in routed.items()}
    if not count:
        raise DataError("Recording the model's signals", "the batches are empty", "Pass two examples or more")
    return States(
        groups=collector.states(taylor.sums if taylor else {}, fisher.sums if fisher else {}),
        examples=examples,
        batches=count,
        positions=config.positions,
        seed=config.seed,
        seconds=time.perf_counter() - start,
        device=str(device),
        gradients=gradients,
        per_example=per_example,
        reads=reads,
        unreached=_unreached(routed if here.size > 1 else with_taps.routed, whole.found()),
        routed=whole.found(),
    )


def _no_rows(model: nn.Module, groups: UnitGroups) -> dict[str, torch.Tensor]:
    """Return weight -> (experts,) zeros, of every weight that may be one of experts."""
    tensors = named_tensors(model)
    names = sorted({item.tensor for group in groups.recorded if group.multiple > 1 for item in group.slices})
    found = {name: tensors[name] for name in names if tensors[name].ndim == 3}
    return {name: torch.zeros(len(item), dtype=torch.float64) for name, item in found.items()}


def _unreached(routed: Mapping[str, torch.Tensor], whole: Mapping[str, Routed]) -> dict[str, tuple[int, ...]]:
    """Return the experts of each module that got no row, and warn of them."""
    found, removable = dict[str, tuple[int, ...]](), {item.module for item in whole.values()}
    counts = dict(routed)
    for item in whole.values():  # where their neurons stay, nothing else counts
        counts.setdefault(f"{item.module}.", item.tokens.sum(dim=0))
    for name, rows in counts.items():
        module, missed = name.rpartition(".")[0], torch.nonzero(rows == 0).ravel().tolist()
        if module in found or not missed or len(missed) == len(rows):  # never called at all: no experts
            continue
        found[module] = tuple(missed)
        numbers = ", ".join(map(str, missed[:8])) + (" ..." if len(missed) > 8 else "")
        warnings.warn(
            f"The calibration reaches {len(rows) - len(missed)} of the {len(rows)} experts of {module!r}, "
            f"and not {numbers}: their neurons are judged by the signals of the others"
            + (", and as whole experts they count as usual ones" if module in removable else "")
            + ". Give more, or more varied, calibration examples",
            stacklevel=3,
        )
    return found
