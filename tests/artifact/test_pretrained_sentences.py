"""Sentence encoders: what makes their embeddings goes along or is refused, and embeddings are compared."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.artifact.test_pretrained import same_process  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional

from cria_prune import PruneConfig, PruneResult, load, prune, save_pretrained
from cria_prune.artifact import certificate
from cria_prune.base import files
from cria_prune.base.errors import ArtifactError, CertificateError
from cria_prune.base.sentences import check_modules, encoder_folder
from cria_prune.tasks.loading import load_pretrained
from cria_prune.tasks.pooling import MODES, Behind, pooled, tokens_of

transformers = pytest.importorskip("transformers")

WIDTH, OUT = 16, 6
WORDS = (
    *("a", "small", "animal", "lives", "in", "the", "mountains", "who", "wrote", "first", "letter", "no"),
    *("weather", "was", "fine", "until", "friday"),
)
LESS = PruneConfig(plan={"vanilla": True, "reduction": 0.3, "of": "prunable"}, record={"examples": 64})


def sentence_folder(folder: Path, pooling: dict[str, Any] | None = None, deep: str = "") -> Path:
    """A tiny encoder with what sentence-transformers writes beside it: mean, Dense, unit length."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    encoder = folder / deep if deep else folder
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BertModel(config)
    for name, item in model.named_parameters():  # as they are made, the layers do next to nothing
        if item.ndim > 1 and name.startswith("encoder"):
            item.data.mul_(20)
    model.save_pretrained(encoder)
    numbers = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(encoder)
    said = {"max_seq_length": 12, "do_lower_case": True}
    (encoder / "sentence_bert_config.json").write_text(json.dumps(said))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "ask: "}}))
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    modules = [
        {
            "idx": place,
            "name": str(place),
            "path": path or deep,
            "type": f"sentence_transformers.models.{kind}",
        }
        for place, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
    usual = {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling or usual))
    dense = {
        "in_features": WIDTH,
        "out_features": OUT,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    values = {"linear.weight": torch.randn(OUT, WIDTH), "linear.bias": torch.randn(OUT)}
    save_file(values, folder / "2_Dense" / "model.safetensors")
    return folder


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(2, 20, (16, 9), generator=draw),
            "attention_mask": torch.ones(16, 9).long(),
        }
        for _ in range(count)
    ]


@cache
def once() -> PruneResult:
    """The encoder of every `sentence_folder`, pruned; it has the same weights in each."""
    with TemporaryDirectory() as folder:
        return prune(load_pretrained(sentence_folder(Path(folder) / "dense")), batches(), LESS)


def by_hand(model: nn.Module, folder: Path, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens, Dense, tanh, unit length: as the library's pages say it, one text at a time."""
    state, found = load_file(folder / "2_Dense" / "model.safetensors"), []
    with torch.no_grad():
        for row, seen in zip(ids, mask, strict=True):
            length = int(seen.sum())
            states = model(input_ids=row[None, :length]).last_hidden_state[0]
            vector = torch.tanh(state["linear.weight"] @ states.mean(0) + state["linear.bias"])
            found.append(vector / vector.norm())
    return torch.stack(found)


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("deep", ["", "0_Transformer"])
def test_all_that_makes_the_embeddings_goes_along(deep: str, tmp_path: Path) -> None:
    source = sentence_folder(tmp_path / "dense", deep=deep)
    result = once()
    found = save_pretrained(tmp_path / "small", result.model, result.plan, source=source)
    assert found.embedded == "Cria's own pooling" and "sentence_embedding" in found.outputs
    kept = {path.relative_to(tmp_path / "small").as_posix() for path in (tmp_path / "small").rglob("*.*")}
    assert {
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
    } < kept
    assert {"config_sentence_transformers.json", "sentence_bert_config.json", "tokenizer.json"} < kept
    assert {"modules.json", "2_Dense/model.safetensors"} < found.sha256.keys()
    small = load(tmp_path / "small").model
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    words = tokens_of(
        tokenizer,
        ["A small animal ", "no", " ".join(20 * ["fine"])],
        {"max_seq_length": 12, "do_lower_case": True},
    )
    assert words["attention_mask"].sum(1).tolist() == [3, 1, 12] and words["input_ids"][0, 0] != 1
    behind = Behind(tmp_path / "small", WIDTH)
    expected = by_hand(small, source, words["input_ids"], words["attention_mask"])
    with torch.no_grad():
        assert torch.allclose(behind.of(small, words), expected, atol=1e-6) and behind.width == OUT
    # It is Cria's folder, and may be replaced; a file of somebody else beside the modules is not lost.
    save_pretrained(tmp_path / "small", result.model, result.plan, source=source, overwrite=True)
    (tmp_path / "small" / "2_Dense" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds 2_Dense"):
        save_pretrained(tmp_path / "small", result.model, result.plan, source=source, overwrite=True)
    (tmp_path / "small" / "1_Pooling" / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"1_Pooling/config\.json has SHA-256"):
        load(tmp_path / "small")


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("lost", ["modules.json", "1_Pooling/config.json"])
def test_other_embeddings_are_no_certificate(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = {"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": True}
    source = sentence_folder(tmp_path / "dense", cls)
    result = once()
    copied = files._copy_modules

    def forgets(source: Path, encoder: Path, folder: Path) -> None:
        copied(source, encoder, folder)
        (folder / lost).unlink()

    monkeypatch.setattr(files, "_copy_modules", forgets)
    with pytest.raises(CertificateError, match=r"outputs differ|of another shape"):
        save_pretrained(tmp_path / "small", result.model, result.plan, source=source)
    assert not (tmp_path / "small").exists()


def changed(name: str, **said: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        known = json.loads((folder / name).read_text())
        place = known[-1] if isinstance(known, list) else known
        place.update(said)
        (folder / name).write_text(json.dumps(known))

    return change


def pickled(folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")


def narrow(folder: Path) -> None:
    save_file({"linear.weight": torch.ones(2, 3)}, folder / "2_Dense" / "model.safetensors")


def of_type(kind: str) -> Callable[[Path], None]:
    return changed("modules.json", type=kind)


LIBRARY = "sentence_transformers.models"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "code of its own": (of_type("my.Head"), r"module Head is code of its own.*auto_model"),
    "another kind": (of_type(f"{LIBRARY}.CNN"), "module CNN cannot be"),
    "two poolings": (of_type(f"{LIBRARY}.Pooling"), "its modules are"),
    "outside": (changed("modules.json", path="../x"), r"it names the place '\.\./x'"),
    "a pickle": (pickled, r"Dense has pickled weights in place of 2_Dense/model\.safetensors"),
    "way to pool": (changed("1_Pooling/config.json", pooling_mode="best"), "Pooling is by 'best'"),
    "pooled width": (changed("1_Pooling/config.json", word_embedding_dimension=9), "reads 9 features"),
    "dense width": (
        narrow,
        "Dense reads 3 features, and gets 16",
    ),
    "activation": (changed("2_Dense/config.json", activation_function="my.Act"), "activation my.Act"),
    "task": (changed("sentence_bert_config.json", transformer_task="fill-mask"), "is for fill-mask"),
}  # fmt: skip


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_folder(tmp_path_factory.mktemp("sentences") / "dense")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused_before_the_work(name: str, usual: Path, tmp_path: Path) -> None:
    change, text = REFUSED[name]
    folder = Path(shutil.copytree(usual, tmp_path / "dense"))
    change(folder)
    with pytest.raises((ArtifactError, ValueError), match=text):
        check_modules(folder)
        Behind(folder, WIDTH)


def test_a_link_in_place_of_a_module_is_refused(usual: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(usual, tmp_path / "dense"))
    (folder / "1_Pooling" / "config.json").unlink()
    (folder / "1_Pooling" / "config.json").symlink_to(usual / "1_Pooling" / "config.json")
    (tmp_path / "small").mkdir()
    with pytest.raises(ArtifactError, match="it is a link, or no regular file"):
        files.copy_known(folder, tmp_path / "small")


@pytest.mark.parametrize("mode", MODES.values())
def test_a_way_to_pool_is_the_same_text_by_text(mode: str) -> None:
    torch.manual_seed(0)
    states = torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for row, found in enumerate(pooled(states, mask, mode)):
        inside = states[row][mask[row].bool()]
        places = torch.arange(1.0, len(inside) + 1, dtype=torch.float64)[:, None]
        expected = {
            "cls": inside[0], "max": inside.amax(0), "mean": inside.mean(0), "lasttoken": inside[-1],
            "mean_sqrt_len_tokens": inside.sum(0) / len(inside) ** 0.5,
            "weightedmean": (inside * places).sum(0) / places.sum(),
        }[mode]  # fmt: skip
        assert torch.allclose(found, expected, atol=1e-12)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> type:
    """What a SentenceTransformer looks like from outside; the library itself is no part of the suite."""

    class Transformer(nn.Module):
        def __init__(self, folder: Path) -> None:
            super().__init__()
            self.model = transformers.AutoModel.from_pretrained(folder)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

        @property
        def auto_model(self) -> nn.Module:
            return self.model

    class SentenceTransformer(nn.Sequential):
        def __init__(self, folder: Path) -> None:
            super().__init__(Transformer(folder), nn.Identity())
            self.folder = folder

        def tokenize(self, texts: list[str]) -> dict[str, Any]:
            said = {"do_lower_case": True, "max_seq_length": 12}
            return {**tokens_of(self[0].tokenizer, texts, said), "modality": "text"}

        def save(self, path: str, create_model_card: bool = True) -> None:
            shutil.copytree(self.folder, path, dirs_exist_ok=True)
            self[0].auto_model.save_pretrained(path)

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            behind = Behind(self.folder, WIDTH)
            return {"sentence_embedding": behind.of(self[0].auto_model, features)}

    SentenceTransformer.__module__ = "sentence_transformers.SentenceTransformer"
    return SentenceTransformer


@pytest.mark.usefixtures("same_process")
def test_a_sentence_transformer_is_pruned_and_saved(usual: Path, tmp_path: Path, library: type) -> None:
    pipeline = library(usual)
    before = functional.normalize(torch.ones(1, 3))
    texts = [" ".join(WORDS[start : start + 5]) for start in range(12)] * 6
    result = prune(pipeline, texts, LESS)
    smaller: Any = result.model
    assert type(smaller) is library and smaller.folder == usual and smaller[1] is pipeline[1]
    assert pipeline[0].auto_model.config.intermediate_size == 24 and before.ndim
    assert smaller[0].auto_model.config.intermediate_size < 24
    assert "taken out of SentenceTransformer" in result.notes[-1]
    assert next(iter(result.plan.kept)).startswith(("encoder.", "embeddings."))
    save_pretrained(tmp_path / "small", smaller, result.plan)
    again = library(tmp_path / "small")
    words = pipeline.tokenize(["A small animal", "no"])
    del words["modality"]
    assert torch.equal(again(words)["sentence_embedding"], smaller(words)["sentence_embedding"])
    assert not torch.allclose(pipeline(words)["sentence_embedding"], smaller(words)["sentence_embedding"])


@pytest.mark.usefixtures("same_process")
def test_the_library_is_asked_where_it_is_installed(
    usual: Path, tmp_path: Path, library: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its embeddings are compared, and what it makes of texts."""
    installed = ModuleType("sentence_transformers")
    installed.__version__ = "9.9"

    class Installed:
        wrong = 0.0

        def __init__(self, folder: str, **options: Any) -> None:
            assert options["local_files_only"] and "attn_implementation" in options["model_kwargs"]
            self.pipeline = library(Path(folder))

        def eval(self) -> Any:
            return self

        def __call__(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"sentence_embedding": self.pipeline(features)["sentence_embedding"] + self.wrong}

        def encode(self, texts: list[str], **asked: Any) -> Tensor:
            return self(self.pipeline.tokenize(texts[::-1]))["sentence_embedding"]

    installed.SentenceTransformer = Installed
    monkeypatch.setitem(sys.modules, "sentence_transformers", installed)
    result = once()
    found = save_pretrained(tmp_path / "small", result.model, result.plan, source=usual)
    assert found.embedded == "sentence-transformers 9.9"
    assert found.notes == ("SentenceTransformer reads texts in another way than its tokenizer alone",)
    Installed.wrong = 0.1
    with pytest.raises(CertificateError, match="outputs differ by"):
        save_pretrained(tmp_path / "other", result.model, result.plan, source=usual)
    assert len(certificate.TEXTS) > 2 and encoder_folder(usual) == usual
