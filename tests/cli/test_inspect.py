"""`cria inspect`: where models come from, what is said about them, and that nothing foreign is run."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from cria_prune.base.errors import ArtifactError, ConfigError, CriaError, DataError
from cria_prune.cli.inspect import Node, inventory, module_tree
from cria_prune.cli.main import app
from cria_prune.cli.output import Breakable
from cria_prune.cli.target import load_source, parse_shape
from cria_prune.planning.budget import count_macs
from cria_prune.planning.plan import identity_plan, make_plan
from cria_prune.stages import discover
from cria_prune.structure.groups import shrink
from cria_prune.structure.table import Row, fold, merged
from cria_prune.surgery.removal import apply
from cria_prune.tasks.loading import example_inputs, load_pretrained
from networks import Mixed, Plain, randomize

transformers = pytest.importorskip("transformers")

WORDS = 60
TEXT = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"intermediate_size": 24, "max_position_embeddings": 40, "pad_token_id": 0}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
IMAGE |= {"image_size": 24, "patch_size": 8, "num_channels": 1}
SEQUENCE = {"vocab_size": WORDS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "pad_token_id": 0}
SEQUENCE |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24}
SEQUENCE |= {"decoder_ffn_dim": 24, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
GPT2 = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 24}
T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
WHISPER = {**SEQUENCE, "num_mel_bins": 20, "max_source_positions": 25, "max_target_positions": 30}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "BertForMaskedLM": ("BertConfig", TEXT, {"input_ids": (2, 16), "attention_mask": (2, 16)}),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {**GPT2, "bos_token_id": 1, "eos_token_id": 2},
        {"input_ids": (2, 12), "attention_mask": (2, 12)},
    ),
    "LlamaForCausalLM": (
        "LlamaConfig",
        {**TEXT, "num_key_value_heads": 2},
        {"input_ids": (2, 16), "attention_mask": (2, 16)},
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        T5,
        {"input_ids": (2, 16), "attention_mask": (2, 16), "decoder_input_ids": (2, 16)},
    ),
    "BartForSequenceClassification": (
        "BartConfig",
        {**SEQUENCE, "max_position_embeddings": 40},
        {"input_ids": (2, 16), "attention_mask": (2, 16), "decoder_input_ids": (2, 16)},
    ),
    "ViTForImageClassification": ("ViTConfig", IMAGE, {"pixel_values": (2, 1, 24, 24)}),
    "CLIPModel": (
        "CLIPConfig",
        {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 8},
        {"input_ids": (2, 16), "attention_mask": (2, 16), "pixel_values": (2, 1, 24, 24)},
    ),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        WHISPER,
        {"input_features": (2, 20, 50), "decoder_input_ids": (2, 16)},
    ),
    "Wav2Vec2ForCTC": ("Wav2Vec2Config", {**TEXT, "conv_dim": (8,) * 7}, {"input_values": (2, 8000)}),
}


def tiny(name: str) -> nn.Module:
    kind, options, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**options)
    return getattr(transformers, name)(config).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders as `save_pretrained` writes them, one per model class."""
    root = tmp_path_factory.mktemp("saved")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            tiny(name).save_pretrained(root / name)
        return root / name

    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cria(*words: str) -> Result:
    return CliRunner().invoke(app, ["inspect", *words])


def answer(*words: str) -> dict[str, Any]:
    result = cria(*words, "--json")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1
    return json.loads(result.stdout)


def table(*words: str, width: int = 100) -> str:
    """What a person sees: stdout without its last line, no line wider than the terminal."""
    result = CliRunner(env={"COLUMNS": str(width)}).invoke(app, ["inspect", *words])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()[:-1]
    assert max(map(len, lines)) <= width, max(lines, key=len)
    return "\n".join(lines)


# Examples


@pytest.mark.parametrize("name", MODELS)
def test_an_example_suits_the_model_and_is_the_same_every_time(name: str) -> None:
    model = tiny(name)
    inputs, again = example_inputs(model), example_inputs(model)
    assert {key: tuple(value.shape) for key, value in inputs.items()} == MODELS[name][2]
    assert all(torch.equal(value, again[key]) for key, value in inputs.items())
    with torch.no_grad():
        assert model(**inputs)
    for key in inputs.keys() & {"input_ids", "decoder_input_ids"}:
        assert inputs[key].min() >= 0 and inputs[key].max() < WORDS
        if model.config.get_text_config().pad_token_id is not None:
            assert (inputs[key] != 0).all()
    if name.startswith("Bart"):
        assert (inputs["input_ids"] == 2).sum(1).tolist() == [1, 1]


def test_the_shape_of_an_example_can_be_given() -> None:
    longer = example_inputs(tiny("BertForMaskedLM"), (1, 30))
    assert longer["input_ids"].shape == longer["attention_mask"].shape == (1, 30)
    both = example_inputs(tiny("CLIPModel"), (3, 10))
    assert both["input_ids"].shape == (3, 10) and both["pixel_values"].shape == (3, 1, 24, 24)
    with pytest.raises(DataError, match=r"takes 2 dimensions\. Give a shape like 2,16"):
        example_inputs(tiny("BertForMaskedLM"), (1, 3, 32, 32))


def test_a_language_model_that_reads_images_gets_text_alone_and_unknown_inputs_are_an_error() -> None:
    model = tiny("CLIPModel")
    model.config.image_token_id = 5
    assert "pixel_values" not in example_inputs(model)
    model.main_input_name = "point_clouds"
    with pytest.raises(DataError, match="its main input is 'point_clouds'"):
        example_inputs(model)


# Hugging Face folders


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ViTForImageClassification"])
def test_a_folder_gives_the_class_and_the_weights_that_were_saved(
    saved: Callable[[str], Path], name: str
) -> None:
    found, original = load_source(str(saved(name))), tiny(name)
    assert type(found.model).__name__ == name and not found.model.training
    assert found.kind == "hugging-face" and found.name == str(saved(name))
    state = found.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in original.state_dict().items())


def test_without_weights_or_with_meta_there_are_shapes_alone(
    saved: Callable[[str], Path], here: Path
) -> None:
    folder = saved("BertForMaskedLM")
    assert all(item.is_meta for item in load_pretrained(folder, meta=True).parameters())
    shutil.copy(folder / "config.json", here)
    model = load_pretrained(here)
    assert all(item.is_meta for item in (*model.parameters(), *model.buffers()))
    assert answer(str(here))["groups"] == answer(str(folder))["groups"]
    (here / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ArtifactError, match=r"pickles \(pytorch_model\.bin\).*pass --meta"):
        load_pretrained(here)
    assert next(load_pretrained(here, meta=True).parameters()).is_meta


def test_a_class_that_transformers_lacks_is_not_looked_for_elsewhere(
    saved: Callable[[str], Path], here: Path
) -> None:
    for names in (["BertConfig"], ["os"], ["NoSuchModel"], None):
        edited(saved("BertForMaskedLM"), here, architectures=names)
        assert type(load_pretrained(here, meta=True)).__name__ == "BertModel"


def test_code_in_a_folder_is_not_run_and_no_kernel_is_fetched(
    saved: Callable[[str], Path], here: Path
) -> None:
    code = "from pathlib import Path\nPath('ran').touch()\nclass Config: ...\n"
    (here / "evil.py").write_text(code)
    edited(saved("BertForMaskedLM"), here, model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(ArtifactError, match="models whose code lies in their folder are not run"):
        load_pretrained(here)
    assert not Path("ran").exists() and "evil" not in sys.modules
    edited(saved("BertForMaskedLM"), here, attn_implementation="someone/kernel")
    assert load_pretrained(here, meta=True).config._attn_implementation in ("sdpa", "eager")


def test_only_whole_plain_safetensors_beside_the_index_are_read(
    saved: Callable[[str], Path], here: Path
) -> None:
    folder = saved("BertForMaskedLM")
    shutil.copytree(folder, here, dirs_exist_ok=True)
    edited(folder, here, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ArtifactError, match="its weights are quantized"):
        load_pretrained(here)
    edited(folder, here, num_hidden_layers=4)
    with pytest.raises(ArtifactError, match=r"lack bert\.encoder\.layer\.3\..* and \d+ more, which BertFor"):
        load_pretrained(here)
    (here / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"transformers \S+ stops with"):
        load_pretrained(here)
    (here / "model.safetensors").unlink()
    for name in ("weights.bin", "../model.safetensors"):
        (here / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ArtifactError, match="Only safetensors in the folder itself are read"):
            load_pretrained(here)
    (here / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="it holds an adapter"):
        load_pretrained(here)


def test_without_transformers_the_error_names_the_extra(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = cria(str(here))
    assert result.exit_code == 2 and result.stdout == ""
    assert "pip install 'cria-prune[hf]'" in result.stderr


def edited(folder: Path, target: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))


# Functions, recipes, checkpoints


FACTORIES = """
import torch
from torch import nn
print("hello from the import")

def alone():
    print("hello from the function")
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).train()

def both():
    return alone(), torch.ones(3, 4)

class Holder:
    inner = staticmethod(alone)

built = nn.Linear(4, 2)
number = 3

def wrong():
    return {"model": alone()}

def needs(size):
    return nn.Linear(size, 2)
"""


@pytest.fixture
def factories(here: Path) -> str:
    """A module in the current folder, under a name of its own in every test."""
    name = f"nets_{here.name.replace('-', '_')}"
    (here / f"{name}.py").write_text(FACTORIES)
    return name


def test_a_function_of_the_current_folder_gives_the_model(factories: str) -> None:
    path = list(sys.path)
    found = load_source(f"{factories}:both")
    assert isinstance(found.example, torch.Tensor) and found.example.shape == (3, 4)
    assert not found.model.training and found.kind == "factory"
    assert isinstance(load_source(f"{factories}:alone", (5, 4)).example, torch.Tensor)
    assert load_source(f"{factories}:both", (5, 4)).example.shape == (5, 4)  # type: ignore[union-attr]
    assert load_source(f"{factories}:Holder.inner", (1, 4)).model
    assert load_source(f"{factories}:built", (1, 4)).model
    assert next(load_source(f"{factories}:alone", (1, 4), meta=True).model.parameters()).is_meta
    assert sys.path == path


def test_only_the_answer_is_on_stdout(factories: str) -> None:
    result = cria(f"{factories}:both", "--json")
    assert json.loads(result.stdout)["groups"][0]["units"] == 6
    assert "hello from the import" in result.stderr and "hello from the function" in result.stderr
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (":alone", "gave none. Pass its shape, as in --example 1,3,32,32"),
        (":wrong", "the function returned dict"),
        (":needs", "the function needs the argument"),
        (":number", "'number' is int"),
        (":nothing", "has no 'nothing'"),
        ("_other:alone", "there is no module"),
    ],
)
def test_errors_of_functions_say_which_step_failed(factories: str, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_source(factories + text)
    assert said in str(caught.value)


def test_errors_of_modules_are_their_own(here: Path) -> None:
    (here / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(ConfigError, match="importing 'needs_more' raised ModuleNotFoundError"):
        load_source("needs_more:net")
    (here / "raises.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="importing 'raises' raised ZeroDivisionError"):
        load_source("raises:net")


def test_recipes_checkpoints_and_nothing(here: Path) -> None:
    recipe = load_source("digits")
    assert recipe.kind == "recipe" and recipe.target is not None
    assert load_source("digits", (1, 1, 8, 8)).example.shape == (1, 1, 8, 8)  # type: ignore[union-attr]
    from cria_prune import save

    groups = discover(recipe.model, recipe.example)
    plan = make_plan(groups, {"conv1": range(5)})
    results = {"recipe": "digits"}
    save(here / "cut", apply(recipe.model, plan), plan, architecture="digits", results=results)
    found = answer("cut")
    assert (found["source"], found["recipe"]) == ("checkpoint", "digits")
    assert next(row for row in found["groups"] if row["name"] == "conv1")["units"] == 5
    with pytest.raises(ConfigError, match=r"found 'nope', which is no recipe and no folder.*digits"):
        load_source("nope")
    (here / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        load_source("empty")


@pytest.mark.parametrize("text", ["", "3,x", "1,,2", "1,0", "-1,3", "1.5"])
def test_a_shape_is_a_list_of_sizes(text: str) -> None:
    assert parse_shape(None) is None and parse_shape("1, 3,32") == (1, 3, 32)
    with pytest.raises(ConfigError, match="Give sizes like 1,3,32,32"):
        parse_shape(text)


# Costs


@pytest.mark.parametrize("network", [Plain, Mixed])
def test_what_a_unit_costs_is_what_leaves_with_it(network: type[nn.Module]) -> None:
    model, image = randomize(network()), torch.randn(2, 3, 8, 8)
    groups = discover(model, image)
    found = inventory(groups, floor=0.1)
    assert found.parameters == sum(item.numel() for item in model.parameters())
    loose = [row for row in found.rows if row.status != "frozen"]
    assert loose
    for row in loose:
        smaller = apply(model, make_plan(groups, {row.name: range(1, row.units)}))
        left = sum(item.numel() for item in smaller.parameters())
        assert found.parameters - left == row.parameters_per_unit, row.name
        assert found.macs - count_macs(discover(smaller, image)) == row.macs_per_unit, row.name


def test_the_shares_are_what_the_largest_cut_leaves() -> None:
    model, image = load_source("digits").model, load_source("digits").example
    groups = discover(model, image)
    for shares, kinds in (
        (inventory(groups, 0.25).removable, {"channel", "neuron"}),
        (inventory(groups, 0.25).removable_with_residual, {"channel", "neuron", "residual"}),
    ):
        kept = {item.name: range(item.size // 4) for item in groups.prunable if item.kind in kinds}
        smaller = apply(model, make_plan(groups, kept))
        left = sum(item.numel() for item in smaller.parameters())
        assert shares["parameters"] == pytest.approx(1 - left / 127082, abs=1e-12)


def test_a_group_of_one_unit_stays_and_says_so() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    found = inventory(shrink(discover(net, torch.randn(2, 4)), {"0": [2]}), 0.1)
    assert (found.rows[0].status, found.rows[0].frozen) == ("frozen", "has one unit, and one always stays")
    assert found.rows[0].parameters_per_unit is None
    assert found.removable == {"parameters": 0, "prunable": 0, "macs": 0}


# Folding


def row(layer: int, **changes: Any) -> Row:
    weight = f"model.layers.{layer}.mlp"
    made = Row(f"{weight}.up", "neuron", 8, "prunable", None, 3, 5.0, (f"{weight}.up.weight",),
               (f"{weight}.down.weight",))  # fmt: skip
    return replace(made, **changes)


def test_layers_that_are_alike_fold_and_no_difference_is_hidden() -> None:
    alike = fold([row(0), row(1), row(2)])
    assert [(item.row.name, item.layer, item.count) for item in alike] == [
        ("model.layers.0-2.mlp.up", "model.layers.0-2", 3)
    ]
    assert alike[0].row.consumers == ("model.layers.0-2.mlp.down.weight",)
    for changes in (
        {"units": 7},
        {"kind": "gated"},
        {"parameters_per_unit": 4},
        {"macs_per_unit": 6.0},
        {"producers": ("model.layers.0.mlp.up.weight",)},
        {"consumers": ("model.layers.2.mlp.down.weight",)},
        {"status": "frozen", "frozen": "is read"},
    ):
        folds = fold([row(0), row(1, **changes), row(2)])
        assert [item.row.name for item in folds] == ["model.layers.0,2.mlp.up", "model.layers.1.mlp.up"]


def test_reasons_fold_by_layer_and_show_the_range_of_what_was_measured() -> None:
    reasons = [f"fails in model.layers.{n}.mlp by {error}" for n, error in enumerate(("2e-03", "1e-05"))]
    folds = fold([row(n, status="frozen", frozen=text) for n, text in enumerate(reasons)])
    assert [item.row.frozen for item in folds] == ["fails in model.layers.0-1.mlp by 1e-05 to 2e-03"]
    other = fold([row(0, frozen="is read"), row(1, frozen="is written")])
    assert len(other) == 2


def test_numbers_inside_a_name_are_no_layers() -> None:
    assert merged(["conv1", "conv2"]) == ["conv1", "conv2"]
    assert merged(["layers.9.a", "layers.10.a"]) == ["layers.9-10.a"]
    assert merged(["encoder_layer_0.a", "encoder_layer_1.a", "x#2"]) == ["encoder_layer_0-1.a", "x#2"]
    assert len(fold([replace(row(0), name="net#1"), replace(row(0), name="net#2")])) == 2


# Tables and trees


@pytest.mark.parametrize("width", [80, 160])
def test_a_table_fits_the_terminal(saved: Callable[[str], Path], width: int) -> None:
    text = table(str(saved("LlamaForCausalLM")), width=width)
    assert "producers → consumers" in text and "3 ×" in text
    assert "mlp.{gate_proj, up_proj} → mlp.down_proj" in text
    table("cifar10-resnet20", "--all", width=width)
    assert "└── " in table(str(saved("BertForMaskedLM")), "--tree", width=width)


def test_a_table_says_what_can_leave_what_stays_and_how_much() -> None:
    text = table("digits")
    assert "DigitsNet: 127,082 parameters, 2,411,776 MACs per example\nexample: (2, 1, 8, 8)" in text
    assert "conv2    residual      64         1,956      37,376   conv2, conv4 → conv3, hidden" in text
    assert "linear   neuron   is part of the model's output      10" in text
    assert "without residual width      88.86 %" in text and "with it (--residual)        98.63 %" in text
    assert "10 % of the units of each group always stay" in text
    assert "25 % of the units" in table("digits", "--floor", "0.25")
    assert "conv1 → conv2" in table("digits", width=80)


def test_all_shows_every_group() -> None:
    assert "layer1.0-2" in table("cifar10-resnet20")
    text = table("cifar10-resnet20", "--all", width=160)
    for name in ("layer1.0.conv1", "layer1.1.conv1", "layer1.2.conv1"):
        assert f"\n{name} " in text
    assert not any(word in text for word in ("more", " ×", "0-2", "{"))


def test_the_tree_adds_up_and_folds_equal_layers(saved: Callable[[str], Path]) -> None:
    source = load_source(str(saved("LlamaForCausalLM")))
    rows = inventory(discover(source.model, source.example), 0.1).rows
    for everything in (False, True):
        root = module_tree(source.model, rows, everything)
        assert root.parameters == sum(item.numel() for item in source.model.parameters())
        assert total(root) == root.parameters
    folded = table(str(saved("LlamaForCausalLM")), "--tree")
    assert "0-2  LlamaDecoderLayer × 3" in folded and "24 gated neurons of gate_proj" in folded
    assert "60 neurons, frozen" in folded and "→ residual width 16" in folded
    every = table(str(saved("LlamaForCausalLM")), "--tree", "--all")
    assert every.count("LlamaDecoderLayer") == 3 and " × " not in every


def total(node: Node) -> int:
    """Parameters of a node whose modules all hold theirs in leaves."""
    return node.count * (sum(map(total, node.children)) if node.children else node.parameters // node.count)


def test_layers_of_different_width_do_not_fold_and_tied_ones_count_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2))
    net[3].weight, net[3].bias = net[2].weight, net[2].bias
    names = [(child.name, child.count, child.parameters) for child in module_tree(net, []).children]
    assert names == [("0-1", 2, 20), ("2", 1, 10), ("3", 1, 0)]


def test_json_has_stable_keys() -> None:
    found = answer("digits")
    assert list(found) == [
        "target", "source", "model", "recipe", "groups", "parameters", "macs", "floor", "removable",
        "removable_with_residual", "removable_with_experts", "account", "prunable_groups",
        "residual_groups", "experts_groups", "frozen_groups",
    ]  # fmt: skip
    assert list(found["groups"][0]) == [
        "name", "kind", "units", "status", "frozen", "parameters_per_unit", "macs_per_unit", "producers",
        "consumers",
    ]  # fmt: skip
    assert found["removable"].keys() == found["removable_with_residual"].keys()
    assert list(found["account"][0]) == ["fate", "reason", "parameters", "share", "where", "way_out"]
    assert sum(row["parameters"] for row in found["account"]) == found["parameters"]
    assert {row["name"]: row["status"] for row in found["groups"]} == {
        "conv1": "prunable", "conv2": "residual", "conv3": "prunable", "hidden": "prunable",
        "linear": "frozen",
    }  # fmt: skip


def test_seven_billion_parameters_in_no_memory_are_shown_as_in_the_guide(here: Path) -> None:
    transformers.LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(here)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shown = table(str(here), "--meta").rstrip()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20 < 2, "GiB"
    assert (
        f"```\n{shown}\n```" in (Path(__file__).parents[2] / "docs/guides/look-before-you-cut.md").read_text()
    )


def test_long_names_break_after_dots_and_never_inside_a_number() -> None:
    lines = list(Breakable("  model.layers.0-3.mlp by 5.91e-06").lines(16))
    assert lines == ["  model.", "    layers.0-3.", "    mlp by", "    5.91e-06"]
    assert list(Breakable("").lines(5)) == [""]


def test_an_inspected_model_stays_as_it_was(saved: Callable[[str], Path]) -> None:
    source = load_source(str(saved("LlamaForCausalLM")))
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    cache = source.model.config.use_cache
    groups = discover(source.model, source.example)
    assert identity_plan(groups) and source.model.config.use_cache == cache
    assert all(torch.equal(value, before[name]) for name, value in source.model.state_dict().items())


def test_every_error_is_one_line(factories: str) -> None:
    for words in (["nope"], [f"{factories}:wrong"], ["digits", "--example", "x"], ["digits", "--floor", "2"]):
        result = cria(*words)
        assert result.exit_code == 2 and result.stdout == "", words
        assert result.stderr.splitlines()[-1].startswith("error: ")
    assert issubclass(ConfigError, CriaError)
