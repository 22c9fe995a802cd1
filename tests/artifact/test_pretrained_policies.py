"""Per-layer and padded folders: any plan of a Hugging Face model, for Cria or for plain transformers."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.artifact.test_pretrained import MODELS, built, left_in, same_process  # noqa: F401
from torch import nn
from watching import interrupted_at

from cria_prune import PlanConfig, discover, load, plan, save_padded, save_pretrained
from cria_prune.artifact import pretrained
from cria_prune.artifact.certificate import Certificate
from cria_prune.artifact.layers import dense_twin, empty_model, fill, layered, unlayered
from cria_prune.artifact.padded import padded
from cria_prune.base.errors import ArtifactError, CertificateError, ConfigError
from cria_prune.base.files import hashes
from cria_prune.planning.plan import Plan, make_plan
from cria_prune.structure.groups import UnitGroups, without_residual
from cria_prune.surgery.removal import apply
from cria_prune.surgery.verify import mask
from cria_prune.tasks.loading import example_inputs

transformers = pytest.importorskip("transformers")

FAMILIES = ("bert", "mistral", "llama as mistral", "gpt2", "t5", "vit")
GLOBAL = "mistral"
"""Planned by one ranking over all layers; the others lose chosen shares."""

LAYERS: dict[str, Any] = {
    "bert": {
        "0": {"head_dim": 12, "intermediate_size": 24, "num_attention_heads": 3},
        "1": {"head_dim": 12, "intermediate_size": 32, "num_attention_heads": 1},
    },
    GLOBAL: None,
    "gpt2": {
        "0": {"head_dim": 12, "n_head": 3, "n_inner": 115},
        "1": {"head_dim": 12, "n_head": 1, "n_inner": 153},
    },
    "t5": None,  # a number is a layer of the encoder and one of the decoder
}
WIDEST: dict[str, dict[str, Any]] = {
    "bert": {"num_attention_heads": 4, "intermediate_size": 32},  # it has no field for the size of a head
    "llama as mistral": {"num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 32},
    "gpt2": {"n_head": 4, "n_inner": 153},
    "t5": {"num_heads": 3, "d_ff": 32},
    "vit": {"num_attention_heads": 3, "intermediate_size": 32, "head_dim": 12},
}


@cache
def structure(name: str) -> UnitGroups:
    model = built(name)
    return without_residual(discover(model, example_inputs(model)))


@cache
def cut_once(name: str) -> tuple[nn.Module, Plan]:
    """Layers of a kind lose different units, and different numbers of them."""
    groups = structure(name)
    if name == GLOBAL:
        generator = np.random.default_rng(0)
        scores = {group.name: generator.random(group.size) for group in groups.prunable}
        chosen = plan(groups, scores, PlanConfig(reduction=0.2, ranking="global"))
    else:
        generator = np.random.default_rng(1)
        kept = {}
        for group in groups.prunable:
            if any(character.isdecimal() for character in group.name):
                late, head = ".1." in group.name, group.kind in ("head", "kv group")
                share = (0.375 if late else 0.8) if head else (0.8 if late else 0.6)
                count = max(1, int(group.size * share))
                kept[group.name] = generator.permutation(group.size)[:count]
        chosen = make_plan(groups, kept)
    return apply(built(name), chosen), chosen


def pruned(name: str) -> tuple[nn.Module, Plan]:
    model, chosen = cut_once(name)
    return copy.deepcopy(model), chosen


def vouched(folder: Path, model: nn.Module, example: Any, **others: Any) -> Certificate:
    """In place of `certify` where the fresh process is not what is tested."""
    loader = "cria_prune.load" if others["policy"] == "per-layer" else "AutoModel"
    return Certificate(
        loader, type(model).__name__, None, ("logits",), True, 0.0, 0.0, 1e-5, 8, 8,
        "float32", "cpu", "sdpa", {"transformers": "5"}, hashes(folder), 0.1, others.get("left_out", ()),
        notes=others.get("notes", ()),
    )  # fmt: skip


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "certify", vouched)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A per-layer BERT in three shards; copied before it is damaged."""
    place = tmp_path_factory.mktemp("shelf") / "bert"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "certify", vouched)
        save_pretrained(place, *pruned("bert"), policy="per-layer", max_shard_size="60KB")
    return place


@pytest.fixture
def folder(shelf: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shelf, tmp_path / "bert"))


def test_a_fresh_process_loads_with_cria_what_differs_by_layer(tmp_path: Path) -> None:
    model, chosen = pruned("bert")
    found = save_pretrained(tmp_path / "small", model, chosen, policy="per-layer")
    assert (found.loader, found.equal, found.alone, found.zeros) == ("cria_prune.load", True, False, None)
    assert found.parameters == found.stored == sum(item.numel() for item in model.parameters())
    assert str(found).startswith("cria_prune.load with transformers ") and "alone" not in str(found)


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("name", LAYERS)
def test_a_per_layer_folder_is_the_pruned_model(name: str, tmp_path: Path) -> None:
    model, chosen = pruned(name)
    dense = built(name).config
    found = save_pretrained(tmp_path / "small", model, chosen, policy="per-layer")
    assert found.equal and found.same_tokens == found.tokens
    again = load(tmp_path / "small")
    assert again.plan == chosen and again.manifest["policy"] == "per-layer" and not again.model.training
    inputs = example_inputs(model)
    assert torch.equal(again.model(**inputs).logits, model(**inputs).logits)
    assert again.model.state_dict().keys() == model.state_dict().keys()
    assert unlayered(again.model.config).to_diff_dict().keys() >= {"model_type", "architectures"}
    written = json.loads((tmp_path / "small" / "config.json").read_text())
    layers = written.pop("per_layer_config", None)
    if name == GLOBAL:
        for group, stays in chosen.kept.items():
            field = "intermediate_size" if "mlp" in group else "num_key_value_heads"
            said = (
                layers[group.split(".")[2]].get(field, chosen.sizes[group]) if ".layers." in group else None
            )
            assert said in (None, len(stays))
    else:
        assert layers == LAYERS[name]
    assert all(written[key] == dense.to_dict()[key] for key in written if "size" in key or "head" in key)
    with pytest.raises(
        Exception, match=r"per-layer attribute|ignore_mismatched_sizes"
    ):  # never a wrong model
        getattr(transformers, MODELS[name][4]).from_pretrained(tmp_path / "small")
    card = (tmp_path / "small" / "README.md").read_text()
    assert "does not build it yet" in card and 'load("path/to/this/folder").model' in card
    assert "library_name: cria-prune" in card and left_in(tmp_path) == ["small"]


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_equals_masked(name: str) -> None:
    dense, chosen = built(name).double(), cut_once(name)[1]
    model, inputs = apply(dense, chosen), example_inputs(dense)
    inputs = {key: item.double() if item.is_floating_point() else item for key, item in inputs.items()}
    twin = padded(model, chosen, dense_twin(model, chosen, None, ""), example_inputs(dense), "")
    if name != GLOBAL:
        assert {key: getattr(twin.config, key) for key in WIDEST[name]} == WIDEST[name]
    with torch.no_grad():
        ours, masked, smaller = (item(**inputs).logits for item in (twin, mask(dense, chosen), model))
    assert torch.allclose(ours, masked, rtol=0, atol=1e-6 * float(masked.abs().max()))  # rotary is float32
    assert torch.allclose(ours, smaller, rtol=0, atol=1e-12 * float(smaller.abs().max()))
    assert all(item.dtype == torch.float64 for item in twin.parameters())
    one, other = (
        sum(float(item.detach().square().sum()) for item in net.parameters()) for net in (twin, model)
    )
    assert one == pytest.approx(other, rel=1e-12)  # all that was added is zero


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("name", ["bert", "llama as mistral"])
def test_plain_transformers_loads_a_padded_folder(name: str, tmp_path: Path) -> None:
    model, chosen = pruned(name)
    found = save_padded(tmp_path / "wide", model, chosen, max_shard_size="60KB")
    assert found.loader == MODELS[name][4] and found.alone and found.container is None
    again = getattr(transformers, found.loader).from_pretrained(tmp_path / "wide")
    inputs = example_inputs(model)
    assert torch.allclose(again(**inputs).logits, model(**inputs).logits, atol=1e-6)
    assert type(again) is type(model)
    assert found.stored == sum(item.numel() for item in again.parameters()) > found.parameters
    said = f"stores {found.stored:,} parameters for {found.parameters:,} ("
    assert said in str(found) and f"This folder {said}" in (tmp_path / "wide" / "README.md").read_text()
    assert "are zeros that pad" in str(found) and f'"stored": {found.stored}' in found.to_json()
    back = load(tmp_path / "wide")
    assert back.plan == chosen and back.manifest["policy"] == "padded"
    assert torch.equal(back.model(**inputs).logits, again(**inputs).logits)


def test_values_types_ties_and_buffers_are_those_that_were_saved(tmp_path: Path, no_process: None) -> None:
    model, chosen = pruned("llama as mistral")
    frequencies = model.model.rotary_emb.inv_freq
    model.to(torch.bfloat16).model.rotary_emb.inv_freq = frequencies
    source = tmp_path / "dense"
    source.mkdir()
    (source / "generation_config.json").write_text('{"eos_token_id": 2, "repetition_penalty": 1.3}')
    save_pretrained(tmp_path / "small", model, chosen, policy="per-layer", source=source)
    layers = json.loads((tmp_path / "small" / "config.json").read_text())["per_layer_config"]
    assert [layer["num_attention_heads"] for layer in layers.values()] == [6, 3]
    again: Any = load(tmp_path / "small").model
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.model.rotary_emb.inv_freq, frequencies)
    assert all(item.dtype == torch.bfloat16 and item.requires_grad for item in again.parameters())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert again.generation_config.repetition_penalty == 1.3
    again(**example_inputs(again), labels=torch.ones(2, 16, dtype=torch.long)).loss.backward()
    other = load(tmp_path / "small", model=built("llama as mistral")).model
    assert torch.equal(other.lm_head.weight, again.lm_head.weight)
    save_pretrained(
        tmp_path / "again", again, chosen, policy="per-layer"
    )  # a loaded one is like a pruned one


def test_a_vanilla_folder_is_loaded_with_its_plan(tmp_path: Path, no_process: None) -> None:
    groups = structure("vit")
    even = make_plan(groups, {group.name: range(3) for group in groups.prunable if group.kind == "head"})
    small = apply(built("vit"), even)
    save_pretrained(tmp_path / "small", small, even)
    again = load(tmp_path / "small")
    assert again.plan == even and again.manifest["policy"] == "vanilla"
    assert torch.equal(again.model(**example_inputs(small)).logits, small(**example_inputs(small)).logits)
    old = json.loads((tmp_path / "small" / "cria.json").read_text())
    del old["policy"]  # written before there were others
    (tmp_path / "small" / "cria.json").write_text(json.dumps(old))
    assert load(tmp_path / "small").plan == even


def edited(folder: Path) -> None:
    name = next(folder.glob("*.safetensors"))
    tensors = load_file(name)
    next(iter(tensors.values())).add_(0.01)
    save_file(tensors, name, metadata={"format": "pt"})


def leading_out(folder: Path) -> None:
    shutil.copy(next(folder.glob("*.safetensors")), folder.parent / "x.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["bert.pooler.dense.weight"] = "../x.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def with_another_shard(folder: Path) -> None:
    shutil.copy(next(folder.glob("*.safetensors")), folder / "more.safetensors")


def without_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()

    damage.__name__ = f"without {name}"
    return damage


def saying(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "cria.json").read_text())
        (folder / "cria.json").write_text(json.dumps({**manifest, **values}))

    damage.__name__ = f"saying {list(values)}"
    return damage


def of_another_plan(folder: Path) -> None:
    """One neuron more stays, everywhere that it is counted: a valid plan, of another model."""
    groups, chosen = structure("bert"), cut_once("bert")[1]
    name = "bert.encoder.layer.0.intermediate.dense"
    more = sorted({*chosen.kept[name], *range(40)})[: len(chosen.kept[name]) + 1]
    saying(plan=make_plan(groups, {**chosen.kept, name: more}).to_dict())(folder)


def of_a_foreign_plan(folder: Path) -> None:
    saying(plan=cut_once("vit")[1].to_dict())(folder)


def of_an_unknown_class(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertOfMine"]}))
    certificate = json.loads((folder / "certificate.json").read_text())
    (folder / "certificate.json").write_text(json.dumps({**certificate, "sha256": hashes(folder)}))


DAMAGES: dict[Callable[[Path], None], str] = {
    edited: r"has SHA-256 \S+, certificate\.json says .*Copy the folder again",
    leading_out: r"names '\.\./x\.safetensors'\. Only safetensors in the folder itself",
    with_another_shard: r"certificate\.json does not vouch for more\.safetensors",
    without_a_shard: r"model-00001-of-\d+\.safetensors is missing",
    without("certificate.json"): r"certificate\.json cannot be read",
    without(
        "cria.json"
    ): r"Reading .*cria\.json: it cannot be read.*Give a folder that save_pretrained wrote",
    without("model.safetensors.index.json"): "it has neither model.safetensors nor",
    saying(version=9): r"found \('cria-pretrained', 9\)",
    saying(policy="zip"): "found the policy 'zip'",
    saying(plan={}): "Reading a plan",
    of_another_plan: r"intermediate\.dense\.weight' is \(24, 48\) float32, the model has \(25, 48\)",
    of_a_foreign_plan: "the plan does not fit it",
    of_an_unknown_class: r"has none of its architectures \['BertOfMine'\]\. Pass the dense model",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_not_what_was_saved_is_not_loaded(damage: Callable[[Path], None], folder: Path) -> None:
    damage(folder)
    with pytest.raises(ArtifactError, match=DAMAGES[damage]):
        load(folder)


def test_shards_are_read_and_another_dense_model_is_refused(folder: Path) -> None:
    assert len(list(folder.glob("model-0*.safetensors"))) > 1
    inputs = example_inputs(cut_once("bert")[0])
    assert torch.equal(load(folder).model(**inputs).logits, cut_once("bert")[0](**inputs).logits)
    with pytest.raises(ArtifactError, match="the plan does not fit it"):
        load(folder, model=built("vit"))


def test_names_and_kinds_of_numbers_are_checked() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    values = dict(model.state_dict())
    with pytest.raises(ArtifactError, match=r"'more' is not in the model; '0\.bias' is missing"):
        fill(
            model,
            {**{name: item for name, item in values.items() if name != "0.bias"}, "more": values["0.bias"]},
        )
    with pytest.raises(
        ArtifactError, match=r"'1\.num_batches_tracked' is \(\) int32, the model has \(\) int64"
    ):
        fill(model, {**values, "1.num_batches_tracked": torch.tensor(3, dtype=torch.int32)})


def test_an_empty_model_needs_no_memory_and_keeps_buffers_and_ties() -> None:
    config = built("llama as mistral").config
    state = torch.get_rng_state()
    model: Any = empty_model(transformers.LlamaForCausalLM, config)
    assert all(item.is_meta for item in model.parameters()) and torch.equal(torch.get_rng_state(), state)
    assert not any(item.is_meta for item in model.buffers())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not nn.Linear(2, 2).weight.is_meta  # the hook is gone


@pytest.mark.parametrize("policy", ["per-layer", "padded"])
def test_what_stops_leaves_nothing(policy: str, tmp_path: Path) -> None:
    error = CertificateError("Loading", "it differs", "Nothing was saved")
    with interrupted_at("certify", 1, error), pytest.raises(CertificateError, match="it differs"):
        saved(policy, tmp_path / "runs" / "small", *pruned("bert"))
    assert left_in(tmp_path) == []


def saved(policy: str, path: Path, model: nn.Module, chosen: Plan, **others: Any) -> Certificate:
    if policy == "padded":
        return save_padded(path, model, chosen, **others)
    return save_pretrained(path, model, chosen, policy="per-layer", **others)


@pytest.mark.parametrize("policy", ["per-layer", "padded"])
def test_a_plan_of_another_model_is_refused(policy: str, tmp_path: Path, no_process: None) -> None:
    model, chosen = pruned("bert")
    with pytest.raises(
        ArtifactError, match=r"the plan does not fit its dense model .*Pass the plan that made"
    ):
        saved(policy, tmp_path / "small", model, cut_once("vit")[1])
    with pytest.raises(
        ArtifactError, match=r"'bert\.\S+' is \(36, 48\), the plan makes \(48, 48\) of the dense"
    ):
        saved(policy, tmp_path / "small", model, make_plan(structure("bert"), {}))
    with pytest.raises(ArtifactError, match="the dense model cannot be built"):
        saved(policy, tmp_path / "small", model, chosen, dense_config=transformers.ViTConfig())
    assert left_in(tmp_path) == []
    saved(policy, tmp_path / "small", model, chosen, dense_config=built("bert").config)


def test_positions_of_another_structure_are_not_padded() -> None:
    model, chosen = pruned("bert")
    name = "bert.encoder.layer.0.intermediate.dense"
    gone = next(unit for unit in range(40) if unit not in chosen.kept[name])
    kept = tuple(sorted([gone, *chosen.kept[name][1:]]))  # units and positions say different things
    other = Plan(chosen.sizes, {**chosen.kept, name: kept}, chosen.cuts, {}, chosen.attributes)
    with pytest.raises(ArtifactError, match="its positions are others"):
        padded(model, other, dense_twin(model, other, None, ""), example_inputs(model), "Padding")
    unknown = Plan({**chosen.sizes, "x": 1}, {**chosen.kept, "x": (0,)}, chosen.cuts, {}, chosen.attributes)
    with pytest.raises(ArtifactError, match=r"does not fit the structure.*no such group"):
        padded(model, unknown, dense_twin(model, unknown, None, ""), example_inputs(model), "Padding")


def test_units_under_a_norm_are_not_padded(tmp_path: Path, no_process: None) -> None:
    model = built("mistral")
    chosen = make_plan(discover(model, example_inputs(model)), {"model.embed_tokens": range(40)})
    assert chosen.normed
    with pytest.raises(ArtifactError, match=r"over which a normalisation takes .*policy='per-layer'"):
        save_padded(tmp_path / "wide", apply(model, chosen), chosen)
    save_pretrained(tmp_path / "small", apply(model, chosen), chosen, policy="per-layer")
    assert left_in(tmp_path) == ["small"]
    assert load(tmp_path / "small").model.config.hidden_size == 40


def test_a_policy_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy='padded'.*save_padded pads with zeros"):
        save_pretrained(tmp_path / "small", *pruned("bert"), policy="padded")  # type: ignore[arg-type]


def test_what_the_schema_of_transformers_cannot_say_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, chosen = pruned("bert")
    example = example_inputs(model)
    dense: Any = dense_twin(model, chosen, None, "")
    groups = structure("bert")
    config, notes = layered(dense, make_plan(groups, {**chosen.kept, "bert.pooler.dense": range(9)}), example)
    assert config.is_heterogeneous and notes == ("per_layer_config does not count bert.pooler.dense",)
    with monkeypatch.context() as patch:
        patch.setattr(type(dense.config), "from_dict", lambda values: 1 / 0)
        config, notes = layered(dense, chosen, example)
    assert not config.is_heterogeneous
    assert notes == ("no per_layer_config: BertConfig refuses it, division by zero",)
    broken = {"input_ids": torch.ones(2, 4)}
    assert layered(dense, chosen, broken)[1][0].startswith("no per_layer_config: ")
