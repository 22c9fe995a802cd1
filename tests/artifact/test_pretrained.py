"""Pruned models as folders that plain transformers loads: what is in them, what must not be left behind."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner
from watching import at

from cria_prune import PruneConfig, discover
from cria_prune.artifact import certificate, pretrained, reload
from cria_prune.artifact.card import Card, _tag, parameter_counts, source_metadata
from cria_prune.artifact.certificate import Certificate, loader_of
from cria_prune.artifact.pretrained import container, save_pretrained
from cria_prune.artifact.rebuild import provenance, read_plan
from cria_prune.base import files
from cria_prune.base.errors import ArtifactError, CertificateError, DataError
from cria_prune.base.files import copy_known
from cria_prune.cli.main import app
from cria_prune.planning.plan import Plan, make_plan
from cria_prune.surgery.removal import apply
from cria_prune.tasks.loading import example_inputs, load_pretrained

transformers = pytest.importorskip("transformers")

DECODER: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LESS: dict[str, Any] = {**DECODER, "num_attention_heads": 4, "num_key_value_heads": 4}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
HALF = {"kv group": 0.5, "head": 0.5, "gated": 0.5}
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, float], str]] = {
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER, HALF, "AutoModelForCausalLM"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER, HALF, "AutoModelForCausalLM"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LESS, HALF, "AutoModelForCausalLM"),
    "llama as mistral": (
        "LlamaForCausalLM", "LlamaConfig",
        {**DECODER, "num_key_value_heads": 8, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
        {"kv group": 0.65, "head": 0.65}, "AutoModelForCausalLM",
    ),
    "llama classifier as mistral": (
        "LlamaForSequenceClassification", "LlamaConfig",
        {**DECODER, "num_key_value_heads": 8, "num_labels": 3},
        {"kv group": 0.65, "head": 0.65}, "AutoModelForSequenceClassification",
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 99, "n_embd": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
        {"neuron": 0.5}, "AutoModelForCausalLM",
    ),
    "bert": (
        "BertForSequenceClassification", "BertConfig", {**ENCODER, "vocab_size": 99, "num_labels": 3},
        {"neuron": 0.5}, "AutoModelForSequenceClassification",
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", DECODER, {"gated": 0.5}, "AutoModelForCausalLM"),
    "vit": (
        "ViTForImageClassification", "ViTConfig", {**ENCODER, "image_size": 32, "patch_size": 8},
        {"neuron": 0.5, "head": 0.5}, "AutoModelForImageClassification",
    ),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 99, "d_model": 48, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0},
        {"neuron": 0.5, "head": 0.5}, "AutoModelForSeq2SeqLM",
    ),
}  # fmt: skip


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind, config, sizes, _, _ = MODELS[name]
    return getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()


def pruned(name: str = "mistral") -> tuple[nn.Module, Plan]:
    model, plan = cut_once(name)
    return copy.deepcopy(model), plan


@cache
def cut_once(name: str) -> tuple[nn.Module, Plan]:
    """The last units of every group leave, as many in every block; what stands outside stays whole."""
    model = built(name)
    groups = discover(model, example_inputs(model))
    shares = MODELS[name][3]
    kept = {
        group.name: range(int(group.size * shares[group.kind]))
        for group in groups.prunable
        if group.kind in shares and any(character.isdecimal() for character in group.name)
    }
    assert kept
    plan = make_plan(groups, kept)
    return apply(model, plan), plan


def vouched(folder: Path, model: nn.Module, example: Any, **others: Any) -> Certificate:
    """In place of `certify` where the fresh process is not what is tested."""
    return Certificate(
        "AutoModelForCausalLM", type(model).__name__, None, ("logits",), True, 0.0, 0.0, 1e-5, 8, 8,
        "float32", "cpu", "sdpa", {"transformers": "5"}, {}, 0.1, others.get("left_out", ()),
        earlier=others.get("earlier", ()),
    )  # fmt: skip


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "certify", vouched)


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load and run in this process: all that a fresh one does, without the seconds that it takes to start."""

    def run(command: list[str], **others: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-I", "-c"] and others["env"]["HF_HUB_OFFLINE"] == "1"
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "cria_prune", sys.modules["cria_prune"])
            try:
                reload.main(Path(command[-1]))
            except Exception as error:
                return subprocess.CompletedProcess(command, 1, "", f"{type(error).__name__}: {error}")
        return subprocess.CompletedProcess(command, 0, "", "")

    here = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(certificate, "subprocess", here)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a tokenizer, a card, and what must not be copied."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "a", "cria", "grows"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "dense"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "repetition_penalty": 1.3}))
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en, fr]\ntags: [llm, 'x: {y}', cria]\n"
        "widget: [{text: secret}]\n---\n# Dense\nsecret\n"
    )
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_dense.py").write_text("raise SystemExit")
    (tmp_path / "outside.txt").write_text("secret")
    (folder / "vocab.txt").symlink_to(tmp_path / "outside.txt")
    (folder / "spiece.model").mkdir()
    return folder


def left_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


FRESH = {"mistral", "llama as mistral", "vit"}
"""Loaded in a process of their own; the others in this one."""


@pytest.mark.parametrize("name", MODELS)
def test_plain_transformers_loads_what_was_pruned(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if name not in FRESH:
        request.getfixturevalue("same_process")
    model, plan = pruned(name)
    found = save_pretrained(tmp_path / "small", model, plan, results={"loss": 1.5})
    kind, loader = MODELS[name][0], MODELS[name][4]
    assert (found.loader, found.equal, found.difference, found.relative) == (loader, True, 0.0, 0.0)
    assert found.container == ("mistral" if "as mistral" in name else None)
    assert found.architecture == (kind.replace("Llama", "Mistral") if found.container else kind)
    assert found.tokens == found.same_tokens == (8 if "LM" in loader else None)
    assert "logits" in found.outputs and "\n" not in str(found)
    again = getattr(transformers, loader).from_pretrained(tmp_path / "small")
    inputs = example_inputs(model)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert read_plan(tmp_path / "small") == plan
    written = json.loads((tmp_path / "small" / "certificate.json").read_text())
    assert written["sha256"].keys() == {"config.json", "model.safetensors"}
    assert written["equal"] and written["loader"] == loader
    assert left_in(tmp_path) == ["small"]


def test_inspect_shows_a_saved_folder(tmp_path: Path, no_process: None) -> None:
    model, plan = pruned("llama as mistral")
    save_pretrained(tmp_path / "small", model, plan)
    found = CliRunner().invoke(app, ["inspect", str(tmp_path / "small"), "--json"])
    assert found.exit_code == 0, found.output
    assert f'"parameters": {sum(item.numel() for item in model.parameters())}' in found.output


def test_positions_beyond_the_original_ones_are_the_same_in_a_container() -> None:
    model, _ = pruned("llama as mistral")
    held = container(model)
    ids = torch.randint(3, 99, (2, 120))
    assert type(held).__name__ == "MistralForCausalLM" and held.config.sliding_window is None
    assert torch.equal(held(input_ids=ids).logits, model(input_ids=ids).logits)
    assert held.lm_head.weight is held.model.embed_tokens.weight
    assert held.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert held.config.rope_parameters == model.config.rope_parameters
    whole = built("llama")
    assert container(whole) is whole


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias"])
def test_a_llama_with_biases_fits_no_mistral(field: str, tmp_path: Path) -> None:
    model, plan = pruned("llama as mistral")
    setattr(model.config, field, True)
    with pytest.raises(CertificateError, match=r"LlamaConfig refuses what is left.*multiple of the number"):
        save_pretrained(tmp_path / "small", model, plan)
    assert left_in(tmp_path) == []


def test_shards_and_tokenizer_load_where_cria_cannot_be_imported(
    tmp_path: Path, source: Path, same_process: None
) -> None:
    model, plan = pruned()
    found = save_pretrained(tmp_path / "small", model, plan, source=source, max_shard_size="20KB")
    assert found.left_out == ("vocab.txt (a link)", "spiece.model (no regular file)")
    names = left_in(tmp_path / "small")
    assert sum(name.startswith("model-0") for name in names) > 1 and "model.safetensors.index.json" in names
    assert set(names) - set(found.sha256) == {
        *("README.md", "certificate.json", "cria.json", "generation_config.json"),
        *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert "repetition_penalty" in (tmp_path / "small" / "generation_config.json").read_text()
    assert not any("secret" in (tmp_path / "small" / name).read_text(errors="replace") for name in names)
    program = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'cria_prune': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "words = AutoTokenizer.from_pretrained(sys.argv[1])('a cria grows', return_tensors='pt')\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(model.generate(words['input_ids'], max_new_tokens=2).shape, 'cria_prune' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(tmp_path / "small")], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "torch.Size([1, 5]) False", done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_stay(dtype: torch.dtype, tmp_path: Path, same_process: None) -> None:
    model, plan = pruned()
    frequencies = model.model.rotary_emb.inv_freq
    model.to(dtype).model.rotary_emb.inv_freq = frequencies  # float32, as loading leaves them
    found = save_pretrained(tmp_path / "small", model, plan)
    assert found.equal and found.dtype == str(dtype).removeprefix("torch.")
    assert found.tolerance == (2e-2 if dtype is torch.bfloat16 else 1e-5)


def wrong_values(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(tensors, path, metadata={"format": "pt"})


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def with_a_tensor_more(path: Path) -> None:
    save_file({**load_file(path), "model.more": torch.ones(2)}, path, metadata={"format": "pt"})


def of_another_shape(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(47)
    save_file(tensors, path, metadata={"format": "pt"})


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES: dict[Callable[[Path], None], str] = {
    wrong_values: r"outputs differ by \S+ relative to the largest, 1e-05 is allowed",
    without_a_tensor: r"1 missing keys \(model\.layers\.1\.mlp\.down_proj\.weight\)",
    with_a_tensor_more: r"1 unexpected keys \(model\.more\)",
    of_another_shape: r"mismatch|model\.norm\.weight",
    cut_short: r"the process ends with 1: .*",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_certificate_that_fails_leaves_nothing(
    damage: Callable[[Path], None], tmp_path: Path, same_process: None
) -> None:
    model, plan = pruned()
    with (
        at("certify", 1, lambda event: damage(event.facts["folder"] / "model.safetensors")),
        pytest.raises(CertificateError, match=f"Loading the saved folder.*{DAMAGES[damage]}"),
    ):
        save_pretrained(tmp_path / "runs" / "small", model, plan)
    assert left_in(tmp_path) == []


def test_the_fresh_process_has_no_cria(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        Path(reload.__file__)
        .read_text()
        .replace("import transformers\n", "import transformers, cria_prune\n")
    )
    (tmp_path / "program.py").write_text(program)
    monkeypatch.setattr(certificate.reload, "__file__", str(tmp_path / "program.py"))
    model, plan = pruned()
    with pytest.raises(CertificateError, match=r"ModuleNotFoundError: import of cria_prune halted"):
        save_pretrained(tmp_path / "small", model, plan)


def test_other_tokens_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_process: None) -> None:
    there = certificate._there

    def other(*args: Any) -> Any:
        answer, found = there(*args)
        found["generated"][0, -3] += 1
        found["logits"] += noise
        return answer, found

    monkeypatch.setattr(certificate, "_there", other)
    model, plan = pruned()
    noise = 0.0
    with pytest.raises(CertificateError, match="of 8 generated tokens 5 are the same"):
        save_pretrained(tmp_path / "small", model, plan)
    noise = 1e-3  # half types that differ in their last bits may go on otherwise
    found = save_pretrained(tmp_path / "half", model.to(torch.bfloat16), plan)
    assert (found.equal, found.same_tokens, found.tokens) == (False, 5, 8)
    assert "outputs within" in str(found) and "5 of 8 generated tokens equal" in str(found)


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "LIMIT", 0.2)
    model, plan = pruned()
    with pytest.raises(CertificateError, match=r"it is not loaded after 0\.2 s"):
        save_pretrained(tmp_path / "small", model, plan)
    assert left_in(tmp_path) == []


def test_values_that_are_no_numbers_cannot_be_vouched_for(tmp_path: Path) -> None:
    model, plan = pruned("bert")
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(CertificateError, match="its output 'logits' holds NaN"):
        save_pretrained(tmp_path / "small", model, plan)


def test_layers_that_differ_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = built("mistral")
    groups = discover(model, example_inputs(model))
    plan = make_plan(
        groups, {"model.layers.0.mlp.gate_proj": range(30), "model.layers.1.mlp.gate_proj": range(20)}
    )
    with pytest.raises(
        CertificateError,
        match=r"'model\.layers\.1\.mlp\.gate_proj' keeps 20 units, "
        r"'model\.layers\.0\.mlp\.gate_proj' keeps 30 units\. "
        r"One MistralConfig describes all layers: prune with uniform=True",
    ):
        save_pretrained(tmp_path / "runs" / "small", apply(model, plan), plan)
    assert left_in(tmp_path) == []


def test_a_group_that_no_field_counts_is_named(tmp_path: Path) -> None:
    model = built("bert")
    groups = discover(model, example_inputs(model))
    plan = make_plan(groups, {"bert.pooler.dense": range(10)})
    with pytest.raises(
        CertificateError, match=r"'bert\.pooler\.dense\.weight' is \(10, 48\).*\(48, 48\) there"
    ):
        save_pretrained(tmp_path / "small", apply(model, plan), plan)


def test_the_model_is_left_as_it_was(tmp_path: Path, same_process: None) -> None:
    model, plan = pruned("gpt2")
    model.train()
    before = (model.config.to_dict(), model.generation_config.to_dict(), dict(model.state_dict()))
    save_pretrained(tmp_path / "small", model, plan)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before[:2]
    assert all(
        tensor is before[2][name] or torch.equal(tensor, before[2][name])
        for name, tensor in model.state_dict().items()
    )
    assert all(module.training for module in model.modules())
    assert json.loads((tmp_path / "small" / "config.json").read_text())["n_inner"] == 96


def test_a_taken_place_stays_as_it_is(tmp_path: Path, no_process: None) -> None:
    model, plan = pruned()
    place = tmp_path / "small"
    place.mkdir()
    save_pretrained(place, model, plan)  # empty: free
    with pytest.raises(
        ArtifactError, match=r"not empty \(README\.md, certificate\.json, config\.json, \.\.\.\)"
    ):
        save_pretrained(place, model, plan)
    old = (place / "cria.json").read_bytes()
    save_pretrained(place, model, plan, results={"second": 2}, overwrite=True)
    assert (place / "cria.json").read_bytes() != old
    (place / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"it holds notes\.txt, so not all of it was written by Cria"):
        save_pretrained(place, model, plan, overwrite=True)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"it has no cria\.json"):
        save_pretrained(tmp_path / "plain", model, plan, overwrite=True)
    with pytest.raises(ArtifactError, match="a file of that name"):
        save_pretrained(place / "notes.txt", model, plan, overwrite=True)
    assert left_in(tmp_path) == ["plain", "small"] and (place / "notes.txt").read_text() == "mine"


def interrupted(*args: Any, **others: Any) -> Any:
    raise KeyboardInterrupt


def full(*args: Any, **others: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_in_safetensors(*args: Any, **others: Any) -> Any:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("cria_prune.artifact.pretrained.certify", interrupted),
        ("cria_prune.artifact.pretrained.render_card", full),
        ("transformers.modeling_utils.safe_save_file", full),
        ("transformers.modeling_utils.safe_save_file", full_in_safetensors),
        ("cria_prune.base.files.flush", full),
        ("cria_prune.base.files.os.fsync", interrupted),
    ],
)
def test_what_stops_in_between_leaves_the_old_folder_or_none(
    overwrite: bool, where: str, fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_process: None
) -> None:
    model, plan = pruned()
    if overwrite:
        save_pretrained(tmp_path / "small", model, plan, results={"old": 1})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(where, fault)
    with pytest.raises(KeyboardInterrupt if fault is interrupted else ArtifactError) as error:
        save_pretrained(tmp_path / "small", model, plan, overwrite=overwrite)
    assert fault is interrupted or "No space left on device" in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert left_in(tmp_path) == (["small"] if overwrite else [])


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_brings_the_old_folder_back(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_process: None
) -> None:
    model, plan = pruned()
    save_pretrained(tmp_path / "small", model, plan, results={"old": 1})
    replace, calls = os.replace, iter(range(1, 9))

    def refuse(*args: Any) -> None:
        if next(calls) == failing:
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(*args)

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(ArtifactError, match="busy"):
        save_pretrained(tmp_path / "small", model, plan, overwrite=True)
    assert left_in(tmp_path) == ["small"]
    assert json.loads((tmp_path / "small" / "cria.json").read_text())["results"] == {"old": 1}


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path, no_process: None) -> None:
    model, plan = pruned()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_pretrained(tmp_path / "link", model, plan)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "cria.json").is_file()


def test_links_of_the_hub_cache_lead_to_its_own_blobs_only(tmp_path: Path) -> None:
    snapshot, target = tmp_path / "models--a--b" / "snapshots" / "1f", tmp_path / "target"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    target.mkdir()
    (tmp_path / "models--a--b" / "blobs" / "77").write_text("{}")
    (tmp_path / "outside").write_text("secret")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/77")
    (snapshot / "vocab.json").symlink_to("../../../outside")
    (snapshot.parent.parent / "blobs" / "78").write_text("---\nlicense: [mit, apache-2.0]\n---\n")
    (snapshot / "README.md").symlink_to("../../blobs/78")
    assert source_metadata(snapshot) == {"license": ["mit", "apache-2.0"]}
    (target / "README.md").symlink_to(snapshot.parent.parent / "blobs" / "78")
    assert source_metadata(target) == {}
    (target / "README.md").unlink()
    (snapshot / "merges.txt").symlink_to("../../blobs/missing")
    os.mkfifo(snapshot / "chat_template.jinja")
    left = copy_known(snapshot, target)
    assert left_in(target) == ["tokenizer.json"] and not (target / "tokenizer.json").is_symlink()
    assert left == ("vocab.json (a link)", "merges.txt (a link)", "chat_template.jinja (no regular file)")
    with pytest.raises(ArtifactError, match="it is no folder"):
        copy_known(tmp_path / "nowhere", target)


def test_the_card_says_what_was_done(tmp_path: Path, source: Path, no_process: None) -> None:
    model, plan = pruned("llama as mistral")
    card = Card(
        base="llamas/dense",
        command=["cria", "prune", "my model", "--reduction", "0.3"],
        measured=[{"model": "dense", "perplexity": 6.25}, {"model": "a|b\n", "perplexity": 12345.0}],
        repaired=["half came back", "a|b needs more"],
    )
    save_pretrained(tmp_path / "small", model, plan, source=source, card=card)
    text = (tmp_path / "small" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": ["en", "fr"],
        "base_model": "llamas/dense",
        "tags": ["llm", "cria", "pruned"],
    }
    before, after = (
        sum(item.numel() for item in one.parameters()) for one in (built("llama as mistral"), model)
    )
    assert f"{before:,} parameters before, {after:,} after" in body
    assert "| `model.layers.0-1.self_attn.q_proj` | 8 | 5 | 37.5% |" in body
    assert "| a\\|b | 1.234e+04 |" in body and "| dense | 6.25 |" in body
    assert "    cria prune 'my model' --reduction 0.3" in body
    assert "\nHalf came back. A\\|b needs more.\n" in body
    assert "AutoModelForCausalLM.from_pretrained" in body and "secret" not in text
    assert "apache-2.0, as the card of the dense model says" in body
    assert "Tried with transformers 5; with no other versions. Settings that transformers 4 reads" in body
    assert "for it too: `torch_dtype`, `rope_theta`, `rope_scaling`, `tokenizer_class`." in body
    assert "PreTrainedTokenizerFast" in (tmp_path / "small" / "tokenizer_config.json").read_text()


def test_nothing_says_where_on_a_machine_it_was_made(
    tmp_path: Path, source: Path, no_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = pruned()
    where = str(tmp_path / "models" / "dense one")
    made = provenance(0, ["cria", "prune", where, "--output", "runs/a"])
    card = Card(base=where, command=["cria", "prune", where], changed=f"refitted on {tmp_path}/x.txt, twice")
    (source / "config.json").write_text(json.dumps({"_name_or_path": "llamas/first"}))
    save_pretrained(
        tmp_path / "small", model, plan, source=source, card=card, provenance=made,
        config=PruneConfig(plan={"latency_table": f"{tmp_path}/times.json"}),
        results={"checkpoint": where, "output": "runs/a", "further": {"pruned": {"note": f"see {where}"}}},
    )  # fmt: skip
    for name in ("cria.json", "README.md", "certificate.json", "config.json"):
        assert str(tmp_path) not in (tmp_path / "small" / name).read_text(), name
    said = json.loads((tmp_path / "small" / "cria.json").read_text())
    assert said["provenance"]["command"] == ["cria", "prune", "dense one", "--output", "runs/a"]
    assert said["results"]["checkpoint"] == "dense one" and said["results"]["output"] == "runs/a"
    assert said["config"]["plan"]["latency_table"] == "times.json"
    text = (tmp_path / "small" / "README.md").read_text()
    assert "cria prune 'dense one'" in text and "refitted on x.txt, twice" in text
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "llamas/first"
    cached = tmp_path / "models--llamas--third" / "snapshots" / "0a"
    shutil.copytree(source, cached, ignore=shutil.ignore_patterns("vocab.txt"))
    save_pretrained(tmp_path / "other", model, plan, source=cached)
    assert "base_model: llamas/third" in (tmp_path / "other" / "README.md").read_text()


TASKED = {
    "BertModel": "feature-extraction", "BertForMaskedLM": "fill-mask",
    "BertForTokenClassification": "token-classification", "ViTModel": "image-feature-extraction",
    "BertForSequenceClassification": "text-classification", "T5ForConditionalGeneration": None,
    "WhisperForConditionalGeneration": "automatic-speech-recognition",
    "ViTForImageClassification": "image-classification", "BertForQuestionAnswering": "question-answering",
}  # fmt: skip


@pytest.mark.parametrize("kind", TASKED)
def test_the_card_names_the_task(kind: str) -> None:
    known = getattr(transformers, kind)
    with torch.device("meta"):
        model = known(known.config_class())
    plain = vouched(Path(), model, None)
    assert _tag(model, {}, plain) == TASKED[kind]
    assert _tag(model, {"pipeline_tag": "text-ranking"}, plain) == "text-ranking"
    assert _tag(model, {}, replace(plain, embedded="x")) == "sentence-similarity"


def test_the_command_comes_from_the_provenance(tmp_path: Path, no_process: None) -> None:
    model, plan = pruned()
    save_pretrained(tmp_path / "small", model, plan, provenance={"command": "cria run x"})
    text = (tmp_path / "small" / "README.md").read_text()
    assert "    cria run x" in text and yaml.safe_load(text.split("---\n")[1])["tags"] == ["cria", "pruned"]


@pytest.mark.parametrize(
    "head",
    [
        "license: [",
        "- 1",
        "license: {a: b}\ntags: 3",
        "license: 'a\n\n  b'\ntags: ['x\\ny', '']",
        "",
        "!!python/x y",
    ],
)
def test_a_strange_card_gives_nothing(head: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    assert source_metadata(tmp_path) in ({}, {"tags": ["x\\ny"]})


def test_parameters_are_counted_once_and_from_the_plan() -> None:
    for name in ("llama as mistral", "t5", "gpt2"):
        model, plan = pruned(name)
        dense = sum(item.numel() for item in built(name).parameters())
        assert parameter_counts(model, plan) == (dense, sum(item.numel() for item in model.parameters()))
    model = built("mistral")
    groups = discover(model, example_inputs(model))
    plan = make_plan(groups, {"model.embed_tokens": range(20), "model.layers.0.mlp.gate_proj": range(7)})
    after = sum(item.numel() for item in apply(model, plan).parameters())
    assert parameter_counts(apply(model, plan), plan) == (model.num_parameters(), after)


@pytest.mark.parametrize(
    ("kind", "loader"),
    [
        ("BertForPreTraining", "AutoModelForPreTraining"),
        ("BertModel", "AutoModel"),
        ("BertForMaskedLM", "AutoModelForMaskedLM"),
        ("BertLMHeadModel", "AutoModelForCausalLM"),
        ("BertForTokenClassification", "AutoModelForTokenClassification"),
        ("BertForNextSentencePrediction", "AutoModelForNextSentencePrediction"),
    ],
)
def test_every_architecture_has_its_loader(kind: str, loader: str) -> None:
    with torch.device("meta"):
        model = getattr(transformers, kind)(transformers.BertConfig(**ENCODER, vocab_size=99))
    assert loader_of(model) == loader


def test_what_writes_text_is_loaded_as_that() -> None:
    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim", "vocab_size"), 16)
    with torch.device("meta"):
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes))
    assert loader_of(model) == "AutoModelForSeq2SeqLM"


def test_a_class_that_no_auto_class_knows_loads_itself() -> None:
    with torch.device("meta"):
        model = transformers.T5EncoderModel(transformers.T5Config(**MODELS["t5"][2]))
    model.__class__ = type("T5Other", (type(model),), {})
    assert loader_of(model) == "T5Other"


def test_what_is_no_model_of_transformers_is_refused(tmp_path: Path, no_process: None) -> None:
    model, plan = pruned()
    for other in (nn.Linear(2, 2), type("Mine", (type(model),), {})(model.config)):
        with pytest.raises(
            ArtifactError, match=r"its class is not one of transformers\. Use cria_prune\.save"
        ):
            save_pretrained(tmp_path / "small", other, plan)
    with pytest.raises(ArtifactError, match="its tensors have no values"):
        save_pretrained(tmp_path / "small", load_pretrained_on_meta(tmp_path, model), plan)
    with pytest.raises(ArtifactError, match=r"Writing cria\.json: something in it is no JSON"):
        save_pretrained(tmp_path / "small", model, plan, results={"loss": float("nan")})
    with pytest.raises(DataError, match="Give the keyword arguments of the forward as a mapping of tensors"):
        certificate.certify(tmp_path, model, torch.ones(2), stored=model)
    with pytest.raises(ArtifactError, match=r"Reading .*cria\.json"):
        read_plan(tmp_path)


def load_pretrained_on_meta(folder: Path, model: nn.Module) -> nn.Module:
    model.config.save_pretrained(folder / "shapes")
    return load_pretrained(folder / "shapes", meta=True)


def test_settings_that_transformers_refuses_to_write_are_named(
    tmp_path: Path, source: Path, no_process: None
) -> None:
    model, plan = pruned()
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, False
    with pytest.raises(ArtifactError, match="transformers stops with ValueError"):
        save_pretrained(tmp_path / "small", model, plan)
    save_pretrained(tmp_path / "small", model, plan, source=source)  # the source's settings are taken
