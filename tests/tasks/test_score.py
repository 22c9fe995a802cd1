"""Every metric against a second oracle: scikit-learn, scipy, or the definition written out."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cria_prune.tasks import score

metrics = pytest.importorskip("sklearn.metrics")


class Fixed(nn.Module):
    """Gives back what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=x)


def batches(logits: Tensor, labels: Tensor, **more: Tensor) -> Iterable[dict[str, Tensor]]:
    return [
        {"x": one, "labels": other, **{key: value[at::2] for key, value in more.items()}}
        for at, (one, other) in enumerate(((logits[0::2], labels[0::2]), (logits[1::2], labels[1::2])))
    ]


def measure(name: str, config: Any, *given: Tensor) -> dict[str, float]:
    encoder: Any = SimpleNamespace(config=config)
    found: dict[str, float] = getattr(score, name)(encoder, Fixed(), batches(*given), None)
    return found


def test_classes_and_scores() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 3, generator=draw), torch.randint(3, (40,), generator=draw)
    found, said = measure("classified", None, logits, labels), logits.argmax(1)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, said))
    assert found["f1"] == pytest.approx(metrics.f1_score(labels, said, average="macro"))
    many = torch.randint(2, (40, 3), generator=draw).float()
    found = measure("several", None, logits, many)
    assert found["f1"] == pytest.approx(metrics.f1_score(many, logits > 0, average="micro"))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(many, logits > 0))
    values = torch.randn(40, generator=draw)
    found = measure("correlated", None, logits[:, :1], values)
    one, two = logits[:, 0].argsort().argsort(), values.argsort().argsort()
    assert found["spearman"] == pytest.approx(np.corrcoef(one, two)[0, 1])
    assert found["pearson"] == pytest.approx(np.corrcoef(logits[:, 0], values)[0, 1], rel=1e-5)
    assert measure("correlated", None, logits[:, :1] * 0, values) == {"spearman": 0.0, "pearson": 0.0}


def test_maps() -> None:
    draw = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(6, 3, 4, 4, generator=draw), torch.randint(3, (6, 4, 4), generator=draw)
    labels[0, 0] = 255
    config = SimpleNamespace(num_labels=3, semantic_loss_ignore_index=255)
    seen = labels != 255
    expected = metrics.jaccard_score(labels[seen], logits.argmax(1)[seen], average="macro")
    assert measure("mapped", config, logits, labels)["mean-iou"] == pytest.approx(expected)


def test_spans_of_tags() -> None:
    """The example of seqeval's own page, and the spans of conlleval."""
    right = ["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O", "B-PER", "I-PER"]
    found = ["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O", "B-PER", "I-PER"]
    assert score.spans(right) & score.spans(found) == {("PER", 7, 9)}
    names = dict(enumerate(dict.fromkeys(right + found)))
    number = {name: place for place, name in names.items()}
    labels = torch.tensor([[number[tag] for tag in right] + [-100]])
    logits = torch.eye(len(names))[torch.tensor([[number[tag] for tag in found] + [0]])] * 9
    both = torch.cat([logits, logits]), torch.cat([labels, labels])
    figures = measure("tagged", SimpleNamespace(id2label=names), *both)
    assert figures["f1"] == figures["precision"] == 0.5 and figures["accuracy"] == pytest.approx(7 / 9)
    plain = measure("tagged", SimpleNamespace(id2label={0: "A", 1: "B", 2: "C", 3: "D", 4: "E"}), *both)
    assert set(plain) == {"accuracy"}


def test_what_is_predicted() -> None:
    draw = torch.Generator().manual_seed(2)
    logits, labels = torch.randn(4, 5, 7, generator=draw), torch.randint(7, (4, 5), generator=draw)
    labels[:, 3:] = -100
    chances = logits.softmax(-1).gather(2, labels.clamp(min=0)[..., None])[:, :3]
    found = measure("predicted", None, logits, labels)["perplexity"]
    assert found == pytest.approx(float(chances.log().mean().neg().exp()))


def test_words_of_answers() -> None:
    assert score.overlap("The Sea!", "a sea") == 1 and score.overlap("", "") == 1 == 1 - score.overlap(
        "a b", ""
    )
    assert score.distance([], ["a"]) == score.distance(["a"], []) == 1 and score.distance(["a"], ["a"]) == 0
