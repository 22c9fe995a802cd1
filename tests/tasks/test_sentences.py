"""Sentence encoders on the command line: pruned, measured beside the dense one, taught by it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.artifact.test_pretrained_sentences import OUT, WIDTH, WORDS, by_hand, once, sentence_folder
from torch.nn import functional
from typer.testing import CliRunner

from cria_prune import load, save_pretrained
from cria_prune.base.errors import ConfigError, DataError
from cria_prune.cli.main import app
from cria_prune.tasks.loading import load_pretrained
from cria_prune.tasks.sentences import Sentences, nearest

pytest.importorskip("transformers")
SMALL = ["--examples", "64", "--device", "cpu", "--quiet"]


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentences")
    sentence_folder(folder / "dense")
    (folder / "texts.txt").write_text("\n".join(sentences(160, 0)) + "\n")
    rows = [
        {"sentence1": one, "sentence2": other, "score": len({*one.split()} & {*other.split()})}
        for one, other in zip(sentences(40, 1), sentences(40, 2), strict=True)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    yield


def cria(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def refused(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 2, result.output
    return str(result.stderr)


def test_an_encoder_is_pruned_measured_and_taught(in_this_process: None) -> None:
    """No labels anywhere; the figures are those that are found by hand."""
    given = ["--calibration", "texts.txt", *SMALL]
    cut = ["--reduce", "0.6", "--of", "prunable", "--repair", "none", "--serve", "transformers4"]
    said = cria("prune", "dense", *cut, *given, "--output", "small")
    assert said["dense"] == pytest.approx(1) and 0.2 < said["pruned"] < 1
    assert "cut for transformers4: neurons alone" in Path("small/README.md").read_text()
    assert Path("small/1_Pooling/config.json").exists() and Path("small/2_Dense/model.safetensors").exists()
    tests = ["--text", "texts.txt", *SMALL[2:]]
    seen = cria("eval", "small", "--against", "dense", *tests)
    models = [load_pretrained(Path("dense")), load(Path("small")).model]
    ids = [[2 + WORDS.index(word) for word in line.split()] for line in sentences(160, 0)]
    rows = torch.tensor([row + [0] * (9 - len(row)) for row in ids])
    whole, found = (by_hand(model, Path("dense"), rows, (rows > 0).long()) for model in models)
    assert seen["cosine"] == pytest.approx(float((whole * found).sum(1).mean()), abs=1e-5)
    there = [(E @ E.T).fill_diagonal_(-9).argmax(1) for E in (whole, found)]
    assert seen["neighbours"] == pytest.approx(float((there[0] == there[1]).float().mean()), abs=0.02)
    teacher = ["--distill", "1", "--teacher", "dense", "--lr", "0.001", "--epochs", "3"]
    taught = cria("recover", "small", *given[:2], *teacher, *SMALL[2:], "--output", "taught")
    # So few texts show that it is taught, not how well: benchmarks/others.py measures that.
    assert taught["recovered"] > 0.2 and taught["parameters"] == said["parameters"]
    states = [load(Path(name)).model.state_dict() for name in ("small", "taught")]
    moved = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert moved or taught["best_epoch"] == 0
    before, after = (load_file(f"{name}/2_Dense/model.safetensors") for name in ("dense", "taught"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "sentence-similarity" in Path("taught/README.md").read_text()


def test_scored_pairs_are_measured_by_rank() -> None:
    from scipy.stats import spearmanr

    found = cria("eval", "dense", "--text", "pairs.jsonl", "--device", "cpu", "--quiet")
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    model, sides = load_pretrained(Path("dense")), list[torch.Tensor]()
    for name in ("sentence1", "sentence2"):
        ids = [[2 + WORDS.index(word) for word in row[name].split()] for row in rows]
        padded = torch.tensor([row + [0] * (9 - len(row)) for row in ids])
        sides.append(by_hand(model, Path("dense"), padded, (padded > 0).long()))
    alike = functional.cosine_similarity(*sides).numpy()
    expected = spearmanr(alike, [row["score"] for row in rows]).statistic
    assert found["spearman"] == pytest.approx(float(expected), abs=1e-3) and "cosine" not in found


def test_what_an_encoder_needs_is_said(in_this_process: None) -> None:
    text = refused("eval", "dense", "--text", "texts.txt", "--device", "cpu")
    assert "no scored pairs and no dense one were given" in text and "--against" in text
    result = once()
    save_pretrained("small", result.model, result.plan, source="dense")
    for more in ([], ["--distill", "1"]):
        text = refused("recover", "small", "--calibration", "texts.txt", *more, "--device", "cpu")
        assert "learns the dense one's embeddings" in text and "--teacher" in text


def test_a_folder_written_from_python_is_taken(in_this_process: None) -> None:
    """Without results, provenance or a card of a command; to measure, to teach, and to cut once more."""
    result = once()
    for policy in ("vanilla", "per-layer"):
        save_pretrained(policy, result.model, result.plan, policy=policy, source="dense")
        tests = ["--against", "dense", "--text", "texts.txt", *SMALL[2:]]
        before = cria("eval", policy, *tests)["parameters"]
        given = ["--calibration", "texts.txt", *SMALL[2:]]
        taught = cria("recover", policy, *given, "--distill", "1", "--teacher", "dense", "--output", "taught")
        assert taught["parameters"] == before and Path("taught/modules.json").exists()
        cut = ["--reduce", "0.2", "--of", "prunable", "--repair", "none", "--examples", "64"]
        again = cria("prune", policy, *cut, *given, "--output", "again")
        assert again["parameters"] < before and Path("again/modules.json").exists()
        for name in ("taught", "again"):
            shutil.rmtree(name)


def test_the_loss_is_nothing_where_nothing_differs(made: Path) -> None:
    model = load_pretrained(made / "dense")
    learns = Sentences(made / "dense", model)
    batch = {
        "input_ids": torch.tensor([[2, 3, 4], [5, 6, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    with pytest.raises(ConfigError, match="there is no dense one to learn from"):
        learns.loss(model, batch)
    learns.dense = load_pretrained(made / "dense")
    model.train()
    assert float(learns.loss(model, batch)) == pytest.approx(0, abs=1e-6) and model.training
    with torch.no_grad():
        model.encoder.layer[0].intermediate.dense.weight.mul_(1.5)
    loss = learns.loss(model, batch)
    loss.backward()
    assert float(loss) > 0 and model.encoder.layer[1].intermediate.dense.weight.grad.abs().sum() > 0
    # By hand: the cosine of the embeddings, and the states of the tokens that there are, layer by layer.
    with torch.no_grad():
        both = [item.eval()(**batch, output_hidden_states=True) for item in (model, learns.dense)]
    E = [learns.behind(item.last_hidden_state, batch["attention_mask"]) for item in both]
    errors = []
    for mine, theirs in zip(both[0].hidden_states[1:], both[1].hidden_states[1:], strict=True):
        rows = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
        apart = sum(float((mine[row] - theirs[row]).norm() ** 2) for row in rows)
        errors.append(apart / sum(float(theirs[row].norm() ** 2) for row in rows))
    expected = float(1 - (E[0] * E[1]).sum(1).mean()) + sum(errors) / len(errors)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    learns.dense.config.hidden_size = WIDTH
    with pytest.raises(DataError, match=f"they have {OUT} and {OUT + 1} features"):
        learns._measure(None, model, [batch], None) if _wider(learns) else None  # type: ignore[arg-type]


def _wider(learns: Sentences) -> bool:
    embeddings = learns.embeddings

    def other(model: Any, batches: Any, progress: Any = None) -> torch.Tensor:
        found = embeddings(model, batches, progress)
        return functional.pad(found, (0, 1)) if model is learns.dense else found

    learns.embeddings = other  # type: ignore[method-assign]
    return True


def test_neighbours_are_found_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    E = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    whole = nearest(E)
    monkeypatch.setattr("cria_prune.tasks.sentences.PIECE", 3)
    assert torch.equal(nearest(E), whole)
