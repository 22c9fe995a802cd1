"""What a server loads of a pruned folder: which units may leave, and in which numbers.

    ===============  ================================================================================
    server           what it takes, beside what a plain configuration can hold
    ===============  ================================================================================
    llama.cpp        neurons, in multiples of 32, which its quantised blocks need; heads of Llama,
                     Mistral and Granite alone, whose head size it reads
    vllm             neurons; heads, but for Qwen2, whose head size it takes from the width; heads, KV
                     heads and neurons have to divide by the tensor-parallel size
    transformers4    neurons; heads of the families whose head size version 4 reads from the
                     configuration, or always had in it
    ===============  ================================================================================

The residual width stays for all of them. The table was read from the sources of the servers; no server runs
here. What is not in it is taken to be refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from cria_prune.base.errors import StructureError
from cria_prune.config import PlanConfig
from cria_prune.structure.groups import UnitGroup, UnitGroups, freeze

BLOCK = 32
"""Numbers of a row that llama.cpp quantises together."""
HEADED: Mapping[str, tuple[str, ...]] = {
    "llama.cpp": ("llama", "mistral", "granite"),
    "vllm": ("llama", "mistral", "granite", "qwen3", "gemma", "gemma2", "gemma3_text"),
    "transformers4": (
        *("llama", "mistral", "granite", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"),
        *("smollm3", "olmo2", "t5"),
    ),
}
"""Server -> the families whose heads may leave: it reads their size, and does not divide the width."""
HEADS = ("head", "kv group")
NEURONS = ("neuron", "gated")


def served(
    model: nn.Module, groups: UnitGroups, allowed: Mapping[str, tuple[int, ...]], config: PlanConfig
) -> tuple[UnitGroups, dict[str, tuple[int, ...]]]:
    """Freeze what a server does not load, and leave the numbers of units that it takes.

    Args:
        model: of transformers; only its configuration is looked at.
        groups: its structure, with what a plain configuration cannot hold frozen.
        allowed: group name -> numbers of units that such a configuration can hold.
        config: `serve` and `tensor_parallel` are used.

    Raises:
        StructureError: the numbers of units of the model itself do not divide by the tensor-parallel size.
    """
    server, size = config.serve, config.tensor_parallel
    family = str(getattr(getattr(model, "config", None), "model_type", ""))
    shared = size if server == "vllm" else 1

    def reason(group: UnitGroup) -> str | None:
        if group.kind in HEADS and family not in HEADED[server]:
            return f"{server} does not read the head size of a {family or type(model).__name__}"
        if group.kind not in (*HEADS, *NEURONS):
            return f"{server} loads fewer neurons and heads, and no fewer {group.kind}s"
        return None

    groups = freeze(groups, reason)
    found = dict(allowed)
    for group in groups.prunable:
        step = shared if group.kind in HEADS or server != "llama.cpp" else BLOCK
        if step == 1:
            continue
        if group.size % shared:
            raise StructureError(
                f"A folder for vllm on {size} devices", f"{group.name} has {group.size} units",
                "Name a tensor-parallel size that divides its heads, KV heads and neurons",
            )  # fmt: skip
        numbers = found.get(group.name, tuple(range(step, group.size, step)))
        found[group.name] = tuple(sorted({group.size, *(item for item in numbers if item % step == 0)}))
    alone = {name for name, numbers in found.items() if len(numbers) == 1}
    text = f"{server} takes no smaller number of its units"
    groups = freeze(groups, lambda group: text if group.name in alone and group.size > 1 else None)
    return groups, {name: numbers for name, numbers in found.items() if name not in alone}


def checked_for(config: PlanConfig, model: nn.Module) -> str:
    """Say in a sentence what a plan was restricted to for a server; empty where it was not."""
    if config.serve == "any":
        return ""
    family = str(getattr(getattr(model, "config", None), "model_type", ""))
    what = "neurons and heads" if family in HEADED[config.serve] else "neurons alone"
    more = {
        "llama.cpp": f", neurons in multiples of {BLOCK}",
        "vllm": f", in multiples of the tensor-parallel size {config.tensor_parallel}",
    }.get(config.serve, "")
    return f"cut for {config.serve}: {what}{more}, by what its source reads; it was not run"
