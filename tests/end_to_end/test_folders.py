"""Hugging Face folders of the user on the command line: prune, measure, recover, and what goes wrong."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from typer.testing import CliRunner, Result
from watching import counted, interrupted_at

from cria_prune.artifact.checkpoint import load
from cria_prune.base.errors import ArtifactError, ConfigError, DataError
from cria_prune.cli.main import app
from cria_prune.tasks import loading
from cria_prune.tasks.corpus import read_source
from cria_prune.tasks.folder import Texts, folder_task
from cria_prune.tasks.text import train_tokenizer

transformers = pytest.importorskip("transformers")

WORDS = ("the", "sea", "and", "its", "people", "with", "long", "shadows", "good", "bad", "fine", "dull")
SMALL = ["--examples", "24", "--rounds", "1", "--device", "cpu", "--criterion", "innovation"]


def lines(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) + ".\n" for _ in range(count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model, a classifier, texts and tables."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("folders")
    (folder / "text.txt").write_text("".join(lines(1500, 0)))
    (folder / "held.txt").write_text("".join(lines(300, 1)))
    tokenizer = train_tokenizer((folder / "text.txt").read_text(), 300)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        llama = transformers.LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=160, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        transformers.LlamaForCausalLM(llama).save_pretrained(folder / "llama")
        bert = transformers.BertConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_labels=2, max_position_embeddings=64,
        )  # fmt: skip
        transformers.BertForSequenceClassification(bert).save_pretrained(folder / "bert")
        transformers.BertModel(bert).save_pretrained(folder / "encoder")
    for name in ("llama", "bert", "encoder"):
        tokenizer.save_pretrained(folder / name)
    (folder / "rows").mkdir()
    for split, seed, count in (("train", 2, 200), ("validation", 3, 60)):
        texts = lines(count, seed)
        table = pa.table({"sentence": texts, "label": [int("good" in text) for text in texts]})
        pq.write_table(table, folder / "rows" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(autouse=True)
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("llama", "bert", "encoder", "rows", "text.txt", "held.txt"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def cria(*words: str) -> dict[str, Any]:
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def error(*words: str) -> str:
    before = sorted(Path().rglob("*"))
    result = invoke(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and result.stderr.startswith("error: "), result.output
    assert sorted(Path().rglob("*")) == before, "something was left behind"
    return result.stderr


PLAIN = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.arange(1, 25).view(2, 12)
with torch.no_grad():
    logits = model(ids).logits
    text = model.generate(ids, max_new_tokens=5, do_sample=False)
assert "cria_prune" not in sys.modules
from safetensors.torch import save_file
save_file({"logits": logits.contiguous(), "text": text.contiguous()}, sys.argv[2])
"""


def test_a_causal_folder_is_pruned_and_loads_without_cria(here: Path) -> None:
    """The line of the README, with its real certificate, and the same by hand in a process without Cria."""
    words = ["--calibration", "text.txt", "--reduce", "0.3", "--of", "non-embedding", "--output", "small"]
    said = cria("prune", "llama", *words, "--text", "held.txt", *SMALL)
    assert 0.3 <= said["reduction"] < 0.4 and said["policy"] == "vanilla"
    assert set(said["further"]["pruned"]) == {"perplexity-160"}
    names = {path.name for path in Path("small").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "certificate.json"} <= names
    card = Path("small/README.md").read_text()
    assert "| dense |" in card and "| pruned |" in card and "cria prune llama" in card
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, "small", "out.safetensors"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, model = load_file("out.safetensors"), load("small").model
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, found["logits"])
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), found["text"])
    sizes = model.config
    assert sizes.intermediate_size < 64 or sizes.num_key_value_heads < 2
    assert sizes.intermediate_size % 8 == 0


def test_eval_says_both_conventions(here: Path) -> None:
    found = cria("eval", "llama", "--text", "held.txt")
    assert {"perplexity-128", "perplexity-160"} <= set(found)
    model = transformers.AutoModelForCausalLM.from_pretrained("llama").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("llama")
    tokens = torch.tensor(tokenizer(Path("held.txt").read_text())["input_ids"])
    for length in (128, 160):
        rows = tokens[: len(tokens) // length * length].view(-1, length)
        with torch.no_grad():
            logits = model(rows).logits.double()
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        assert found[f"perplexity-{length}"] == pytest.approx(loss.exp().item(), rel=1e-5)


def test_measured_apart_from_what_is_calibrated_on(here: Path) -> None:
    task = folder_task(Path("llama"), Texts(calibration=Path("text.txt")))
    parts = [task.tokens(name) for name in ("train", "validation", "test")]  # type: ignore[attr-defined]
    whole = torch.tensor(task.tokenizer(Path("text.txt").read_text())["input_ids"])
    assert torch.equal(torch.cat(parts), whole) and all(len(part) >= 128 for part in parts)
    other = folder_task(Path("llama"), Texts(calibration=Path("text.txt"), text=Path("held.txt")))
    assert task.fingerprint("test") != other.fingerprint("test")
    assert len(other.tokens("train")) > len(parts[0])  # type: ignore[attr-defined]


@pytest.mark.usefixtures("in_this_process")
def test_a_classifier_is_measured_pruned_and_recovered_on_labelled_rows(here: Path) -> None:
    said = cria("prune", "bert", "--dataset", "rows", "--reduce", "0.2", "--output", "small", *SMALL)
    assert 0 <= said["pruned"] <= 1 and said["policy"] == "vanilla" and said["recipe"] is None
    config = json.loads(Path("small/config.json").read_text())
    assert config["num_attention_heads"] == 4 and config["intermediate_size"] < 64
    again = cria("eval", "small", "--dataset", "rows")
    assert again["accuracy"] == said["pruned"]
    tuned = cria(
        "recover", "small", "--dataset", "rows", "--epochs", "2", "--lr", "1e-3", "--distill", "0.5",
        "--teacher", "bert", "--output", "tuned",
    )  # fmt: skip
    assert tuned["pruned"] == said["pruned"] and tuned["reduction"] == said["reduction"]
    after = json.loads(Path("tuned/config.json").read_text())
    assert after.pop("problem_type") == "single_label_classification"  # the forward of a BERT notes it
    assert after == config
    assert not list(Path().glob(".tuned*"))
    assert "Name it with --teacher" in error(
        "recover", "small", "--dataset", "rows", "--distill", "0.5", "--output", "x"
    )


@pytest.mark.usefixtures("in_this_process")
def test_heads_of_an_encoder_on_request_and_a_padded_twin(here: Path) -> None:
    words = ["--dataset", "rows", "--reduce", "0.2", "--policy", "per-layer", "--floor", "0.5"]
    words += ["--export", "padded"]
    said = cria("prune", "bert", *words, "--output", "small", *SMALL)
    assert said["policy"] == "per-layer" and said["padded"] == "small-padded"
    small = load("small")
    assert {name: len(kept) for name, kept in small.plan.kept.items() if "attention" in name} != {}
    assert any(len(kept) < 4 for name, kept in small.plan.kept.items() if "self" in name or "query" in name)
    padded = transformers.AutoModelForSequenceClassification.from_pretrained("small-padded").eval()
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        assert torch.allclose(padded(ids).logits, small.model.eval()(ids).logits, atol=1e-6)
    assert cria("eval", "small", "--dataset", "rows")["accuracy"] == said["pruned"]
    more = cria("prune", "small", "--dataset", "rows", "--reduce", "0.02", "--output", "less", *SMALL)
    assert more["policy"] == "per-layer" and more["parameters"] < said["parameters"]


@pytest.mark.usefixtures("in_this_process")
def test_a_text_without_labels_calibrates_a_classifier(here: Path) -> None:
    said = cria("prune", "bert", "--calibration", "text.txt", "--reduce", "0.2", "--output", "small", *SMALL)
    assert "pruned" not in said and said["reduction"] >= 0.2
    assert "the texts have no labels" in error("eval", "small", "--calibration", "text.txt")
    found = cria("eval", "small", "--calibration", "text.txt", "--against", "bert")
    assert found["fidelity"]["outputs"][0]["divergence"] > 0 and "accuracy" not in found
    card = Path("small/README.md").read_text()
    assert "## Distance from the dense model" in card and "| KL (nats) | same class |" in card


@pytest.mark.usefixtures("in_this_process")
def test_datasets_of_every_shape(here: Path) -> None:
    parts = read_source("rows")
    assert {name: len(part) for name, part in parts.items()} == {"train": 200, "validation": 60}
    one = read_source("rows/validation-00000-of-00001.parquet")
    names = ("sentence", "label")
    assert all(list(one["train"].columns[n]) == list(parts["validation"].columns[n]) for n in names)
    with pytest.raises(
        DataError, match=r"The data set nobody/nothing of the hub.*Without a network: Give a file"
    ):
        read_source("nobody/nothing")
    with pytest.raises(DataError, match="there is no such file or folder"):
        read_source("nothing")
    Path("bad.parquet").write_text("text")
    with pytest.raises(DataError, match="no parquet file"):
        read_source("bad.parquet")


BAD: list[tuple[list[str], str]] = [
    (["llama"], "none were given.*--calibration"),
    (["llama", "--calibration", "nothing.txt"], "there is no such file"),
    (["llama", "--calibration", "short.txt"], r"it has \d+ tokens; 4 sequences of 128 are needed"),
    (["llama", "--calibration", "text.txt", "--dataset", "rows"], "Give one of the two"),
    (["llama", "--calibration", "text.txt", "--policy", "free"], "Known policies: uniform, per-layer"),
    (["llama", "--calibration", "text.txt", "--export", "onnx"], "Known exports: padded"),
    (["llama", "--calibration", "text.txt", "--output", "full"], "it is not empty"),
    (["encoder", "--calibration", "text.txt", "--task", "fill-mask"], "its tasks are feature-extraction"),
    (["naked", "--calibration", "text.txt"], "there are no weights beside config.json"),
    (["pickled", "--calibration", "text.txt"], "the weights are pickles.*save_pretrained"),
    (["mute", "--calibration", "text.txt"], "the folder holds none.*Copy tokenizer.json"),
    (["quantised", "--calibration", "text.txt"], "its weights are quantized"),
    (["bert", "--dataset", "labels"], r"found 7, and the model knows .*numbers from 0 to 1"),
    (["bert", "--dataset", "rows", "--reduce", "0.9"], r"at most 24\.28% .*per-layer\): at most 48\.04 %"),
    (["digits", "--calibration", "text.txt"], "it has data of its own"),
    (["digits", "--export", "padded"], "no model of transformers"),
    (["nobody/nothing", "--calibration", "text.txt"], "hf download nobody/nothing"),
]


@pytest.mark.parametrize(("words", "text"), BAD, ids=[f"{words[0]}-{n}" for n, (words, _) in enumerate(BAD)])
def test_bad_input_is_told_in_one_line_and_leaves_nothing(here: Path, words: list[str], text: str) -> None:
    prepare(here)
    said = error("prune", "--reduce", "0.2", *SMALL, *words)
    assert re.search(text, said.replace("\n", " ")), said
    assert len(said.splitlines()) == 1, said


def prepare(here: Path) -> None:
    """Folders that lack something."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    Path("short.txt").write_text("the sea and its people.\n")
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    for name in ("naked", "pickled", "mute", "quantised"):
        shutil.copytree(here / "llama", name)
    Path("naked/model.safetensors").unlink()
    Path("pickled/model.safetensors").rename("pickled/pytorch_model.bin")
    Path("mute/tokenizer.json").unlink()
    config = json.loads(Path("quantised/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    Path("quantised/config.json").write_text(json.dumps(config))
    Path("labels").mkdir()
    pq.write_table(pa.table({"text": lines(40, 5), "label": [7] * 40}), "labels/train.parquet")


def test_a_foreign_tokenizer_is_told(here: Path) -> None:
    shutil.copytree(here / "llama", "foreign")
    train_tokenizer("".join(lines(300, 9)) + "".join(map(chr, range(192, 900))) * 8, 420).save_pretrained(
        "foreign"
    )
    Path("strange.txt").write_text("".join(map(chr, range(192, 900))) * 8)
    with pytest.raises(ArtifactError, match=r"the model knows 300 tokens"):
        folder_task(Path("foreign"), Texts(calibration=Path("strange.txt"))).calibration(4)


def test_only_the_files_of_a_model_are_fetched(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return str(here / "llama")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert loading.find_folder("some/model") == here / "llama"
    assert asked["name"] == "some/model"
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in asked["allow_patterns"])


def rows_of(folder: str, **files: list[str | None]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    Path(folder).mkdir()
    for name, texts in files.items():
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), f"{folder}/{name}.parquet")
    return folder


def test_what_is_measured_was_not_calibrated_on(here: Path) -> None:
    data = rows_of("evalonly", test=lines(400, 6), validation=lines(400, 7))
    task = folder_task(Path("llama"), Texts(dataset=data))
    one = torch.cat([task.tokens("train"), task.tokens("validation")])  # type: ignore[attr-defined]
    assert not torch.equal(one, task.tokens("test"))  # type: ignore[attr-defined]


def test_shards_are_one_split_and_empty_rows_are_left_out(here: Path) -> None:
    data = rows_of("shards", **{"0000": lines(30, 1), "0001": [None, *lines(29, 2)], "dev_0": lines(9, 3)})
    found, task = read_source(data), folder_task(Path("llama"), Texts(dataset=data))
    assert {name: len(part) for name, part in found.items()} == {"train": 60, "validation": 9}
    assert len(task.kind.rows(task.encoder, found["train"])) == 59
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"question": ["a"], "sentence": ["b"], "label": [0]}), "pairs.parquet")
    with pytest.raises(DataError, match="pairs of texts are not"):
        folder_task(Path("llama"), Texts(dataset="pairs.parquet")).calibration(1)


def test_a_classifier_pads_with_its_own_token(here: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_labels=2, pad_token_id=5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForSequenceClassification(config).save_pretrained("pads")
    shutil.copy("llama/tokenizer.json", "pads")
    shutil.copy("llama/tokenizer_config.json", "pads")
    task = folder_task(Path("pads"), Texts(dataset="rows"))
    batch = dict(task.split("test").batch(torch.arange(20), 0))
    batch.pop("labels")
    with torch.no_grad():
        together = task.model(**batch).logits
        alone = [
            task.model(input_ids=ids[None, mask == 1]).logits[0]
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)
    task.model.config.pad_token_id = None
    task.tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="Set pad_token_id"):
        _ = task.encoder.padding


def test_nothing_of_others_is_replaced(here: Path) -> None:
    shutil.copytree(here / "llama", "mine")
    for words in (["digits"], ["llama", "--calibration", "text.txt"]):
        said = error("prune", *words, "--output", "mine", "--overwrite", "--reduce", "0.2", *SMALL)
        assert "written by Cria" in said
    assert "current folder" in error("prune", "digits", "--output", ".", *SMALL)
    said = error("run", "digits", "--reduction", "0.3", "--reduction", "0.30000001", "--output", "twice")
    assert "Give each share once" in said


@pytest.mark.usefixtures("in_this_process")
def test_half_types_are_tuned_in_float32_and_twins_are_left_alone(here: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained("llama").to(torch.bfloat16)
    model.save_pretrained("half")
    shutil.copy("llama/tokenizer.json", "half")
    shutil.copy("llama/tokenizer_config.json", "half")
    words = ["--calibration", "text.txt", "--export", "padded", "--reduce", "0.2", "--of", "non-embedding"]
    cria("prune", "half", *words, "--output", "small", *SMALL)
    cria("recover", "small", "--calibration", "text.txt", "--epochs", "1", "--output", "tuned")
    one, two = (load_file(f"{name}/model.safetensors") for name in ("small", "tuned"))
    assert all(value.dtype == torch.bfloat16 for value in two.values())
    name = "model.layers.0.mlp.down_proj.weight"
    assert (one[name] != two[name]).float().mean() > 0.5
    for command in ("recover", "prune"):
        said = error(command, "small-padded", "--calibration", "text.txt", "--output", "x")
        assert "without -padded" in said
    words = ["recover", "small", "--calibration", "text.txt", "--output", "tuned"]
    assert "not empty" in error(*words)
    assert "of another command, or of other settings" in error(*words, "--epochs", "2", "--resume")
    assert cria(*words, "--resume")["stage"] == "the recovered model"
    assert load_file("tuned/model.safetensors").keys() == two.keys()


@pytest.mark.usefixtures("in_this_process")
def test_an_interrupted_pruning_goes_on_with_the_same_bits(here: Path) -> None:
    words = ["prune", "llama", "--calibration", "text.txt", "--reduce", "0.2", *SMALL, "--rounds", "3"]
    words += ["--criterion", "innovation"]
    cria(*words, "--output", "whole")
    with interrupted_at("record", 3):
        result = invoke(*words, "--output", "cut")
    assert result.exit_code == 130
    assert "round 2 of 3 is kept (go on with: the same command, --output cut --resume)" in result.stderr
    assert not (here / "cut").exists() and (here / ".cut.rounds").is_dir()
    for left in (1, 0):  # the second time there is nothing left to do
        with counted("record") as calls:
            cria(*words, "--output", "cut", "--resume")
        assert len(calls) == left and not (here / ".cut.rounds").exists()
    one, two = (load_file(f"{name}/model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert "other settings" in error(*words[:5], "0.3", *words[6:], "--output", "cut", "--resume")
