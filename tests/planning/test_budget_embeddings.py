"""Which parameters count as embeddings: rows are picked from them, or they are as large an output layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cria_prune import discover
from cria_prune.planning.budget import Budget
from cria_prune.structure.groups import shrink


class Words(nn.Module):
    """Tokens and positions, one hidden layer as wide as the vocabulary is long, an output of any size."""

    def __init__(self, out: int = 11, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.places = nn.Embedding(9, 6)
        self.wide = nn.Linear(6, 11, bias=False)
        self.back = nn.Linear(11, 6)
        self.head = nn.Linear(6, out)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(hidden + self.back(torch.relu(self.wide(hidden))))


IDS = torch.randint(0, 11, (2, 5))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Words(), ("tokens.weight", "places.weight", "head.weight")),
        (Words(tied=True), ("tokens.weight", "places.weight")),
        (Words(out=9), ("tokens.weight", "places.weight")),
        (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6)), ()),
    ],
)
def test_what_counts_as_an_embedding(model: nn.Module, names: tuple[str, ...]) -> None:
    groups = discover(model, IDS if isinstance(model, Words) else torch.randn(2, 6))
    assert groups.embeddings == names
    assert shrink(groups, {groups.prunable[-1].name: [0]}).embeddings == names
    sizes = {name: item.numel() for name, item in model.named_parameters()}
    assert Budget(groups, "non-embedding").total == sum(sizes.values()) - sum(sizes[name] for name in names)
