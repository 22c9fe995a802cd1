"""Fidelity: how far a network is from the one it was made of, on examples, without labels.

For every floating tensor f of the dense network's output and the other network's f̂, over S samples:

- relative error ‖f − f̂‖² / ‖f − mean f‖², the mean over the samples; 1 is what a constant could do;
- cosine, the mean over the samples of f·f̂ / (‖f‖ ‖f̂‖);
- of logits and probabilities also the mean KL divergence Σ p ln(p / p̂) in nats, and how often the largest is
  the same one.

Legend: N = examples of a batch, T = tokens, C = features or classes, S = samples. A sample is an example of
an (N, C) tensor, a token of an (N, T, C) one, and a position of an (N, C, H, W) map; tokens whose
`attention_mask` is 0 are left out. Sums are in float64, batch by batch, and alike over several processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

import torch
from pydantic import PlainSerializer, TypeAdapter
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from cria_prune.base.batches import (
    ALONE,
    Batch,
    again,
    batch_size,
    batch_target,
    by_name,
    forward,
    map_tensors,
    model_inputs,
    names_along,
    told_apart,
)
from cria_prune.base.errors import DataError, SignalError
from cria_prune.base.events import passed
from cria_prune.base.inputs import Inputs, read
from cria_prune.base.kinds import of_plain_models
from cria_prune.base.metrics import percent
from cria_prune.base.modules import buffers_kept, device_of, digest, named_tensors, unchanged
from cria_prune.base.ranks import world

AS_CUT, REPAIRED, NORMS = STAGES = ("as cut", "repaired", "norms")
"""The stages of a round after which fidelity is measured, in their order."""

PIECE = 2**20  # numbers of an output that are compared at a time, as float64
SAME = 1e-6  # relative difference of two runs of one network, at most; more for short types
SAME_THERE = 1e-3  # the same on a GPU, which may add in another order or choose another algorithm
ASKED = "The fidelity of a network"

# JSON has no infinity.
Number = Annotated[float, PlainSerializer(lambda value: value if math.isfinite(value) else str(value))]


@dataclass(frozen=True)
class Distance:
    """How far one output tensor is from the dense network's.

    Attributes:
        name: of the output: its key, or its place; `output` where it is the only one.
        samples: how many were compared.
        relative_error: ‖f − f̂‖² / ‖f − mean f‖²; over ‖f‖² where f is alike for all samples. Infinite where
            f̂ holds NaN or infinity.
        cosine: mean over the samples.
        divergence: mean KL divergence in nats; None for what is neither logits nor probabilities.
        agreement: share of the samples with the same largest class; None likewise.
    """

    name: str
    samples: int
    relative_error: Number
    cosine: Number
    divergence: Number | None = None
    agreement: float | None = None

    def __str__(self) -> str:
        if self.divergence is None:
            return f"relative error {self.relative_error:.3g}, cosine {self.cosine:.3f}"
        return f"KL {self.divergence:.3g}, agrees on {percent(self.agreement)}"


@dataclass(frozen=True)
class Fidelity:
    """How far a network is from the dense one; prints as one line.

    Attributes:
        examples: how many were compared.
        outputs: the distance of each output tensor.
    """

    examples: int
    outputs: tuple[Distance, ...] = field(repr=False)

    @property
    def worst(self) -> Distance:
        """The output that is farthest: by KL among those that have one, else by relative error."""
        decided = [item for item in self.outputs if item.divergence is not None]
        if decided:
            return max(decided, key=lambda item: item.divergence or 0.0)
        return max(self.outputs, key=lambda item: item.relative_error)

    @property
    def loss(self) -> float:
        """KL in nats of the worst logits; without any, the worst relative error. Smaller is nearer."""
        worst = self.worst
        return worst.relative_error if worst.divergence is None else worst.divergence

    @property
    def unit(self) -> str:
        """What `loss` is: `KL` or `relative error`."""
        return "relative error" if self.worst.divergence is None else "KL"

    @property
    def brief(self) -> str:
        """The loss and what goes with it, as short as a column: `0.0123 / 97.1 %`, `0.034 / 0.991`."""
        worst = self.worst
        other = f"{worst.cosine:.3f}" if worst.agreement is None else percent(worst.agreement)
        return f"{self.loss:.3g} / {other}"

    def __str__(self) -> str:
        worst = self.worst
        name = f" ({worst.name})" if len(self.outputs) > 1 or worst.name != ALONE else ""
        if worst.divergence is None:
            return f"relative error {worst.relative_error:.3g}{name}, cosine {worst.cosine:.3f}"
        of = "examples" if worst.samples == self.examples else "positions"
        share = percent(worst.agreement)
        return f"KL {worst.divergence:.3g}{name}, agrees on {share} of {worst.samples:,} {of}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON; an infinite number is the text `inf`."""
        found: dict[str, Any] = _form().dump_python(self, mode="json")
        return found

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Fidelity:
        """Return what `to_dict` was called on.

        Raises:
            ValueError: a value is missing or of another type.
        """
        return _form().validate_python(values)


@cache
def _form() -> TypeAdapter[Fidelity]:
    return TypeAdapter(Fidelity)


@of_plain_models
def fidelity(
    model: nn.Module, other: nn.Module, batches: Iterable[Batch], *, inputs: Inputs | None = None
) -> Fidelity:
    """Measure how far a network is from the one that it was made of; no labels are needed.

    Both run in evaluation mode without gradients, and are left as they were: modes, buffers and the random
    generators. With several processes (`base.ranks`) each runs its share, and all get the same.

    Logits are: an output whose name ends in `logits`; the one output of a plain module where it is (N, C) of
    two classes or more, unless the batch's target is floating; the one output (N, C, H, W) or (N, T, C)
    with whole numbers (N, H, W) or (N, T) as target. What is at least 0 and sums to 1 over the classes is
    taken as probabilities.

    Args:
        model: the dense network.
        other: the network to compare, with outputs of the same names and shapes.
        batches: tensors, (inputs, target) pairs or mappings, as both take them. The target only helps to
            tell logits. For an honest figure, examples that nothing was fitted on.
        inputs: as in `prune`.

    Raises:
        DataError: there are no batches, or a network fails on one; the outputs hold no floating tensor, or
            differ in names or shapes; the dense network gives something else in a second run.
        SignalError: an output of the dense network holds NaN, or an infinity that the other one does not have
            at the same place. In the other one that is an infinite distance.
        RankError: another process failed, is gone, or has other weights or batches.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> print(fidelity(net, net, [torch.randn(16, 4)]))
        KL 0, agrees on 100.00 % of 16 examples
    """
    found = _compared(model, other, read(model, batches, inputs), partly=False)
    assert found is not None
    return found


def comparable(model: nn.Module, other: nn.Module, batches: Iterable[Batch]) -> Fidelity | None:
    """Return the fidelity of those outputs that have the same shape in both; None where no output has.

    A cut may narrow an inner state that a network gives out. Arguments and errors are those of `fidelity`.
    """
    return _compared(model, other, batches, partly=True)


def _compared(model: nn.Module, other: nn.Module, batches: Iterable[Batch], partly: bool) -> Fidelity | None:
    passed("fidelity", model=model, other=other)
    here, seen, sums, examples = world(), hashlib.sha256(), dict[str, _Sums](), 0
    with ExitStack() as stack, torch.no_grad():
        for net in dict.fromkeys((model, other)):
            stack.enter_context(unchanged(net))
            stack.enter_context(buffers_kept(net))
            net.eval()
        stack.enter_context(here.together(ASKED, seen.hexdigest))
        if here.size > 1:
            for net in (model, other):
                seen.update(digest("", named_tensors(net)).encode())
        for number, batch in enumerate(again(batches)):
            examples += batch_size(batch)
            if here.size > 1:
                seen.update(told_apart(batch).encode())
            # All processes run the first batch, so that all know what there is to be compared.
            if number and not here.mine(number):
                continue
            dense = named_outputs(model, batch)
            if not number:
                _check_same(model, dense, named_outputs(model, batch))
            found = named_outputs(other, batch)
            if not number:
                sums = begin_sums(dense, found, batch, partly)
                if not sums:
                    return None
            if here.mine(number):
                add_outputs(sums, dense, found, batch, partly)
    if not examples:
        raise DataError(ASKED, "the batches are empty", "Pass batches of examples that nothing was fitted on")
    return Fidelity(examples, tuple(item.distance(name) for name, item in sums.items()))


def check_repeats(model: nn.Module, batch: Batch) -> None:
    """Raise a DataError where a second run gives something else: then no distance means anything."""
    with unchanged(model), buffers_kept(model), torch.no_grad():
        model.eval()
        _check_same(model, named_outputs(model, batch), named_outputs(model, batch))


def named_outputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the floating tensors that a model gives for a batch, by their names, in their order."""
    kept, device = list[Any](), device_of(model)

    def run(batch: Batch) -> None:
        args, kwargs = model_inputs(batch)
        kept.append(model(*args, **kwargs))

    # A copy: a forward may write into its input.
    forward(model, map_tensors(batch, lambda item: item.to(device, copy=True)), run)
    found = dict(_named(kept[0]))
    if not found:
        raise DataError(
            ASKED, f"{type(model).__name__} gives {type(kept[0]).__name__} without a floating tensor",
            "Compare networks that give tensors: logits, embeddings or maps",
        )  # fmt: skip
    return found


def _named(output: Any) -> Iterator[tuple[str, Tensor]]:
    leaves, _ = tree_flatten_with_path(output)
    for path, leaf in leaves:
        parts = names_along(path)
        if not isinstance(leaf, Tensor):  # an object that torch cannot take apart
            leaf, parts = getattr(leaf, "logits", None), [*parts, "logits"]
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
            yield ".".join(parts) or ALONE, leaf.detach()


def _check_same(model: nn.Module, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Raise a DataError where a second run gives something else: then no distance means anything."""
    for name, one in first.items():
        other = second.get(name)
        if other is None or other.shape != one.shape:
            apart = math.inf
        else:
            # In the largest value, which no rounding of small ones moves. NaN is another error.
            apart = float(torch.nan_to_num((one - other).abs().max() / one.abs().max().clamp(min=1e-30)))
        if apart > max(SAME if one.device.type == "cpu" else SAME_THERE, 4 * torch.finfo(one.dtype).eps):
            raise DataError(
                f"{ASKED} from {type(model).__name__}",
                f"{name!r} is {apart:.1e} apart in two runs on the same examples in evaluation mode",
                "Call only what eval() switches off (nn.Dropout, not functional.dropout without "
                "training=self.training), and draw nothing at random in forward",
            )


def begin_sums(
    dense: Mapping[str, Tensor], found: Mapping[str, Tensor], batch: Batch, partly: bool
) -> dict[str, _Sums]:
    """Return empty sums for the outputs that can be compared, as the first batch shows them."""
    sums = {}
    for name, item in dense.items():
        if partly and (name not in found or found[name].shape != item.shape):
            continue
        kind, mask = _kind(name, item, batch, len(dense) == 1), _mask(name, item, batch)
        sums[name] = _Sums(kind, _rows(item, mask).shape[1])
    return sums


def add_outputs(
    sums: Mapping[str, _Sums], dense: Mapping[str, Tensor], found: Mapping[str, Tensor], batch: Batch,
    partly: bool,
) -> None:  # fmt: skip
    """Add the outputs of a batch.

    Raises:
        DataError: names or shapes of the two differ.
        SignalError: the dense network's are not finite.
    """
    if not partly and dense.keys() != found.keys():
        name = sorted(dense.keys() ^ found.keys())[0]
        raise DataError(
            ASKED, f"the output {name!r} is given by one of the two alone",
            "Compare networks with the same outputs",
        )  # fmt: skip
    for name, item in sums.items():
        one, other = dense.get(name), found.get(name)
        shapes = [None if value is None else tuple(value.shape) for value in (one, other)]
        if one is None or other is None or shapes[0] != shapes[1]:
            raise DataError(
                ASKED, f"the output {name!r} is {shapes[0]} in the dense network, {shapes[1]} in the other",
                "Compare networks whose outputs have the same shapes: one cut with `residual` may give "
                "narrower inner states",
            )  # fmt: skip
        mask, other = _mask(name, one, batch), other.to(one.device)
        # A network that rules classes out gives minus infinity for them: in both the same, it is no distance.
        ruled_out = torch.isinf(one) & (one == other)
        rows = _rows(one.masked_fill(ruled_out, 0), mask)
        if rows.shape[1] != item.features:
            raise DataError(
                ASKED,
                f"the output {name!r} has {item.features} features in one batch, {rows.shape[1]} in another",
                "Pass batches whose examples have one shape",
            )  # fmt: skip
        if not torch.isfinite(rows).all():
            raise SignalError(
                ASKED, f"the output {name!r} of the dense network holds NaN or infinity",
                "Look for the batch and the layer that overflow, or run the network in a wider type",
            )  # fmt: skip
        item.add(rows, _rows(other.masked_fill(ruled_out, 0), mask))
        if item.kind is not None:
            item.decide(*(_classes(value, mask, item.kind) for value in (one, other)))


LOGITS, PROBABILITIES, POSITIONS = "logits", "probabilities", "positions"


def _kind(name: str, output: Tensor, batch: Batch, alone: bool) -> str | None:
    """Say what the classes of an output are: of logits, probabilities or positions (T); None for none."""
    last = name.rpartition(".")[2]
    if _per_token(output, batch):
        # Of (N, T) values, those of a question's answer choose among the tokens.
        return POSITIONS if last.endswith("_logits") else None
    classes = _rows(output, None)
    if output.ndim < 2 or classes.shape[1] < 2:
        return None
    if (classes >= 0).all() and ((classes.double().sum(1) - 1).abs() < 1e-2).all():
        return PROBABILITIES
    if last.endswith("logits"):
        return LOGITS
    if not alone or name != ALONE:
        return None
    target = batch_target(batch)
    if output.ndim == 2:
        return None if isinstance(target, Tensor) and target.is_floating_point() else LOGITS
    if not isinstance(target, Tensor) or target.is_floating_point():
        return None
    places = output.shape[:2] if output.ndim == 3 else (output.shape[0], *output.shape[2:])
    return LOGITS if target.shape == places else None


def _mask(name: str, output: Tensor, batch: Batch) -> Tensor | None:
    """Return which tokens of an output (N, T, C) or (N, T) count, (N, T) bool; None where all do."""
    if output.ndim not in (2, 3):
        return None
    # With an encoder and a decoder, `attention_mask` is the encoder's.
    named = by_name(batch)
    decoder = "decoder_input_ids" in named or "decoder_attention_mask" in named
    mask = named.get(f"{'decoder_' if decoder and not name.startswith('encoder') else ''}attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != output.shape[:2]:
        return None
    return mask.to(output.device) != 0


def _per_token(output: Tensor, batch: Batch) -> bool:
    mask = by_name(batch).get("attention_mask")
    return output.ndim == 2 and isinstance(mask, Tensor) and mask.shape == output.shape


def _rows(output: Tensor, mask: Tensor | None) -> Tensor:
    """Return an output as (samples, features)."""
    if mask is not None:
        chosen = output[mask]
        return chosen if output.ndim == 3 else chosen[:, None]
    if output.ndim < 2:
        return output.reshape(-1, 1)
    return output.movedim(1, -1).flatten(0, -2) if output.ndim > 3 else output.flatten(0, -2)


def _classes(output: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    """Return what the softmax goes over, (samples, classes)."""
    if kind != POSITIONS:
        return _rows(output, mask)
    return output if mask is None else output.masked_fill(~mask, -math.inf)


class _Sums:
    """The sums of one output over the samples of this process.

    Args:
        kind: of its classes, see `_kind`.
        features: C.
    """

    def __init__(self, kind: str | None, features: int) -> None:
        self.kind, self.features = kind, features
        self.samples, self.mean = 0, torch.zeros(features, dtype=torch.float64)
        # spread ‖f − mean f‖², error ‖f − f̂‖², cosine; KL, agreement, how many decisions; not finite
        self.spread = self.error = self.cosine = self.divergence = self.agreement = self.decided = 0.0
        self.broken = 0

    def add(self, dense: Tensor, other: Tensor) -> None:
        """Add the values of further samples, (samples, features) each."""
        step = max(1, PIECE // self.features)
        for one, found in zip(dense.split(step), other.split(step), strict=True):
            if not len(one):
                continue
            one, found = one.double(), found.double()
            self.broken |= int(not torch.isfinite(found).all())
            # Means and spreads of parts are put together as Chan, Golub and LeVeque (1983) do: sums of
            # squares would lose the spread of values that lie far from 0.
            mean, count = one.mean(0), len(one)
            self.spread += float((one - mean).square().sum())
            apart, whole = mean.cpu() - self.mean, self.samples + count
            self.spread += float(apart.square().sum()) * self.samples * count / whole
            self.mean += apart * (count / whole)
            self.samples = whole
            self.error += float((one - found).square().sum())
            lengths = one.norm(dim=1) * found.norm(dim=1)
            # Two vectors of zeros are the same.
            same = ((one == 0).all(1) & (found == 0).all(1)).double()
            self.cosine += float(torch.where(lengths > 0, (one * found).sum(1) / lengths, same).sum())

    def decide(self, dense: Tensor, other: Tensor) -> None:
        """Add the classes of further samples, (samples, classes) each."""
        step = max(1, PIECE // max(1, dense.shape[1]))
        for one, found in zip(dense.split(step), other.split(step), strict=True):
            self.agreement += float((one.argmax(1) == found.argmax(1)).sum())
            log_p, log_q = (_log_probabilities(item, self.kind) for item in (one, found))
            p = log_p.exp()
            # Where p is 0 there is nothing to be said of it: 0 ln 0 = 0.
            self.divergence += float(torch.where(p > 0, p * (log_p - log_q), 0.0).sum())
            self.decided += len(one)

    def distance(self, name: str) -> Distance:
        """Return the distance over the samples of all processes."""
        total = world().total
        samples = int(total(torch.tensor(self.samples)))
        if not samples:
            raise DataError(ASKED, f"no position of {name!r} counts", "Pass batches that are not all padding")
        mean = total(self.mean * self.samples) / samples
        spread = self.spread + self.samples * float((self.mean - mean).square().sum())
        scale = self.spread + self.samples * float(self.mean.square().sum())
        parts = [
            *(spread, scale, self.error, self.cosine, self.divergence, self.agreement, self.decided),
            float(self.broken),
        ]
        spread, scale, error, cosine, divergence, agreement, decided, broken = total(
            torch.nan_to_num(torch.tensor(parts, dtype=torch.float64))
        ).tolist()
        relative = _ratio(error, spread if spread > 1e-24 * scale else scale)
        kind = self.kind
        return Distance(
            name, samples, math.inf if broken else relative, 0.0 if broken else cosine / samples,
            None if kind is None else math.inf if broken else max(0.0, divergence / decided),
            None if kind is None else agreement / decided,
        )  # fmt: skip


def _ratio(error: float, scale: float) -> float:
    return error / scale if scale else math.inf if error else 0.0


def _log_probabilities(classes: Tensor, kind: str | None) -> Tensor:
    classes = classes.double()
    if kind == PROBABILITIES:
        # A softmax in a short type gives 0 where the log would be -100 or so, not minus infinity.
        return classes.clamp(min=torch.finfo(torch.float32).tiny).log()
    return classes.log_softmax(1)
