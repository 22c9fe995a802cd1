"""The kind of a model, its batches, and what is measured: with tiny networks of every mechanism."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cria_prune import make_batches
from cria_prune.base.batches import model_inputs
from cria_prune.base.errors import ConfigError, DataError
from cria_prune.tasks.columns import Reading
from cria_prune.tasks.folder import Texts, enough, folder_task
from cria_prune.tasks.kinds import KINDS, kind_of
from tiny import KINDS as TINY
from tiny import Tiny, model, pictures, text, tokenizer

transformers = pytest.importorskip("transformers")

TRIED = (
    *("bert, masked", "t5", "roberta, several labels", "bert, reranker", "bert, tags", "bert, answers"),
    *("bert, encoder", "vit, classes", "whisper", "wav2vec 2.0, letters", "clip, classes", "llava"),
)


def made(kind: Tiny, place: Path, **options: Any) -> Any:
    (place / "model").mkdir()
    kind.make(place / "model")
    return folder_task(place / "model", Texts(str(kind.data(place)), **options))


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind.name in TRIED], ids=lambda kind: kind.name)
def test_every_kind_has_batches_that_its_model_takes_and_a_metric(tmp_path: Path, kind: Tiny) -> None:
    task = made(kind, tmp_path)
    assert task.kind.name == kind.task and task.measured == kind.labelled
    batch = task.calibration(4)[0]
    args, kwargs = model_inputs(batch)
    assert not args and set(kwargs) <= task.encoder.takes and "labels" not in kwargs
    with torch.no_grad():
        task.model(**kwargs)
    again = task.calibration(4)[0]
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    if kind.labelled:
        value = task.evaluate(task.model, task.test_batches())
        assert value == value and task.metric not in task.further(task.model)
        loss = task.loss or (lambda network, given: network(**given).loss)
        assert torch.isfinite(loss(task.model, next(iter(task.train_batches()(0)))))


def test_the_kind_is_found_by_the_class_or_named(tmp_path: Path) -> None:
    bert = model(tmp_path, "BertForSequenceClassification", "BertConfig", num_hidden_layers=1, hidden_size=8,
                 num_attention_heads=2, intermediate_size=8, vocab_size=50)  # fmt: skip
    found = kind_of(bert)
    assert found is not None and found.name == "text-classification"
    with pytest.raises(ConfigError, match=r"Known tasks: image-text-to-text, .*fill-mask"):
        kind_of(bert, "sorcery")
    with pytest.raises(ConfigError, match="its tasks are text-classification"):
        kind_of(bert, "fill-mask")
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    other = model(tmp_path / "other", "BertForNextSentencePrediction", "BertConfig", num_hidden_layers=1,
                  hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=50)  # fmt: skip
    assert kind_of(other) is None
    with pytest.raises(
        ConfigError, match=r"a BertForNextSentencePrediction.*Known tasks.*\n.*import PruneConfig"
    ):
        folder_task(tmp_path / "other", Texts(), other)


CLASSES = next(kind for kind in TINY if kind.name == "bert, classes")


def test_several_sources_are_mixed_and_columns_named(tmp_path: Path) -> None:
    task = made(CLASSES, tmp_path)
    (tmp_path / "more.csv").write_text("say,kind\n" + "the good sea,1\n" * 20)
    other = Texts((tmp_path / "rows.jsonl",) * 2)
    assert task.count(folder_task(task.folder, other, task.model).split("train")) > 80
    asked = Texts(tmp_path / "more.csv", reading=Reading("say", "kind", max_length=4))
    named = folder_task(task.folder, asked, task.model)
    batch: Any = named.calibration(4)[0]
    assert batch["input_ids"].shape == (4, 4) and batch["labels"].tolist() == [1] * 4
    with pytest.raises(DataError, match=r"its columns are say, kind\. Name one"):
        folder_task(
            task.folder, Texts(tmp_path / "more.csv", reading=Reading("text")), task.model
        ).calibration(4)
    (tmp_path / "one.csv").write_text("text,label\nthe sea,1\n")
    with pytest.raises(DataError, match=r"found 1\. Give four at least"):
        folder_task(task.folder, Texts(tmp_path / "one.csv"), task.model).calibration(1)
    alone = folder_task(task.folder, Texts(text=tmp_path / "one.csv"), task.model)
    assert len(alone.split("test")) == 1 and alone.measured
    with pytest.raises(DataError, match="only some to measure on"):
        alone.calibration(1)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    kind = next(kind for kind in TINY if kind.name == "vit, classes")
    task = made(kind, tmp_path)
    (tmp_path / "pictures" / "dog" / "7.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"Reading .*dog/7\.png.*Replace the file"):
        list(task.calibration(100) + list(task.test_batches()) + list(task.validation_batches()))
    batches = make_batches(task.model, pictures(tmp_path / "again"), task.parts_of.images, examples=6)
    assert [tuple(item["pixel_values"].shape) for item in batches] == [(6, 3, 32, 32)]


def test_chats_are_written_by_the_template(tmp_path: Path) -> None:
    text("LlamaForCausalLM", "LlamaConfig")(tmp_path)
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} . {% endfor %}"
    words.save_pretrained(tmp_path)
    chat = [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "good"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 300)
    task: Any = folder_task(tmp_path, Texts(tmp_path / "chats.jsonl", reading=Reading(chat=True)))
    assert "u the sea. a good. u the sea" in words.decode(task.tokens("train")[:40]).replace(" .", ".")
    network = task.model
    given = make_batches(
        network, [{"text": "the sea", "answer": "good"}], words, chat=True, pair_column="answer"
    )
    assert "u the sea. a good." in words.decode(next(iter(given))["input_ids"][0]).replace(" .", ".")


def test_what_a_wide_layer_needs() -> None:
    wide, narrow = torch.nn.Linear(4096, 8), torch.nn.Linear(32, 8)
    assert enough(wide, 32) == {"examples": 2048, "tokens": 32}
    assert enough(narrow, 32) == {"examples": 256, "tokens": 16}
    with torch.device("meta"):
        huge = torch.nn.Linear(16384, 100_000)
    assert enough(huge, 128)["examples"] == 256  # bounded by the work, not by what would be best
