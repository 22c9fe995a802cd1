"""Networks of kinds that came up late: adapters, size assertions, one expert, training that needs targets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cria_prune import PruneConfig, discover, prune
from cria_prune.base.errors import DataError, TargetError


class Adapted(nn.Module):
    """A frozen layer and a trained update of low rank, as peft wraps it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, outputs, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2.0 * self.lora_B["default"](self.lora_A["default"](x))


def test_adapters_are_pruned_with_their_layers_and_a_refusal_names_how_to_merge_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Adapted(6, 16), nn.ReLU(), Adapted(16, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    groups = discover(net, torch.randn(2, 6))
    assert {group.name for group in groups.prunable} == {
        "0.base_layer", "0.lora_A.default", "2.base_layer", "2.lora_A.default"
    }  # fmt: skip
    with pytest.raises(TargetError, match=r"merged into the weights first: model = model\.merge_and_unload"):
        prune(net, [torch.randn(8, 6) for _ in range(3)], PruneConfig(plan={"reduction": 0.99}))


class Judged(nn.Module):
    """Gives a loss in training."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        out = self.down(torch.relu(self.up(x)))
        return functional.cross_entropy(out, y) if self.training else out


def test_a_forward_that_needs_targets_says_how_to_give_them_and_bad_examples_are_numbered() -> None:
    torch.manual_seed(0)
    net, x = Judged().eval(), torch.randn(4, 6)
    (note,) = discover(net, x).notes
    assert "training mode is not tried" in note and "examples=[{...}]" in note
    with_targets = {"x": x, "y": torch.tensor([0, 1, 2, 0])}
    assert not discover(net, x, examples=[with_targets]).notes
    bad = {
        "words": "A batch for the model, further example 2 of 2: found str",
        torch.randn(4, 7): r"further example 2 of 2: RuntimeError: mat1 and mat2",
        torch.tensor(1.0): "further example 2 of 2: found Tensor",
    }
    for example, text in bad.items():
        with pytest.raises(DataError, match=text):
            discover(net, x, examples=[with_targets, example])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"example 1 of 1: of its keys \(w\) the forward takes none"):
        discover(net, x, examples=[{"w": torch.zeros(4)}])


def test_one_expert_alone_is_pruned() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=1, num_experts_per_tok=1,
    )  # fmt: skip
    groups = discover(transformers.MixtralForCausalLM(config).eval(), {"input_ids": torch.ones(2, 4).long()})
    (experts,) = [group for group in groups.prunable if group.name.endswith("mlp.experts")]
    assert experts.size == 24
