"""LoRA: what was trained is what is merged, and of peft nothing stays on the model."""

import copy
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cria_prune import PruneConfig, prune
from cria_prune.base.errors import ConfigError, PackageError
from cria_prune.base.metrics import cross_entropy
from cria_prune.config import RecoverConfig
from cria_prune.recovery.adapter import adapters, linear_layers
from cria_prune.recovery.tune import recover

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CONFIG = RecoverConfig(epochs=2, lr=0.02, optimizer="adamw", lora=2)
SMALL = {"vocab_size": 23, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def mlp():
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(6, 11), nn.LayerNorm(11), nn.ReLU(), nn.Dropout(0.2), nn.Linear(11, 7), nn.Linear(7, 3)
        )
    )


def pruned():
    result = prune(mlp(), [vectors()[0][0]], PruneConfig(plan={"reduction": 0.4, "rounds": 1}))
    assert result.model[0].weight.shape[0] < 11
    return result.model


def gpt2():
    config = transformers.GPT2Config(vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def llama():
    config = transformers.LlamaConfig(**SMALL, intermediate_size=27, tie_word_embeddings=True)
    return seeded(lambda: transformers.LlamaForCausalLM(config))


def bert():
    config = transformers.BertConfig(**SMALL, intermediate_size=27, max_position_embeddings=16, num_labels=3)
    return seeded(lambda: transformers.BertForSequenceClassification(config))


class Encoder(nn.Module):
    """Torch's own layer, which in eval mode reads the weights of its linear layers without calling them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 13, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(x[:, None]).mean(1))


class Twice(nn.Module):
    """One linear layer under two names, and one weight in two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.second = nn.ModuleDict({"again": self.first})
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        self.right.weight = self.left.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.second["again"](self.norm(self.first(x)).relu())
        return self.head(self.right(self.left(x).relu()))


def vectors():
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(3, (3, 16), generator=generator)
    x = torch.randn(3, 16, 6, generator=generator)
    x.scatter_add_(2, y[..., None], torch.full((3, 16, 1), 3.0))
    return list(zip(x, y, strict=True))


def tokens():
    ids = (torch.arange(3)[:, None, None] + torch.arange(4)[:, None] + torch.arange(8)) % 23
    return [{"input_ids": item, "attention_mask": torch.ones_like(item), "labels": item} for item in ids]


def sentences():
    return [{**batch, "labels": batch["input_ids"][:, 0] % 3} for batch in tokens()]


MODELS = {
    "mlp": (mlp, vectors, {"0", "4"}),
    "pruned": (pruned, vectors, {"0", "4"}),
    "encoder": (lambda: seeded(Encoder), vectors, {"layer.linear1", "layer.linear2"}),
    "twice": (lambda: seeded(Twice), vectors, {"first"}),
    "gpt2": (
        gpt2,
        tokens,
        {
            f"transformer.h.{layer}.{name}"
            for layer in range(2)
            for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        },
    ),
    "llama": (
        llama,
        tokens,
        {
            f"model.layers.{layer}.{name}_proj"
            for layer in range(2)
            for name in (
                *("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"),
                *("mlp.gate", "mlp.up", "mlp.down"),
            )
        },
    ),
    "bert": (
        bert,
        sentences,
        {
            "bert.pooler.dense",
            *(
                f"bert.encoder.layer.{layer}.{name}"
                for layer in range(2)
                for name in (
                    *("attention.self.query", "attention.self.key", "attention.self.value"),
                    *("attention.output.dense", "intermediate.dense", "output.dense"),
                )
            ),
        },
    ),
}


def logits(model, batch):
    with torch.no_grad():
        if isinstance(batch, tuple):
            return model(batch[0])
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def weights(model):
    return copy.deepcopy(model.state_dict())


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def anatomy(model):
    """Everything by which a model could tell that something was done to it, but its values."""
    parts = [
        (name, id(item), sorted(vars(item))) for name, item in model.named_modules(remove_duplicate=False)
    ]
    named = model.named_parameters(remove_duplicate=False)
    held = [(name, id(item), item.requires_grad, item.grad) for name, item in named]
    return parts, held, [item.training for item in model.modules()], torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("name", MODELS)
def test_merged_is_what_was_trained_and_only_weights_of_linear_layers_change_by_low_rank(name):
    build, batches, adapted = MODELS[name]
    model, seen = build(), []
    before, parts = weights(model), anatomy(model)
    assert set(linear_layers(model)) == adapted

    def metric(network):
        seen.append(logits(network, batches()[0]))
        return float(len(seen))

    recover(model, batches(), CONFIG, evaluate=metric)
    assert anatomy(model) == parts
    model.eval()
    merged = logits(model, batches()[0])
    assert (merged - seen[-1]).abs().max() <= 1e-5 * merged.abs().max()
    assert (seen[0] - seen[-1]).abs().max() > 1e-2 * merged.abs().max()
    same_layer = {"first": "second.again"} if name == "twice" else {}
    free = {f"{layer}.weight" for layer in {*adapted, *(same_layer.get(layer, layer) for layer in adapted)}}
    for key, value in model.state_dict().items():
        change = value.double() - before[key].double()
        if key in free:
            strengths = torch.linalg.svdvals(change)
            assert strengths[0] > 1e-3 and (strengths[2:] < 1e-5 * before[key].abs().max()).all(), key
        else:
            assert torch.equal(value, before[key]), key


def test_nothing_is_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (gpt2(), mlp()):
            with adapters(model, 2):
                pass


def test_the_head_of_a_language_model_stays_tied():
    model = llama()
    recover(model, tokens(), CONFIG)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_it_learns():
    def accuracy(model):
        return sum((model(x).argmax(1) == y).float().mean().item() for x, y in vectors()) / 3

    config = CONFIG.model_copy(update={"epochs": 30, "lora": 4})
    result = recover(mlp(), vectors(), config, evaluate=accuracy)
    assert result.history[0].metric < 0.7 < 0.9 < result.best


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_keep_theirs(dtype):
    model = mlp().to(dtype)
    before = weights(model)
    recover(model, [(x.to(dtype), y) for x, y in vectors()], CONFIG)
    assert {value.dtype for value in model.state_dict().values()} == {dtype}
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_the_given_gradients_and_frozen_layers_stay():
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones(7, 11)
    model[4].eval()
    before, parts = weights(model), anatomy(model)
    recover(model, vectors(), CONFIG)
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])] == [
        "4.weight"
    ]
    after = anatomy(model)
    assert after[0] == parts[0] and after[2:] == parts[2:]
    assert [item[:3] for item in after[1]] == [item[:3] for item in parts[1]]
    assert torch.equal(model[4].weight.grad, torch.ones(7, 11))


@pytest.mark.parametrize("error", [OSError, SystemExit])
def test_after_an_error_the_model_is_what_it_was_bit_for_bit(error):
    model, measured = mlp(), []
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    before, parts = weights(model), anatomy(model)

    def metric(_network):
        measured.append(None)
        if len(measured) == 3:
            raise error
        return 0.5

    with pytest.raises(error):
        recover(model, vectors(), CONFIG, evaluate=metric)
    assert anatomy(model) == parts and same(weights(model), before)
    assert torch.signbit(model[0].weight[0, 0])


def test_after_an_interrupt_the_best_epoch_is_merged():
    model, seen = mlp(), []
    parts = anatomy(model)

    def metric(network):
        seen.append(logits(network, vectors()[0]))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return [0.1, 0.9, 0.3][len(seen) - 1]

    with pytest.raises(KeyboardInterrupt):
        recover(model, vectors(), CONFIG.model_copy(update={"epochs": 4}), evaluate=metric)
    assert anatomy(model) == parts
    found = logits(model.eval(), vectors()[0])
    assert torch.allclose(found, seen[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, seen[2], rtol=1e-3) and not torch.allclose(found, seen[0], rtol=1e-3)


@pytest.mark.parametrize("step", [1, 2, 4, 6])
def test_it_goes_on_from_a_state_with_the_same_bits(step, tmp_path):
    class Stop(BaseException):
        pass

    def result(folder=None, stop=0):
        calls = []

        def loss(network, batch):
            calls.append(None)
            if len(calls) == stop:
                raise Stop
            return cross_entropy(network, batch)

        def metric(network):
            return -cross_entropy(network, vectors()[0]).item()

        options = {"loss": loss, "evaluate": metric, "state": folder, "save_every": 0}
        return recover(mlp(), vectors(), CONFIG, **options), len(calls)

    with pytest.raises(Stop):
        result(tmp_path, step)
    expected, _ = result()
    for calls in (6 - step + 1, 0):
        found, done = result(tmp_path)
        assert done == calls and found.history == expected.history
        assert same(found.model.state_dict(), expected.model.state_dict())


def test_the_state_holds_adapters_not_the_frozen_weights(tmp_path):
    recover(mlp(), vectors(), CONFIG, state=tmp_path)
    assert b"lora_A" in (text := (tmp_path / "recovery.safetensors").read_bytes())
    assert b"base_layer" not in text


def test_a_teacher_and_another_rank(tmp_path):
    config = CONFIG.model_copy(update={"distill": 1.0, "epochs": 20, "lora": 6})
    teacher = recover(mlp(), vectors(), RecoverConfig(epochs=10)).model.eval()
    student, x = mlp().eval(), vectors()[0][0]
    gap = (teacher(x) - student(x)).abs().mean()
    recover(student, vectors(), config, teacher=teacher)
    assert (teacher(x) - student(x)).abs().mean() < 0.7 * gap


def test_what_it_cannot_do_is_told(monkeypatch):
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="LoRA of rank 2: the model has no linear layer besides its head"):
        recover(convolution, vectors(), CONFIG)
    model = mlp()
    model.peft_config = SimpleNamespace()
    with pytest.raises(ConfigError, match="has adapters already"):
        recover(model, vectors(), CONFIG)
    with pytest.raises(ConfigError, match=r"lora: Input should be greater"):
        RecoverConfig(lora=-1)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PackageError, match=r"peft is not installed.*pip install 'cria-prune\[lora\]'"):
        recover(mlp(), vectors(), CONFIG)


def test_a_model_that_peft_refuses_is_left_as_it_was(monkeypatch):
    import peft.tuners.lora.model

    model, made = mlp(), []
    parts, before = anatomy(model), weights(model)
    create = peft.tuners.lora.model.LoraModel._create_new_module

    def refuse(*args, **kwargs):
        made.append(None)
        if len(made) == 2:
            raise ValueError("not this one.")
        return create(*args, **kwargs)

    monkeypatch.setattr(peft.tuners.lora.model.LoraModel, "_create_new_module", staticmethod(refuse))
    with pytest.raises(ConfigError, match=r"peft refuses the model, not this one\. Set lora to 0"):
        recover(model, vectors(), CONFIG)
    assert anatomy(model) == parts and same(weights(model), before)


def test_layers_that_compute_something_else_are_left_out():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    model = nn.Sequential(nn.Linear(6, 6), Doubled(6, 6), normed, nn.Linear(6, 6), nn.Linear(6, 3))
    assert linear_layers(model) == ["0", "3"]
    with adapters(model, 3):
        assert sorted(name for name, item in model.named_parameters() if item.requires_grad) == [
            f"{layer}.lora_{factor}.default.weight" for layer in (0, 3) for factor in "AB"
        ]


def test_an_old_configuration_has_no_adapters():
    assert RecoverConfig.from_text("{epochs: 2, lr: 0.1}").lora == 0
