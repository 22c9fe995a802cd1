"""lm-eval on a model in memory: its figures against log-likelihoods by hand, and what must be left alone."""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cria_prune.base.errors import ArtifactError, ConfigError, DataError, PackageError
from cria_prune.tasks.harness import harness
from cria_prune.tasks.text import train_tokenizer

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
lm_tasks = pytest.importorskip("lm_eval.tasks")

QUESTIONS = [
    {"question": f"A {animal} says", "choices": ["moo", "a long baa", "hum"], "answer": number % 3}
    for number, animal in enumerate(["cow", "sheep", "llama", "goat", "cria", "calf", "lamb"])
]
TEXTS = [{"text": text} for text in ("The cria grows.", "It hums to the herd all day long.", "So be it")]
CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip
ROLLING: dict[str, Any] = {
    "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "byte_perplexity"}, {"metric": "word_perplexity"}],
}  # fmt: skip
LAST: dict[str, Any] = {
    "output_type": "loglikelihood", "doc_to_text": "{{question}}",
    "doc_to_target": "{{' ' + choices[answer]}}", "metric_list": [{"metric": "perplexity"}],
}  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server is asked; the libraries have read the environment when they were imported."""
    import huggingface_hub

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip, for seconds


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(" ".join(item["question"] for item in QUESTIONS), 300)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tasks with their data."""
    write(tmp_path / "tasks", "animals", CHOICE, QUESTIONS)
    write(tmp_path / "tasks", "prose", ROLLING, TEXTS)
    write(tmp_path / "tasks", "sounds", LAST, QUESTIONS)
    return tmp_path / "tasks"


def write(folder: Path, name: str, settings: dict[str, Any], rows: Sequence[Any] = QUESTIONS) -> None:
    """Write a task as YAML, of which JSON is a part, and its examples as JSON lines beside the folder."""
    folder.mkdir(exist_ok=True)
    data = folder.parent / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {
        "task": name, "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder.parent / "cache")},
        **settings,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(told))


def likelihood(model: nn.Module, tokenizer: Any, context: str, text: str) -> float:
    """The log-likelihood of a text after a context, in float64, one pass for each; no context: after the end
    of a text."""
    whole = tokenizer(context + text)["input_ids"]
    start = len(tokenizer(context)["input_ids"]) if context else 0
    tokens = torch.tensor([whole if context else [0, *whole]])
    with torch.no_grad():
        logits = copy.deepcopy(model).eval().double()(tokens).logits[0]
    places = range(len(tokens[0]) - (len(whole) - start), len(tokens[0]))
    return float(sum(logits[place - 1].log_softmax(-1)[tokens[0, place]] for place in places))


def test_the_figures_are_those_of_the_log_likelihoods(model: Any, tokenizer: Any, folder: Path) -> None:
    found = harness(model, tokenizer, ["animals", "prose", "sounds"], folder=folder, batch_size=3)
    scores = [
        [likelihood(model, tokenizer, item["question"], f" {choice}") for choice in item["choices"]]
        for item in QUESTIONS
    ]
    right = [int(np.argmax(row)) == item["answer"] for row, item in zip(scores, QUESTIONS, strict=True)]
    lengths = [[len(choice) for choice in item["choices"]] for item in QUESTIONS]
    normed = (np.array(scores) / lengths).argmax(1) == [item["answer"] for item in QUESTIONS]
    assert 0 < sum(right) < len(right) and sum(right) != normed.sum()
    assert found["animals/acc"] == pytest.approx(np.mean(right))
    assert found["animals/acc_norm"] == pytest.approx(normed.mean())
    assert found["animals/acc_stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    total = sum(likelihood(model, tokenizer, "", item["text"]) for item in TEXTS)
    size = sum(len(item["text"].encode()) for item in TEXTS)
    assert found["prose/byte_perplexity"] == pytest.approx(math.exp(-total / size), rel=1e-5)
    chosen = [row[item["answer"]] for row, item in zip(scores, QUESTIONS, strict=True)]
    assert found["sounds/perplexity"] == pytest.approx(math.exp(-np.mean(chosen)), rel=1e-5)
    assert found["sounds/perplexity_stderr"] > 0
    assert set(found) == {
        *("animals/acc", "animals/acc_stderr", "animals/acc_norm", "animals/acc_norm_stderr"),
        *("prose/byte_perplexity", "prose/word_perplexity", "sounds/perplexity", "sounds/perplexity_stderr"),
    }


def test_limit_and_device(model: Any, tokenizer: Any, folder: Path) -> None:
    first = harness(model, tokenizer, "animals", folder=folder, limit=2)
    scores = [
        [likelihood(model, tokenizer, item["question"], f" {choice}") for choice in item["choices"]]
        for item in QUESTIONS[:2]
    ]
    right = [int(np.argmax(row)) == item["answer"] for row, item in zip(scores, QUESTIONS, strict=False)]
    assert first["animals/acc"] == np.mean(right)
    assert harness(model, tokenizer, "animals", folder=folder, limit=2, device="cpu:0") == first


def state_of(model: Any, tokenizer: Any) -> list[Any]:
    return [
        {name: module.training for name, module in model.named_modules()},
        [sorted(vars(module)) for module in model.modules()],
        model.config.to_dict(), model.generation_config.to_dict(),
        {name: (item.data_ptr(), item.sum().item()) for name, item in model.named_parameters()},
        tokenizer.pad_token, tokenizer.padding_side, len(tokenizer),
    ]  # fmt: skip


def global_state() -> list[Any]:
    loggers = [logging.getLogger(name) for name in (None, "lm_eval", "transformers")]
    return [
        torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(),
        [(item.level, list(item.handlers), item.propagate) for item in loggers],
        sys.stdout, sys.modules.get("evaluate"),
    ]  # fmt: skip


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(
    fails: bool, model: Any, tokenizer: Any, folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "evaluate", sys)
    monkeypatch.setattr(logging.getLogger("lm_eval"), "level", logging.DEBUG)
    for seed in (torch.manual_seed, np.random.seed, random.seed):  # an earlier call may have left lm-eval's
        seed(5)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    model.train()
    model.model.layers[0].mlp.eval()
    if fails:
        write(folder, "prose", {**ROLLING, "doc_to_target": "{{nothing.of.this}}"}, TEXTS)
    before, around = state_of(model, tokenizer), global_state()
    if fails:
        with pytest.raises(DataError):
            harness(model, tokenizer, ["sounds", "prose"], folder=folder)
    else:
        harness(model, tokenizer, ["sounds", "prose"], folder=folder)
    assert state_of(model, tokenizer) == before and global_state() == around
    assert not capsys.readouterr().out


def test_a_task_that_does_not_exist(
    model: Any, tokenizer: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = lm_tasks.TaskManager

    def small(include_path: str | None = None, include_defaults: bool = True) -> Any:
        """lm-eval's own 14,000 tasks take long to read; here it has none."""
        return whole(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_tasks, "TaskManager", small)
    with pytest.raises(ConfigError, match=r"knows no task 'animal' in .*Near names: animals$"):
        harness(model, tokenizer, ["animal"], folder=folder)
    with pytest.raises(ConfigError, match=r"knows no task 'animals'\. `lm-eval ls tasks` lists all"):
        harness(model, tokenizer, ["animals"])
    with pytest.raises(ConfigError, match="no task is named"):
        harness(model, tokenizer, [], folder=folder)
    with pytest.raises(ConfigError, match="there is no folder"):
        harness(model, tokenizer, ["animals"], folder=tmp_path / "nowhere")


HUB = {**CHOICE, "dataset_path": "crias/animals", "dataset_kwargs": None}
FETCHED = {**CHOICE, "metric_list": [{"metric": "exact_match", "hf_evaluate": True}]}
GONE = {**CHOICE, "dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}
BROKEN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no network": (HUB, DataError, r"data set crias/animals cannot be fetched, Conn.*pass a `folder` with a"),
    "no data": (GONE, DataError, r"cannot be loaded, FileNotFoundError: .*gone\.jsonl"),
    "no field": ({**CHOICE, "doc_to_text": "{{colour}}"}, DataError, "'colour' is undefined"),
    "no type": ({**CHOICE, "output_type": "guess"}, DataError, "Got invalid output_type 'guess'"),
    "its code": ({**CHOICE, "unsafe_code": True}, ConfigError, "runs code that the model writes"),
    "a metric": (FETCHED, ConfigError, "library evaluate, which runs code from a server"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_task_that_does_not_run(name: str, model: Any, tokenizer: Any, folder: Path) -> None:
    settings, kind, text = BROKEN[name]
    write(folder, "animals", settings)
    with pytest.raises(kind, match=text) as error:
        harness(model, tokenizer, ["animals"], folder=folder)
    assert str(error.value).count("\n") == 0 and "animals" in str(error.value)


def test_functions_of_a_folder_run_but_fetch_no_metric(model: Any, tokenizer: Any, folder: Path) -> None:
    path = folder / "sounds.yaml"
    path.write_text(path.read_text().replace('"{{question}}"', "!function own.text"))
    (folder / "own.py").write_text("def text(row): return row['question'].upper()\n")
    found = harness(model, tokenizer, ["sounds"], folder=folder)
    scores = [
        likelihood(model, tokenizer, item["question"].upper(), f" {item['choices'][item['answer']]}")
        for item in QUESTIONS
    ]
    assert found["sounds/perplexity"] == pytest.approx(math.exp(-np.mean(scores)), rel=1e-5)
    (folder / "own.py").write_text("import evaluate\n\ndef text(row): return row['question']\n")
    with pytest.raises(ConfigError, match="library evaluate, which runs code from a server"):
        harness(model, tokenizer, ["sounds"], folder=folder)


def test_a_model_that_fails_in_the_task(model: Any, tokenizer: Any, folder: Path) -> None:
    model.resize_token_embeddings(20)
    with pytest.raises(
        DataError, match=r"Evaluating animals with lm-eval: it stops with IndexError: .*batch"
    ):
        harness(model, tokenizer, ["animals"], folder=folder)


def test_what_has_to_be_there(
    model: Any, tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    encoder = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=300))
    for other in (encoder, nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match="writes no text"):
            harness(other, tokenizer, ["animals"], folder=folder)
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "__version__", "3.6.0")
        with pytest.raises(ArtifactError, match=r"datasets 3\.6\.0 can run code .* Install datasets 4"):
            harness(model, tokenizer, ["animals"], folder=folder)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(PackageError, match=r"lm-eval is not installed.*pip install 'cria-prune\[eval\]'"):
        harness(model, tokenizer, ["animals"], folder=folder)
