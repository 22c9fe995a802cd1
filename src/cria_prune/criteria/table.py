"""The table of criteria: where each comes from and what it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cria_prune.config import ScoreConfig
from cria_prune.criteria import baselines, spectral
from cria_prune.criteria.evidence import Evidence
from cria_prune.record.states import Read
from cria_prune.spectrum import Importance

Need = Literal["states", "gradients", "examples"] | Read


@dataclass(frozen=True)
class Criterion:
    """A way to score units: high is kept.

    Attributes:
        name: key in `CRITERIA`.
        function: (evidence, config) to the importance of a group's units.
        source: where it comes from.
        needs: `states` (recorded signals, the outputs' means and variances at least), with them what
            `record` calls `reads`; `gradients` (recorded with gradients) and `examples` (recorded with the
            gradients of each example).
        summary: one line.
    """

    name: str
    function: Callable[[Evidence, ScoreConfig], Importance]
    source: str
    needs: frozenset[Need]
    summary: str


_STATES: frozenset[Need] = frozenset({"states"})
_OUTPUT: frozenset[Need] = frozenset({"states", "output"})
_BOTH: frozenset[Need] = frozenset({"states", "input", "output"})
_WANG = "Wang 2026 (arXiv 2605.18860), after SPADE: Cheng et al., ICML 2021"

CRITERIA: dict[str, Criterion] = {
    item.name: item
    for item in (
        Criterion("random", baselines.random, "control", frozenset(), "seeded random scores"),
        Criterion(
            "l1",
            baselines.l1,
            "Li et al., ICLR 2017 (arXiv 1608.08710)",
            frozenset(),
            "L1 norm of the producers' weights",
        ),
        Criterion(
            "l2",
            baselines.l2,
            "He et al., IJCAI 2018 (arXiv 1808.06866)",
            frozenset(),
            "L2 norm of the producers' weights",
        ),
        Criterion(
            "group-l2",
            baselines.group_l2,
            "DepGraph's group norm, without its sparse training: Fang et al., CVPR 2023 (arXiv 2301.12900)",
            frozenset(),
            "L2 norm of the unit's producers, batch norms and consumers together",
        ),
        Criterion(
            "activation-norm",
            baselines.activation_norm,
            "the per-unit form of Wanda: Sun et al., ICLR 2024 (arXiv 2306.11695)",
            _STATES,
            "root mean square of the output signal times the consumers' norm",
        ),
        Criterion(
            "wanda-sp",
            baselines.wanda_sp,
            "Wanda, Sun et al., ICLR 2024 (arXiv 2306.11695); structured by An et al. (arXiv 2312.11983)",
            _STATES,
            "mean absolute weight times root mean square, per feature that the consumers read",
        ),
        Criterion(
            "fluctuation",
            baselines.fluctuation,
            "FLAP's WIFV, the criterion only: An et al., AAAI 2024 (arXiv 2312.11983)",
            _STATES,
            "variance times the consumers' squared norm, per feature that the consumers read",
        ),
        Criterion(
            "bn-scale",
            baselines.bn_scale,
            "Network Slimming, the criterion only: Liu et al., ICCV 2017 (arXiv 1708.06519)",
            frozenset(),
            "scale of the unit's own batch norm",
        ),
        Criterion(
            "fpgm",
            baselines.fpgm,
            "filter pruning via geometric median: He et al., CVPR 2019 (arXiv 1811.00250)",
            frozenset(),
            "sum of the distances from the unit's weights to those of all others",
        ),
        Criterion(
            "lamp",
            baselines.lamp,
            "Lee et al., ICLR 2021 (arXiv 2010.07611); units in the place of weights, as Torch-Pruning does",
            frozenset(),
            "squared norm over that of all units that are as large",
        ),
        Criterion(
            "apoz",
            baselines.apoz,
            "average percentage of zeros, its complement: Hu et al. 2016 (arXiv 1607.03250)",
            frozenset({"states", "positive"}),
            "share of the outputs that are above zero",
        ),
        Criterion(
            "chip",
            baselines.chip,
            "CHIP's channel independence over all samples: Sui et al., NeurIPS 2021 (arXiv 2110.13981)",
            _OUTPUT,
            "what the nuclear norm of the output signals loses with the unit",
        ),
        Criterion(
            "taylor",
            baselines.taylor,
            "Molchanov et al., CVPR 2019 (arXiv 1906.10771), group form",
            frozenset({"states", "gradients"}),
            "first-order effect of removal on the loss",
        ),
        Criterion(
            "fisher",
            baselines.fisher,
            "Theis et al. 2018 (arXiv 1801.05787); group form: Liu et al., ICML 2021 (arXiv 2108.00708)",
            frozenset({"states", "gradients", "examples"}),
            "diagonal Fisher information of the unit's gate, per example",
        ),
        Criterion(
            "distortion", spectral.distortion, _WANG, _BOTH, "spectral distortion between the two graphs"
        ),
        Criterion(
            "distortion-weighted",
            spectral.distortion_weighted,
            f"{_WANG}; the consumers' factor is Cria's",
            _BOTH,
            "spectral distortion times the consumers' squared norm",
        ),
        Criterion(
            "consumed-distortion",
            spectral.consumed_distortion,
            f"{_WANG}; the consumers' factor in the output graph is Cria's",
            _BOTH,
            "spectral distortion between the graph before the layer and that of what the consumers take",
        ),
        Criterion(
            "grounded-distortion",
            spectral.grounded_distortion,
            "Cria, docs/method.md section 3",
            _BOTH,
            "spectral distance to the removed neuron times the consumers' squared norm",
        ),
        Criterion(
            "innovation",
            spectral.innovation,
            "Cria, docs/method.md section 3; after the optimal brain surgeon, Hassibi and Stork, NIPS 1992",
            _OUTPUT,
            "what neighbours cannot predict, times the consumers' squared norm",
        ),
        Criterion(
            "innovation-magnitude",
            spectral.innovation_magnitude,
            "Cria; the norm is DepGraph's, Fang et al., CVPR 2023 (arXiv 2301.12900)",
            _OUTPUT,
            "mean rank of innovation and of the group's L2 norm",
        ),
    )
}
