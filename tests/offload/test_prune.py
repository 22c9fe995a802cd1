"""Models that are larger than the memory: hooks of accelerate, stretches of blocks, shards, nothing lost."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner
from watching import counted, interrupted_at, never

from cria_prune import PruneConfig, discover, load, prune, prune_offloaded, record, score, watch
from cria_prune.artifact.rebuild import read_plan
from cria_prune.base.batches import Batch, outputs
from cria_prune.base.dispatched import (
    Weights,
    changed,
    first_names,
    is_dispatched,
    places,
    structure_of,
)
from cria_prune.base.errors import (
    ArtifactError,
    CriaError,
    DataError,
    PackageError,
    SignalError,
    StructureError,
    VerificationError,
)
from cria_prune.base.events import Event
from cria_prune.base.progress import QUIET
from cria_prune.cli.main import app
from cria_prune.offload import write
from cria_prune.offload.prune import Offloaded
from cria_prune.offload.turns import Chain, plan_turns, score_in_turns
from cria_prune.result import PruneResult
from cria_prune.stages import Prepared, prepare
from cria_prune.tasks.loading import load_pretrained
from cria_prune.tasks.text import train_tokenizer

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

offloading = sys.modules["cria_prune.offload.prune"]
rounds = sys.modules["cria_prune.offload.rounds"]
DECODER: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "tied": (
        "LlamaForCausalLM", "LlamaConfig", {**DECODER, "tie_word_embeddings": True, "dtype": "bfloat16"},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", ENCODER),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 99, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
         "eos_token_id": 2},
    ),
}  # fmt: skip
DISK = {"": "disk"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, (kind, config, values) in MODELS.items():
            said = getattr(transformers, config)(**values)
            model = getattr(transformers, kind)(said)
            model.to(getattr(torch, values.get("dtype", "float32")))
            model.save_pretrained(folder / name, max_shard_size="1GB" if name == "bert" else "60KB")
    return folder


@pytest.fixture(scope="module")
def known(made: Path) -> Prepared:
    """What may be cut of the Llama, found once."""
    model = load_pretrained(made / "llama", meta=True)
    return prepare(model, batches_of(1), config_of())


def test_batches_are_read_as_is_said(made: Path, tmp_path: Path) -> None:
    ids = torch.ones(4, 6, dtype=torch.long)
    source, out, batches = made / "bert", tmp_path / "out", [(ids, ids)]
    with pytest.raises(DataError, match="inputs=3"):
        prune_offloaded(source, out, batches, config_of(), inputs=3)
    with pytest.raises(DataError, match="Further examples"):
        prune_offloaded(source, out, batches, config_of(), inputs=2, examples=ids)  # type: ignore[arg-type]


def kind_of(name: str) -> Any:
    return getattr(transformers, MODELS[name][0])


def on_disk(made: Path, name: str, scratch: Path, where: Mapping[str, str] | None = None) -> nn.Module:
    model: nn.Module = kind_of(name).from_pretrained(
        made / name, device_map=dict(where or DISK), offload_folder=scratch
    )
    assert is_dispatched(model)
    return model.eval()


def batches_of(count: int = 4, size: int = 4, vocabulary: int = 99) -> list[Batch]:
    draw = torch.Generator().manual_seed(1)
    made: list[Batch] = []
    for _ in range(count):
        tokens = torch.randint(3, vocabulary, (size, 12), generator=draw)
        mask = torch.ones_like(tokens)
        mask[0, 9:] = 0
        made.append({"input_ids": tokens, "attention_mask": mask})
    return made


def config_of(**values: Any) -> PruneConfig:
    plan = {"reduction": 0.2, "rounds": 1, "vanilla": True, **values.pop("plan", {})}
    return PruneConfig(plan=plan, **values)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- the model of the user, as accelerate dispatched it


SPLIT = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.norm": "disk", "lm_head": "cpu",
}  # fmt: skip


@pytest.mark.parametrize(("name", "where"), [("tied", DISK), ("tied", SPLIT), ("bert", DISK)], ids=str)
def test_a_dispatched_model_is_recorded_and_scored_as_in_memory(
    made: Path, tmp_path: Path, name: str, where: Mapping[str, str]
) -> None:
    model, batches = kind_of(name).from_pretrained(made / name).eval(), batches_of()
    dispatched = on_disk(made, name, tmp_path, where)
    groups, found = discover(model, batches[0]), discover(dispatched, batches[0])
    assert [(item.name, item.size, item.frozen) for item in groups] == [
        (item.name, item.size, item.frozen) for item in found
    ]
    expected = score(model, groups, record(model, groups, batches))
    for _ in range(2):  # a forward parts tied weights
        scores = score(dispatched, found, record(dispatched, found, batches))
        assert same({key: item.scores for key, item in scores.items()},
                    {key: item.scores for key, item in expected.items()})  # fmt: skip
    assert all(place.module._parameters[place.local].is_meta for place in places(dispatched).values())


class Functional(nn.Module):
    """A block whose weights its own forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(functional.linear(x, self.up.weight, self.up.bias))
        return x + functional.linear(h, self.down.weight, self.down.bias)


class Stack(nn.Module):
    """Blocks, and a head that also reads what the first of them gave if it `skips`."""

    def __init__(self, skips: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Functional() for _ in range(4))
        self.head, self.skips = nn.Linear(8, 3), skips

    def forward(self, x: Tensor) -> Tensor:
        given = []
        for block in self.blocks:
            x = block(x)
            given.append(x)
        return self.head(x + given[0] if self.skips else x)


def stack(skips: bool = False) -> tuple[nn.Module, nn.Module]:
    """Return a stack, and one that accelerate offloads to memory, whole blocks at a time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = Stack(skips).eval()
    dispatched = Stack(skips).eval()
    dispatched.load_state_dict(plain.state_dict())
    accelerate.cpu_offload(dispatched, torch.device("cpu"), preload_module_classes=["Functional"])
    return plain, dispatched


def signals(count: int = 3) -> list[Batch]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randn(6, 8, generator=draw) for _ in range(count)]


def test_weights_that_a_block_loads_for_its_parts_are_told_by_their_place() -> None:
    plain, dispatched = stack()
    groups = discover(plain, signals()[0])
    expected = score(plain, groups, record(plain, groups, signals()))
    found = score(dispatched, groups, record(dispatched, groups, signals()))
    assert len(expected) == 4
    assert all(torch.equal(found[name].scores, expected[name].scores) for name in expected)


def test_the_weights_of_a_dispatched_model_come_when_they_are_asked_for(made: Path, tmp_path: Path) -> None:
    model, weights = kind_of("tied").from_pretrained(made / "tied"), Weights(on_disk(made, "tied", tmp_path))
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    assert same(weights, tensors)
    with pytest.raises(KeyError):
        weights["nothing"]
    with torch.device("meta"):
        empty = Stack()
    with pytest.raises(StructureError, match=r"'blocks\.0\.up\.weight' has no values"):
        Weights(empty)


def test_the_structure_of_a_dispatched_model_has_no_hooks_and_its_ties(made: Path, tmp_path: Path) -> None:
    model, batch = on_disk(made, "tied", tmp_path), batches_of(1)[0]
    outputs(model, batch)
    hooks = {path: module._hf_hook for path, module in model.named_modules() if hasattr(module, "_hf_hook")}
    structure: Any = structure_of(model)
    assert structure.lm_head.weight is structure.model.embed_tokens.weight
    assert all(tensor.is_meta for tensor in (*structure.parameters(), *structure.buffers()))
    assert not any(
        {"_hf_hook", "_old_forward", "forward"} & vars(module).keys() for module in structure.modules()
    )
    assert hooks and hooks == {
        path: module._hf_hook for path, module in model.named_modules() if path in hooks
    }
    assert first_names(model)["lm_head.weight"] == "model.embed_tokens.weight"


def test_a_dispatched_model_computes_in_another_type_without_being_loaded(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a dtype, from_pretrained would hold all weights at once: it is not asked for one."""
    asked: list[dict[str, Any]] = []
    real = write.load_pretrained
    monkeypatch.setattr(
        write,
        "load_pretrained",
        lambda folder, **options: (asked.append(options), real(folder, **options))[1],
    )
    plain = kind_of("tied").from_pretrained(made / "tied").eval().double()
    model = write.in_type(write.load_dispatched(made / "tied", tmp_path, torch.device("cpu")), torch.float64)
    batch = batches_of(1)[0]
    assert all(map(torch.equal, outputs(model, batch), outputs(plain, batch)))
    assert all(item.is_meta and item.dtype == torch.float64 for item in model.parameters())
    assert asked and all("dtype" not in options for options in asked)


def test_a_dispatched_model_is_refused_where_its_values_are_needed_at_once(
    made: Path, tmp_path: Path
) -> None:
    with pytest.raises(StructureError, match=r"has no values there.*prune_offloaded"):
        prune(on_disk(made, "llama", tmp_path), batches_of(), config_of())


def test_a_failing_batch_leaves_a_dispatched_model_as_it_was(made: Path, tmp_path: Path) -> None:
    model, batches = on_disk(made, "llama", tmp_path), batches_of(2)
    groups, expected = discover(model, batches[0]), outputs(model, batches[0])
    bad = {"input_ids": torch.full((4, 12), 1000)}
    with pytest.raises(CriaError):
        record(model, groups, [batches[0], bad])
    model.eval()
    assert all(map(torch.equal, outputs(model, batches[0]), expected))
    assert not nn.modules.module._global_forward_hooks and not nn.modules.module._global_forward_pre_hooks


# -- blocks, a stretch at a time


def loads(model: nn.Module, counts: dict[str, int]) -> Any:
    def count(name: str, value: Tensor) -> Tensor:
        counts[name] = counts.get(name, 0) + 1
        return value

    return changed(model, count)


def test_a_stretch_runs_its_blocks_alone_and_reads_each_weight_once(made: Path, tmp_path: Path) -> None:
    model, batches = on_disk(made, "llama", tmp_path / "w"), batches_of(3)
    expected = [outputs(model, batch) for batch in batches]
    chain = Chain.of(model, tmp_path)
    assert chain is not None and chain.path == "model.layers"
    for first, last in ((0, 0), (1, 1)):
        counts: dict[str, int] = {}
        with loads(model, counts), chain.stretch(first, last):
            found = [outputs(model, batch) for batch in batches]
        chain.forget()
        read = {name: count for name, count in counts.items() if name.startswith("model.layers.")}
        assert {int(name.split(".")[2]) for name in read} == {*range(first, last + 1)}
        assert set(read.values()) == {1}
    assert all(torch.equal(a, b) for one, two in zip(found, expected, strict=True)
               for a, b in zip(one, two, strict=True))  # fmt: skip
    assert not list(tmp_path.glob("*-*.safetensors")), "what went between the stretches is left"


def test_what_waits_on_disk_comes_back_to_where_torch_puts_its_own(made: Path, tmp_path: Path) -> None:
    """At other addresses some processors multiply to other bits, and a chain is then held for none."""
    chain = Chain.of(on_disk(made, "llama", tmp_path / "w"), tmp_path)
    assert chain is not None
    value = tuple(torch.full((odd,), float(odd)) for odd in (1, 3, 5, 7))
    chain.write(0, value)
    chain._turn = 1
    found = chain.read(0)
    assert all(map(torch.equal, found, value))
    assert all(item.data_ptr() % 64 == 0 for item in found)


def test_a_stretch_that_fails_puts_the_blocks_back(made: Path, tmp_path: Path) -> None:
    model = on_disk(made, "llama", tmp_path / "w")
    chain = Chain.of(model, tmp_path)
    assert chain is not None
    before = [(block.forward, place.hook.weights_map) for block in chain.blocks
              for place in places(block).values()]  # fmt: skip
    with (
        pytest.raises(ValueError, match="mine"),
        chain.stretch(0, 0),
        changed(model, lambda name, value: value),
    ):
        raise ValueError("mine")
    after = [(block.forward, place.hook.weights_map) for block in chain.blocks
             for place in places(block).values()]  # fmt: skip
    assert all(one[0] is two[0] and one[1] is two[1] for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize("skips", [False, True])
def test_a_model_that_is_no_chain_of_blocks_is_recorded_as_a_whole(tmp_path: Path, skips: bool) -> None:
    plain, dispatched = stack(skips)
    groups, config = discover(plain, signals()[0]), config_of(record={"examples": 16})
    chain, found = plan_turns(dispatched, groups, config, 1, tmp_path, signals()[0][:2])
    assert (chain is None) is skips
    assert [turn.blocks for turn in found] == [None if skips else (place, place) for place in range(4)]
    expected = score(plain, groups, record(plain, groups, signals(), config.record))
    settings = {"record": config.record, "score": config.score, "repair": "once"}
    prepared = prepare(dispatched, signals(), PruneConfig(**settings))
    scores, spilled, count = score_in_turns(prepared, tmp_path, 1, QUIET)
    assert count == 4 and list(scores) == list(expected)
    assert all(torch.equal(scores[name].scores, expected[name].scores) for name in expected)
    moments = spilled.get("blocks.1.up", "blocks.1.down.weight")
    states = record(plain, groups, signals(), config.record, consumed=True)
    truth = states["blocks.1.up"].consumed["blocks.1.down.weight"]
    assert moments is not None and moments.samples == truth.samples == 16
    assert moments.covariance is not None and truth.covariance is not None
    assert torch.equal(moments.covariance, truth.covariance) and torch.equal(moments.mean, truth.mean)
    assert spilled.get("blocks.1.up", "head.weight") is None


# -- from folder to folder


def agree(done: Offloaded, expected: PruneResult) -> None:
    """Check that every round did what pruning in memory does, and was verified."""
    assert done.plan.to_dict() == expected.plan.to_dict()
    assert len(done.rounds) == len(expected.rounds)
    for found, other in zip(done.rounds, expected.rounds, strict=True):
        assert (found.number, found.report) == (other.number, other.report)
        assert found.scores == other.scores and found.kept == other.kept
        assert found.diagnosis == other.diagnosis and found.repairs == other.repairs
        assert found.verification is not None and found.verification.difference <= 1e-5


@pytest.mark.parametrize(
    ("name", "memory", "values"),
    [
        ("llama", 1, {"record": {"examples": 14, "exact_units": 40, "sketch_columns": 64}}),
        ("tied", 2**31, {"plan": {"ranking": "global", "multiple": 8}}),
        ("bert", 1, {"repair": "none", "score": {"criterion": "l2"}}),
        ("gpt2", 1, {"score": {"criterion": "distortion"}}),
    ],
    ids=str,
)
def test_layer_by_layer_gives_what_pruning_in_memory_gives(
    made: Path, tmp_path: Path, name: str, memory: int, values: dict[str, Any]
) -> None:
    batches, config, before = batches_of(size=16), config_of(**values), hashes(made / name)
    expected = prune(kind_of(name).from_pretrained(made / name).eval(), batches, config)
    done = prune_offloaded(
        made / name, tmp_path / "small", batches, config, memory=memory, max_shard_size="50KB"
    )
    blocks = MODELS[name][2].get("num_hidden_layers", 2)
    agree(done, expected)
    assert bool(done.rounds[0].repairs) == (config.repair != "none")
    refitted = any(item.ridge is not None for item in done.rounds[0].repairs)
    assert refitted == (name in ("tied", "gpt2")), "too few examples to fit to, or nothing to repair"
    assert done.rounds[0].turns == (0 if "l2" in str(values) else 1 if memory > 1 else blocks)
    assert hashes(made / name) == before
    plain, info = kind_of(name).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values()), info
    assert same(plain.state_dict(), expected.model.state_dict())
    assert plain.dtype == expected.model.dtype
    assert not [path for path in tmp_path.iterdir() if path.name != "small"]
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    assert same(load(tmp_path / "small").model.state_dict(), plain.state_dict())


@pytest.mark.parametrize(("name", "memory", "repair"), [("tied", 1, "walk"), ("bert", 2**31, "once")])
def test_layers_run_on_another_device(
    made: Path, tmp_path: Path, device: str, name: str, memory: int, repair: str
) -> None:
    seen, repaired = set(), set()

    def look(event: Event) -> None:
        if event.name == "score":
            seen.update(item.output.mean.device.type for item in event.facts["states"].groups.values())
        elif event.name == "repair" and repair == "once":
            moments = [item for part in event.facts["consumed"].values() for item in part.values()]
            repaired.update(item.mean.device.type for item in moments)

    config = config_of(plan={"reduction": 0.3, "rounds": 2 if name == "tied" else 1}, repair=repair)
    with watch(look):
        done, here = (
            prune_offloaded(made / name, tmp_path / place, batches_of(), config, memory=memory, device=place)
            for place in (device, "cpu")
        )
    loaded = write.load_dispatched(made / name, tmp_path / "scratch", torch.device(device))
    assert {item.device.type for item in loaded.buffers()} == {torch.device(device).type}
    assert seen == {torch.device(device).type, "cpu"} and repaired == (seen if repair == "once" else set())
    assert done.plan.report == here.plan.report and len(done.rounds[0].repairs) == len(here.rounds[0].repairs)
    one, other = (load(tmp_path / place).model.state_dict() for place in (device, "cpu"))
    assert device == "cuda" or same(one, other)


def test_a_folder_that_was_nearer_as_cut_is_put_back(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, found = rounds.folder_fidelity, list[Any]()

    def worse(*asked: Any) -> Any:
        found.append(measured(*asked))
        outputs = [replace(item, divergence=10.0 * len(found)) for item in found[-1].outputs]
        return replace(found[-1], outputs=tuple(outputs))

    monkeypatch.setattr(rounds, "folder_fidelity", worse)
    done = prune_offloaded(made / "llama", tmp_path / "walk", batches_of(size=16), config_of())
    prune_offloaded(made / "llama", tmp_path / "cut", batches_of(size=16), config_of(repair="none"))
    assert found[1].loss < found[0].loss, "the walk did not change the folder"
    assert not done.rounds[0].repairs and "left as cut" in done.rounds[0].unrepaired[""]
    one, other = (load(tmp_path / name).model.state_dict() for name in ("walk", "cut"))
    assert same(one, other)


def test_a_result_is_pruned_again_and_its_plan_is_of_the_dense_model(made: Path, tmp_path: Path) -> None:
    first = prune_offloaded(made / "llama", tmp_path / "one", batches_of(), config_of())
    second = prune_offloaded(tmp_path / "one", tmp_path / "two", batches_of(), config_of())
    assert second.plan == read_plan(tmp_path / "two")
    assert second.plan.sizes == first.plan.sizes
    assert second.plan.report["parameters"] < first.plan.report["parameters"]
    assert load(tmp_path / "two").plan == second.plan


@pytest.mark.parametrize(
    ("name", "memory", "values"),
    [
        ("llama", 2**31, {"repair": "none", "score": {"criterion": "distortion"}}),
        ("llama", 1, {"record": {"exact_units": 40, "sketch_columns": 64}, "plan": {"ranking": "global"}}),
        ("tied", 1, {"plan": {"multiple": 8}}),
        ("gpt2", 1, {}),
    ],
    ids=str,
)
def test_rounds_give_what_rounds_in_memory_give(
    made: Path, tmp_path: Path, name: str, memory: int, values: dict[str, Any]
) -> None:
    plan = {"reduction": 0.3, "rounds": 3, **values.get("plan", {})}
    batches, config, before = batches_of(), config_of(**{**values, "plan": plan}), hashes(made / name)
    expected = prune(kind_of(name).from_pretrained(made / name).eval(), batches, config)
    done = prune_offloaded(
        made / name, tmp_path / "small", batches, config, memory=memory, max_shard_size="50KB"
    )
    agree(done, expected)
    sizes = [sum(map(len, item.kept.values())) for item in done.rounds]
    assert sizes[0] > sizes[1] > sizes[2], "a round removed nothing"
    assert all(bool(item.repairs) == (config.repair != "none") for item in done.rounds)
    for item, other in zip(done.rounds, expected.rounds, strict=True):
        assert [*item.fidelity] == [*other.fidelity] and item.fidelity
        for far, near in zip(item.fidelity.values(), other.fidelity.values(), strict=True):
            assert far.loss == pytest.approx(near.loss, rel=1e-5) and far.loss > 0
    assert [item.turns for item in done.rounds] == [1 if memory > 1 else 2] * 3
    assert done.difference == max(item.verification.difference for item in done.rounds if item.verification)
    assert done.seconds["score"] == sum(item.seconds["score"] for item in done.rounds)
    assert hashes(made / name) == before
    plain, info = kind_of(name).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values()), info
    assert same(plain.state_dict(), expected.model.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert read_plan(tmp_path / "small") == done.plan == load(tmp_path / "small").plan
    assert not [path for path in (tmp_path / "small").iterdir() if path.is_dir()]


def test_a_result_is_pruned_again_in_rounds_and_its_plan_is_of_the_dense_model(
    made: Path, tmp_path: Path
) -> None:
    config = config_of(plan={"rounds": 2})
    first = prune_offloaded(made / "llama", tmp_path / "one", batches_of(), config_of())
    second = prune_offloaded(tmp_path / "one", tmp_path / "two", batches_of(), config)
    expected = prune(kind_of("llama").from_pretrained(tmp_path / "one").eval(), batches_of(), config)
    assert second.plan.sizes == first.plan.sizes and second.plan != expected.plan
    for name, stays in expected.plan.kept.items():
        assert second.plan.kept[name] == tuple(first.plan.kept[name][place] for place in stays)
    assert second.plan.report["parameters_dense"] == first.plan.report["parameters_dense"]
    assert second.plan.report["parameters"] == expected.plan.report["parameters"]
    assert load(tmp_path / "two").plan == second.plan
    assert same(load(tmp_path / "two").model.state_dict(), expected.model.state_dict())


def test_of_the_models_between_the_rounds_one_is_on_disk(made: Path, tmp_path: Path, quick: None) -> None:
    """When a round is verified, its own model and the one before it are there, and nothing else."""
    seen, read = list[list[str]](), list[Path]()

    def look(event: Event) -> None:
        if event.name != "verify":
            return
        source, folder = event.facts["source"], event.facts["folder"]
        read.append(source)
        found = [path for path in tmp_path.rglob("config.json") if path.parent != source]
        seen.append([str(path.parent == folder) for path in found])
        assert (source == made / "llama") or len(list(source.glob("*.safetensors"))) > 1
        places = {path.name for path in tmp_path.rglob("round-*")}
        assert places == {f"round-{len(seen)}"}, "files of an earlier round are left"

    config = config_of(plan={"reduction": 0.3, "rounds": 4})
    with watch(look):
        prune_offloaded(made / "llama", tmp_path / "small", batches_of(), config, max_shard_size="50KB")
    assert seen == [["True"]] * 4
    assert len(set(read)) == 4 and read[0] == made / "llama"


@pytest.mark.parametrize("stage", ["turn", "score", "repair", "write", "verify"])
def test_an_error_in_a_later_round_leaves_nothing(
    made: Path, tmp_path: Path, quick: None, stage: str
) -> None:
    finished, before = list[int](), hashes(made / "llama")

    def fail(event: Event) -> None:
        if event.name == "round":
            finished.append(event.facts["number"])
        if event.name == stage and finished:
            raise KeyboardInterrupt

    with watch(fail), pytest.raises(KeyboardInterrupt):
        prune_offloaded(
            made / "llama", tmp_path / "deep" / "small", batches_of(), config_of(plan={"rounds": 3})
        )
    assert finished == [1] and not list(tmp_path.iterdir()) and hashes(made / "llama") == before


def test_a_wrong_cut_in_a_later_round_is_found(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """The first round's tensors have other shapes: the second alone is wrong."""

    def wrong(tensor: Tensor, cuts: Any) -> Tensor:
        value = write_slice(tensor, cuts)
        later = tensor.ndim == 2 and tensor.shape[0] == 48 and 48 < tensor.shape[1] < 96
        return value.flip(0) if later else value

    monkeypatch.setattr(write, "slice_tensor", wrong)
    with pytest.raises(VerificationError, match="the relative difference is"):
        prune_offloaded(made / "llama", tmp_path / "small", batches_of(), config_of(plan={"rounds": 2}))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def quick(known: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(
        model: nn.Module, batches: Any, config: PruneConfig, example: Batch, **more: Any
    ) -> Prepared:
        given = {"model": model, "batches": batches, "config": config, "example": example}
        return replace(known, structure=structure_of(model), **given)

    monkeypatch.setattr(offloading, "prepare", prepared)


def reversed_slice(tensor: Tensor, cuts: Any) -> Tensor:
    return write_slice(tensor, cuts).flip(0) if tuple(tensor.shape) == (48, 96) else write_slice(tensor, cuts)


write_slice = write.slice_tensor


def test_a_wrong_cut_is_found_and_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr(write, "slice_tensor", reversed_slice)
    with pytest.raises(VerificationError, match="the relative difference is"):
        prune_offloaded(made / "llama", tmp_path / "deep" / "small", batches_of(), config_of())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SafetensorError("No space left"), OSError(errno.ENOSPC, "full")]
)
def test_an_interrupted_write_leaves_nothing(
    made: Path, tmp_path: Path, quick: None, error: BaseException
) -> None:
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ArtifactError
    with interrupted_at("shard", 3, error) as calls, pytest.raises(expected):
        prune_offloaded(made / "llama", tmp_path / "small", batches_of(), config_of(), max_shard_size="50KB")
    assert len(calls) == 3 and not list(tmp_path.iterdir())


def damaged(made: Path, folder: Path) -> Path:
    model = kind_of("llama").from_pretrained(made / "llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(folder)
    return folder


def by_layers(made: Path, folder: Path) -> Path:
    shutil.copytree(made / "llama", folder)
    said = {"format": "cria-pretrained", "version": 1, "policy": "per-layer", "plan": {}}
    (folder / "cria.json").write_text(json.dumps(said))
    return folder


def empty(made: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((made / "llama" / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("source", "plan", "criterion", "text"),
    [
        (None, {"residual": True}, "innovation", "less residual width"),
        (None, {}, "taylor", "takes gradients"),
        (None, {"reduction": 0.9999}, "innovation", "at most"),
        (damaged, {}, "innovation", "'model.layers.1.mlp.up_proj.weight'.*NaN"),
        (by_layers, {}, "innovation", "saved it per-layer"),
        (empty, {}, "innovation", "no weights beside config.json"),
    ],
)
def test_what_cannot_be_done_layer_by_layer_is_refused(
    made: Path, tmp_path: Path, source: Callable[[Path, Path], Path] | None, plan: dict[str, Any],
    criterion: str, text: str,
) -> None:  # fmt: skip
    folder = made / "llama" if source is None else source(made, tmp_path / "source")
    with pytest.raises((CriaError, SignalError), match=text):
        prune_offloaded(
            folder, tmp_path / "small", batches_of(), config_of(plan=plan, score={"criterion": criterion})
        )
    assert not (tmp_path / "small").exists() and not list(tmp_path.glob(".*"))


def test_the_result_does_not_take_the_place_of_the_model(made: Path) -> None:
    before = hashes(made / "llama")
    with pytest.raises(ArtifactError, match="would take its place"):
        prune_offloaded(made / "llama", made / "llama" / ".", batches_of(), config_of(), overwrite=True)
    assert hashes(made / "llama") == before


def test_without_accelerate_the_text_says_what_to_install(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(PackageError, match=r"accelerate is not installed.*cria-prune\[offload\]"):
        write.load_dispatched(made / "llama", tmp_path, torch.device("cpu"))


# -- on the command line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    draw = torch.Generator().manual_seed(3)
    words = ("the", "sea", "and", "its", "people", "with", "long", "shadows")
    picks = torch.randint(len(words), (900, 8), generator=draw).tolist()
    text = "".join(" ".join(words[place] for place in line) + ".\n" for line in picks)
    (tmp_path / "text.txt").write_text(text)
    tokenizer = train_tokenizer(text, 280)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            **{**DECODER, "vocab_size": 280, "bos_token_id": 0, "eos_token_id": 0}
        )
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama", max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


WORDS = ["--calibration", "text.txt", "--reduce", "0.2", "--examples", "16", "--output", "small"]


def test_the_command_prunes_a_folder_and_plain_transformers_loads_it(here: Path) -> None:
    with never("weights"):
        done = CliRunner().invoke(app, ["prune", "llama", "--offload", *WORDS])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["reduction"] >= 0.2 and answer["masked_equals_pruned"] < 1e-5
    assert answer["rounds"] == 1 and answer["turns"] == 1
    model = transformers.AutoModelForCausalLM.from_pretrained("small")
    assert sum(item.numel() for item in model.parameters()) == answer["parameters"]
    assert transformers.AutoTokenizer.from_pretrained("small")("the sea")["input_ids"]
    manifest = json.loads(Path("small/cria.json").read_text())
    assert manifest["provenance"]["command"] and manifest["results"]["stage"] == "the pruned model"


def test_the_command_prunes_a_folder_in_rounds(here: Path) -> None:
    done = CliRunner().invoke(app, ["prune", "llama", "--offload", "--rounds", "3", *WORDS])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["rounds"] == 3 and answer["turns"] == 3 and answer["reduction"] >= 0.2
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" *[123] ", line)]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    counts = [int(row[1].replace(",", "")) for row in rows]
    assert counts[0] > counts[1] > counts[2] == answer["parameters"]
    results = json.loads(Path("small/cria.json").read_text())["results"]
    assert results["rounds"] == 3 and results["masked_equals_pruned"] == answer["masked_equals_pruned"]
    model = transformers.AutoModelForCausalLM.from_pretrained("small")
    assert sum(item.numel() for item in model.parameters()) == answer["parameters"]


def test_the_command_goes_on_where_it_was_stopped(here: Path) -> None:
    words = ["prune", "llama", "--offload", "--rounds", "2", *WORDS]
    with interrupted_at("record", 2):
        done = CliRunner().invoke(app, words)
    assert done.exit_code == 130 and "what is finished is kept (go on with: the same command" in done.stderr
    assert not Path("small").exists() and Path(".small.offload").is_dir()
    with counted("record") as calls:
        done = CliRunner().invoke(app, [*words, "--resume"])
    assert done.exit_code == 0, done.output
    assert len(calls) == 1 and not Path(".small.offload").exists()
    kept = json.loads(Path("small/cria.json").read_text())["plan"]
    done = CliRunner().invoke(app, [*words, "--overwrite"])
    assert done.exit_code == 0 and json.loads(Path("small/cria.json").read_text())["plan"] == kept
    done = CliRunner().invoke(app, [*words[:-2], "--resume"])
    assert done.exit_code == 2 and "no --output was given" in done.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["digits"], "found a recipe"),
        (["text.txt"], "no such folder"),
        (["llama", "--residual"], "less residual width"),
        (["llama", "--experts"], "fewer experts"),
        (["llama", "--criterion", "taylor"], "takes gradients"),
        (["llama", "--policy", "per-layer"], "layers that differ"),
        (["llama", "--export", "padded"], "Leave out --export"),
        (["llama", "--watch"], "Leave out --watch"),
        (["llama", "--scores", "kept"], "Leave out --scores"),
    ],
)
def test_the_command_says_what_it_cannot_do(here: Path, words: list[str], text: str) -> None:
    before = sorted(here.rglob("*"))
    done = CliRunner().invoke(app, ["prune", *words, "--offload", *WORDS])
    assert done.exit_code == 2 and done.stderr.startswith("error: "), done.output
    assert re.search(text, done.stderr.replace("\n", " ")), done.stderr
    assert sorted(here.rglob("*")) == before
