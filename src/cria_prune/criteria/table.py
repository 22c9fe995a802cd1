"""The table of criteria: where each comes from, what it needs and what it reads; and how to add one's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Literal

import torch
from torch import Tensor

from cria_prune.base.errors import CriaError, CriterionError, said
from cria_prune.config import SETTINGS, ScoreConfig, Setting
from cria_prune.criteria import baselines, spectral
from cria_prune.criteria.evidence import Evidence, Sizes, Steps
from cria_prune.recording.states import EVERYTHING, Read
from cria_prune.spectrum.importance import Importance

Need = Literal["states", "gradients", "examples"] | Read
NEEDS = frozenset({"states", "gradients", "examples"}) | EVERYTHING
PEERS = "tp-"
"""How the names of Torch-Pruning's importances begin in a bench."""

Function = Callable[[Evidence, ScoreConfig], Importance]
Memory = Callable[[Sizes, ScoreConfig], Steps]
OwnFunction = Callable[[Evidence, ScoreConfig], Tensor | Importance]


def _takes(*sides: Literal["producers", "consumers"], then: Memory | None = None) -> Memory:
    """Return the bytes of a criterion that takes norms of these weights, and then what the function says."""

    def steps(sizes: Sizes, config: ScoreConfig) -> Steps:
        return {"weights": sizes.norms(*sides), **(then(sizes, config) if then else {})}

    return steps


WEIGHTS = _takes("producers", "consumers")


@dataclass(frozen=True)
class Criterion:
    """A way to score units: high is kept.

    Attributes:
        name: key in `CRITERIA`.
        function: (evidence, config) to the importance of a group's units.
        source: where it comes from.
        needs: of the network: `states` (recorded signals, the outputs' means and variances at least), with
            them what `record` calls `reads`; `gradients` (recorded with gradients) and `examples` (recorded
            with the gradients of each example).
        summary: one line.
        reads: of the configuration: the settings of `ScoreConfig` that change its scores, beside `seed` and
            `split_half`. Others that are given to it are an error.
        memory: (sizes, config) to the bytes of its steps for a group; the norms of its weights by default.
    """

    name: str
    function: Function
    source: str
    needs: frozenset[Need]
    summary: str
    reads: frozenset[Setting] = frozenset()
    memory: Memory = WEIGHTS


_STATES: frozenset[Need] = frozenset({"states"})
_OUTPUT: frozenset[Need] = frozenset({"states", "output"})
_BOTH: frozenset[Need] = frozenset({"states", "input", "output"})
_RIDGE: frozenset[Setting] = frozenset({"ridge"})
_GROUNDED: frozenset[Setting] = frozenset({"neighbors", "pairs", "sketch"})
_WANG = "Wang 2026 (arXiv 2605.18860), after SPADE: Cheng et al., ICML 2021"

CRITERIA: dict[str, Criterion] = {
    item.name: item
    for item in (
        Criterion(
            "random",
            baselines.random,
            "control",
            frozenset(),
            "seeded random scores",
            memory=_takes(),
        ),
        Criterion(
            "l1",
            baselines.l1,
            "Li et al., ICLR 2017 (arXiv 1608.08710)",
            frozenset(),
            "L1 norm of the producers' weights",
            memory=_takes("producers"),
        ),
        Criterion(
            "l2",
            baselines.l2,
            "He et al., IJCAI 2018 (arXiv 1808.06866)",
            frozenset(),
            "L2 norm of the producers' weights",
            memory=_takes("producers"),
        ),
        Criterion(
            "group-l2",
            baselines.group_l2,
            "DepGraph's group norm, without its sparse training: Fang et al., CVPR 2023 (arXiv 2301.12900)",
            frozenset(),
            "L2 norm of the unit's producers, batch norms and consumers together",
            memory=WEIGHTS,
        ),
        Criterion(
            "activation-norm",
            baselines.activation_norm,
            "the per-unit form of Wanda: Sun et al., ICLR 2024 (arXiv 2306.11695)",
            _STATES,
            "root mean square of the output signal times the consumers' norm",
            memory=_takes("consumers"),
        ),
        Criterion(
            "wanda-sp",
            baselines.wanda_sp,
            "Wanda, Sun et al., ICLR 2024 (arXiv 2306.11695); structured by An et al. (arXiv 2312.11983)",
            _STATES,
            "mean absolute weight times root mean square, per feature that the consumers read",
            memory=_takes("consumers"),
        ),
        Criterion(
            "fluctuation",
            baselines.fluctuation,
            "FLAP's WIFV, the criterion only: An et al., AAAI 2024 (arXiv 2312.11983)",
            _STATES,
            "variance times the consumers' squared norm, per feature that the consumers read",
            memory=_takes("consumers"),
        ),
        Criterion(
            "bn-scale",
            baselines.bn_scale,
            "Network Slimming, the criterion only: Liu et al., ICCV 2017 (arXiv 1708.06519)",
            frozenset(),
            "scale of the unit's own batch norm",
            memory=_takes(),
        ),
        Criterion(
            "fpgm",
            baselines.fpgm,
            "filter pruning via geometric median: He et al., CVPR 2019 (arXiv 1811.00250)",
            frozenset(),
            "sum of the distances from the unit's weights to those of all others",
            memory=baselines.fpgm_bytes,
        ),
        Criterion(
            "lamp",
            baselines.lamp,
            "Lee et al., ICLR 2021 (arXiv 2010.07611); units in the place of weights, as Torch-Pruning does",
            frozenset(),
            "squared norm over that of all units that are as large",
            memory=_takes("producers"),
        ),
        Criterion(
            "apoz",
            baselines.apoz,
            "average percentage of zeros, its complement: Hu et al. 2016 (arXiv 1607.03250)",
            frozenset({"states", "positive"}),
            "share of the outputs that are above zero",
            memory=_takes(),
        ),
        Criterion(
            "chip",
            baselines.chip,
            "CHIP's channel independence over all samples: Sui et al., NeurIPS 2021 (arXiv 2110.13981)",
            _OUTPUT,
            "what the nuclear norm of the output signals loses with the unit",
            memory=baselines.chip_bytes,
        ),
        Criterion(
            "taylor",
            baselines.taylor,
            "Molchanov et al., CVPR 2019 (arXiv 1906.10771), group form",
            frozenset({"states", "gradients"}),
            "first-order effect of removal on the loss",
            memory=_takes(),
        ),
        Criterion(
            "fisher",
            baselines.fisher,
            "Theis et al. 2018 (arXiv 1801.05787); group form: Liu et al., ICML 2021 (arXiv 2108.00708)",
            frozenset({"states", "gradients", "examples"}),
            "diagonal Fisher information of the unit's gate, per example",
            memory=_takes(),
        ),
        Criterion(
            "distortion",
            spectral.distortion,
            _WANG,
            _BOTH,
            "spectral distortion between the two graphs",
            _GROUNDED | _RIDGE,
            memory=_takes(then=spectral.distortion_bytes),
        ),
        Criterion(
            "distortion-weighted",
            spectral.distortion_weighted,
            f"{_WANG}; the consumers' factor is Cria's",
            _BOTH,
            "spectral distortion times the consumers' squared norm",
            _GROUNDED | _RIDGE,
            memory=_takes("consumers", then=spectral.distortion_bytes),
        ),
        Criterion(
            "consumed-distortion",
            spectral.consumed_distortion,
            f"{_WANG}; the consumers' factor in the output graph is Cria's",
            _BOTH,
            "spectral distortion between the graph before the layer and that of what the consumers take",
            _GROUNDED | _RIDGE,
            memory=_takes("consumers", then=spectral.consumed_bytes),
        ),
        Criterion(
            "grounded-distortion",
            spectral.grounded_distortion,
            "Cria, docs/method.md section 3",
            _BOTH,
            "spectral distance to the removed neuron times the consumers' squared norm",
            _GROUNDED,
            memory=_takes("consumers", then=spectral.distortion_bytes),
        ),
        Criterion(
            "innovation",
            spectral.innovation,
            "Cria, docs/method.md section 3; after the optimal brain surgeon, Hassibi and Stork, NIPS 1992",
            _OUTPUT,
            "what neighbours cannot predict, times the consumers' squared norm",
            _RIDGE,
            memory=_takes("consumers", then=spectral.innovation_bytes),
        ),
        Criterion(
            "innovation-magnitude",
            spectral.innovation_magnitude,
            "Cria; the norm is DepGraph's, Fang et al., CVPR 2023 (arXiv 2301.12900)",
            _OUTPUT,
            "mean rank of innovation and of the group's L2 norm",
            _RIDGE,
            memory=_takes("producers", "consumers", then=spectral.innovation_bytes),
        ),
    )
}

BUILT_IN = frozenset(CRITERIA)


def register_criterion(
    name: str,
    function: OwnFunction,
    *,
    needs: Iterable[Need] = (),
    reads: Iterable[Setting] = (),
    source: str = "",
    summary: str = "",
    memory: Memory = WEIGHTS,
) -> Criterion:
    """Add a criterion of one's own to `CRITERIA`: it then works wherever the name of a criterion does.

    That is in `prune`, `score` and their kin, in the suites of the bench, in the ablation and in
    `SpectralImportance`, with several processes once each of them has registered it.

    Args:
        name: letters, digits, `.`, `_` and `-`; it is part of file names.
        function: (evidence, config) to the scores of one group, (units,) finite, high for the units to keep;
            a plain tensor, or an `Importance` with a diagnosis. Rankings other than `uniform` want them not
            negative. The `Evidence` holds the group's weights and what was recorded of it.
        needs: what has to be recorded of the network: `states` for the outputs' means and variances, `input`
            and `output` for the second moments of the units of that side, `positive` for the share of the
            outputs above 0, `gradients` and `examples` for what `taylor` and `fisher` read. Nothing where the
            weights are enough. The others come with what is named.
        reads: the settings of `ScoreConfig` that the function uses: `neighbors`, `ridge`, `pairs`, `sketch`.
            One that is given and not read is an error; `seed` and `split_half` are everyone's.
        source: where it comes from.
        summary: one line; that of the function's docstring by default.
        memory: (sizes, config) to step -> bytes that it takes for one group beyond what is recorded, for
            `predict_memory`; the norms of the group's weights by default.

    Returns:
        The row of the table; `unregister_criterion` removes it.

    Raises:
        CriterionError: the name is taken or no name, or there is no such need or setting. When it scores: the
            function returned something else than one finite number for each unit.

    Example:
        The units whose output varies most, weighed with what their consumers make of it:

        >>> import torch
        >>> from torch import nn
        >>> from cria_prune import PruneConfig, prune, register_criterion
        >>> def swing(evidence, config):
        ...     return evidence.output_side().variance * evidence.weights.consumer_norm2
        >>> register_criterion("swing", swing, needs={"states"}).needs
        frozenset({'states'})
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> config = PruneConfig(score={"criterion": "swing"}, plan={"reduction": 0.5, "rounds": 1})
        >>> prune(net, [torch.randn(32, 4) for _ in range(4)], config).model[0].out_features
        7

        >>> from cria_prune.criteria.table import unregister_criterion
        >>> unregister_criterion("swing")
    """
    asked = f"Registering the criterion {name!r}"
    if not callable(function):
        raise CriterionError(asked, f"its function is {function!r}", "Give a function of (evidence, config)")
    plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, flags=re.ASCII)
    if not plain or name.startswith(PEERS):
        raise CriterionError(
            asked, "it is no name for one",
            f"Use letters, digits, '.', '_' and '-', and another beginning than {PEERS!r}",
        )  # fmt: skip
    if name in CRITERIA:
        raise CriterionError(asked, "there is one of that name", "Choose another name, or unregister it")
    for what, given in (("needs", needs), ("reads", reads)):
        if isinstance(given, str):
            raise CriterionError(asked, f"its {what} are the text {given!r}", f"Give a set: {{{given!r}}}")
    needed, read = frozenset(needs), frozenset(reads)
    for what, found, known in (("needs", needed, NEEDS), ("reads", read, frozenset(SETTINGS))):
        if not found <= known:
            wrong = ", ".join(map(repr, sorted(found - known, key=str)))
            raise CriterionError(asked, f"found {what} {wrong}", f"Choose from {', '.join(sorted(known))}")
    if needed:
        needed |= {"states"}
    if "examples" in needed:
        needed |= {"gradients"}
    line = summary or (function.__doc__ or "").strip().partition("\n")[0]
    criterion = Criterion(name, _checked(name, function), source, needed, line, read, memory)
    CRITERIA[name] = criterion
    return criterion


def unregister_criterion(name: str) -> None:
    """Remove a criterion that was registered.

    Raises:
        CriterionError: there is none of that name, or it is Cria's own.
    """
    if name in BUILT_IN or name not in CRITERIA:
        raise CriterionError(
            f"Removing the criterion {name!r}",
            "it is Cria's own" if name in BUILT_IN else "there is none of that name",
            f"Registered are: {', '.join(key for key in CRITERIA if key not in BUILT_IN) or 'none'}",
        )
    del CRITERIA[name]


def _checked(name: str, function: OwnFunction) -> Function:
    """Return the function with its answer checked, and a plain tensor made an importance."""

    @wraps(function)
    def scored(evidence: Evidence, config: ScoreConfig) -> Importance:
        try:
            found = function(evidence, config)
        except CriaError:
            raise
        except Exception as error:  # the user's code
            raise CriterionError(
                f"The criterion {name!r} for group {evidence.name!r}",
                f"its function stops with {said(error)}",
                "Mend the function; it gets (evidence, config)",
            ) from error  # fmt: skip
        values = found.scores if isinstance(found, Importance) else found
        wrong = None
        if not isinstance(values, Tensor) or values.is_complex():
            kind = "complex numbers" if isinstance(values, Tensor) else type(values).__name__
            wrong = f"it returned {kind}"
        elif values.shape != (evidence.units,):
            wrong = f"it returned scores of shape {tuple(values.shape)}"
        elif not torch.isfinite(values).all():
            wrong = f"{int((~torch.isfinite(values)).sum())} of its scores are NaN or infinite"
        if wrong is not None:
            raise CriterionError(
                f"The criterion {name!r} for group {evidence.name!r}", wrong,
                f"Return one finite score for each unit, a tensor ({evidence.units},)",
            )  # fmt: skip
        return found if isinstance(found, Importance) else baselines.plain(values)

    return scored
