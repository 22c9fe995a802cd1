import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

from cria_prune.base.errors import ConfigError, DataError, SignalError
from cria_prune.base.metrics import cross_entropy
from cria_prune.base.ranks import World
from cria_prune.config import RecoverConfig
from cria_prune.recovery import tune
from cria_prune.recovery.guard import lower_precision
from cria_prune.recovery.step import decay_groups, make_optimizer, rate, soft_targets, without_padding
from cria_prune.recovery.tune import recover


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(64, 3),
        )


def data(batches=6, size=16):
    generator = torch.Generator().manual_seed(1)
    out = []
    for _ in range(batches):
        y = torch.randint(3, (size,), generator=generator)
        x = torch.randn(size, 1, 4, 4, generator=generator)
        x[torch.arange(size), 0, 0, y] += 3
        out.append((x, y))
    return out


def accuracy(model, batches=None):
    return sum((model(x).argmax(1) == y).float().mean().item() for x, y in batches or data(2)) / 2


def state(model):
    return copy.deepcopy(model.state_dict())


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


CONFIG = RecoverConfig(epochs=4, lr=0.05)


@pytest.fixture
def kept():
    """A model whose modes, gradients, layout and RNG must be as before in the end."""
    model = network().train()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    yield model
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[5].bias.grad is None
    assert model[0].weight.stride() == network()[0].weight.stride()
    assert not model._forward_hooks


def test_it_learns_keeps_the_best_epoch_and_leaves_the_rest_alone(kept):
    result = recover(kept, data(), CONFIG, evaluate=accuracy)
    assert result.model is kept and len(result.history) == 5
    assert result.history[0].loss is None and result.history[0].metric < 0.7 < result.best
    assert result.best == max(row.metric for row in result.history)
    assert "<- kept" in str(result)


def test_the_best_epoch_is_loaded_not_the_last():
    model, metrics = network(), iter([0.1, 0.9, 0.9, 0.2, 0.3])
    seen = []

    def metric(network):
        seen.append(state(network))
        return next(metrics)

    result = recover(model, data(), CONFIG, evaluate=metric)
    assert (result.best_epoch, result.best, result.last) == (2, 0.9, 0.3)  # of equal epochs the later
    assert same(state(model), seen[2]) and not same(seen[2], seen[4])


def test_a_fine_tune_that_only_hurts_gives_the_model_back():
    model, metrics = network(), iter([0.9, 0.1, 0.1, 0.1, 0.1])
    before = state(model)
    assert recover(model, data(), CONFIG, evaluate=lambda _: next(metrics)).best_epoch == 0
    assert same(state(model), before)


def test_without_evaluate_the_last_epoch_is_kept():
    result = recover(network(), data(), CONFIG)
    assert result.best_epoch == 4 and result.best is None


def test_no_epochs_measures_and_changes_nothing(kept):
    before = state(kept)
    result = recover(kept, data(), RecoverConfig(epochs=0), evaluate=lambda _: 0.5)
    assert same(state(kept), before) and (result.best, result.best_epoch) == (0.5, 0)


def test_the_same_seed_gives_the_same_bits_whatever_the_global_generator():
    states = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        states.append(state(recover(network(), data(), CONFIG).model))
    assert same(*states)
    other = recover(network(), data(), CONFIG.model_copy(update={"seed": 1})).model
    assert not same(states[0], state(other))  # dropout


def test_batches_may_be_a_function_of_the_epoch_an_iterator_or_mappings():
    epochs = []
    by_epoch = recover(network(), lambda epoch: epochs.append(epoch) or iter(data()), CONFIG)
    one_shot = recover(network(), iter(data()), CONFIG)
    assert epochs == [0, 1, 2, 3] and same(state(by_epoch.model), state(one_shot.model))
    wrapped = [{"input": x, "labels": y} for x, y in data()]
    assert same(state(recover(network(), wrapped, CONFIG).model), state(one_shot.model))


def test_a_nan_loss_puts_the_model_back_and_says_what_to_do(kept):
    before = state(kept)
    poisoned = [*data(), (torch.full((4, 1, 4, 4), torch.nan), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(SignalError, match=r"loss is nan at step 7 of 28.*lower learning rate"):
        recover(kept, poisoned, CONFIG, evaluate=accuracy)
    assert same(state(kept), before)


def test_a_loss_that_is_not_finite_is_told_where_the_next_forward_would_fail(kept):
    def probability(model, batch):
        found = model(batch[0])
        if not found.isfinite().all():
            raise ValueError("not a probability")
        return cross_entropy(model, batch) * (torch.inf if len(batch[0]) == 4 else 1.0)

    before = state(kept)
    epochs = [data(3), [*data(1), (torch.ones(4, 1, 4, 4), torch.zeros(4, dtype=torch.long)), *data(1)]]
    with pytest.raises(SignalError, match="the loss is inf at step 5 of 6"):
        recover(kept, lambda epoch: epochs[epoch], CONFIG.model_copy(update={"epochs": 2}), loss=probability)
    assert same(state(kept), before)


def test_nan_weights_and_a_nan_metric_are_errors(kept):
    def zero_root(model, batch):
        return cross_entropy(model, batch) + model[5].bias.mul(0).sqrt().sum()  # finite, with a NaN gradient

    with pytest.raises(SignalError, match="holds NaN or infinity after step 1"):
        recover(kept, data(1), CONFIG, loss=zero_root)
    with pytest.raises(SignalError, match="the metric is nan"):
        recover(kept, data(), CONFIG, evaluate=lambda _: float("nan"))


@pytest.mark.parametrize("failing_epoch", [0, 2])
def test_any_error_puts_the_model_back(kept, failing_epoch):
    before = state(kept)

    def batches(epoch):
        if epoch == failing_epoch:
            raise OSError("disk")
        return data()

    with pytest.raises(OSError, match="disk"):
        recover(kept, batches, CONFIG, evaluate=accuracy)
    assert same(state(kept), before)


def test_an_interrupt_keeps_the_best_so_far_and_goes_on_up(kept):
    seen = []

    def metric(network):
        seen.append(state(network))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return [0.1, 0.8, 0.5][len(seen) - 1]

    with pytest.raises(KeyboardInterrupt):
        recover(kept, data(), CONFIG, evaluate=metric)
    assert same(state(kept), seen[1])


def test_distillation_pulls_towards_the_teacher_and_leaves_it_alone(kept):
    teacher = recover(network(5), data(), CONFIG).model.train()
    before = state(teacher)
    x = data()[0][0]
    full = CONFIG.model_copy(update={"distill": 1.0, "epochs": 10})
    gap = (teacher.eval()(x) - network().eval()(x)).abs().mean()
    teacher.train()
    student = recover(kept, data(), full, teacher=teacher).model
    assert same(state(teacher), before) and teacher.training
    after = (copy.deepcopy(teacher).eval()(x) - copy.deepcopy(student).eval()(x)).abs().mean()
    assert after < 0.5 * gap


def test_compiled_it_ends_where_it_does_uncompiled(kept):
    plain, teacher, settings = network(), network(1), {"distill": 0.5}
    kept[3].p = plain[3].p = 0.0  # torch.compile draws dropout in its own way
    kept[1].train()
    found = recover(plain, data(), CONFIG.model_copy(update=settings), evaluate=accuracy, teacher=teacher)
    config = CONFIG.model_copy(update={**settings, "compile": True})
    calls, taught = [], []
    kept[0].register_forward_hook(lambda *_: calls.append(torch.compiler.is_compiling()))
    teacher[0].register_forward_hook(lambda *_: taught.append(torch.compiler.is_compiling()))
    again = recover(kept, data(), config, evaluate=accuracy, teacher=teacher)
    kept[0]._forward_hooks.clear()
    kept[1].eval()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert [row.epoch for row in again.history] == [row.epoch for row in found.history]
    assert any(calls) and taught and all(taught)  # both were traced, the teacher never runs another forward
    assert "forward" not in vars(teacher)


def test_a_compiled_language_model_is_asked_for_its_own_loss_at_many_lengths():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes))
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(50, (4, length), generator=generator) for length in range(5, 17)]
    batches = [{"input_ids": ids, "labels": ids} for ids in tokens]
    plain, compiled = copy.deepcopy(model), copy.deepcopy(model)
    one = recover(plain, batches, RecoverConfig(epochs=1, lr=0.01))
    again = recover(compiled, batches, RecoverConfig(epochs=1, lr=0.01, compile=True))
    assert again.history[1].loss == pytest.approx(one.history[1].loss, rel=1e-5)
    assert "forward" not in vars(compiled)


def test_the_tenth_compiled_fine_tune_of_a_class_is_compiled_too():
    seen = []

    class Once(nn.Sequential):
        def forward(self, x):
            seen.append(torch.compiler.is_compiling())
            return super().forward(x)

    for _ in range(10):
        seen.clear()
        model = Once(*network())
        recover(model, data(2), RecoverConfig(epochs=1, lr=0.01, compile=True))
        assert seen and all(seen)  # traced, and not run as it is written
        assert not _debug_get_cache_entry_list(Once.forward)  # what was compiled is forgotten


def test_what_cannot_be_compiled_is_told_and_the_model_put_back(kept, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler")

    before = state(kept)
    torch.compiler.reset()  # nothing compiled before is taken
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    with pytest.raises(ConfigError, match=r"no compiler.*without compile"):
        recover(kept, data(), CONFIG.model_copy(update={"compile": True}))
    assert same(state(kept), before)


def test_soft_targets_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    p = torch.softmax(teacher[0] / 2, 0)
    expected = 4 * (p * (p / 0.5).log()).sum()
    assert torch.allclose(soft_targets(student, teacher, 2.0), expected)
    assert soft_targets(teacher, teacher, 2.0) == 0
    with pytest.raises(DataError, match="the teacher's"):
        soft_targets(student, torch.zeros(1, 3), 1.0)


def test_bad_arguments_are_told_apart(monkeypatch):
    with pytest.raises(ConfigError, match="no teacher was passed"):
        recover(network(), data(), RecoverConfig(distill=0.5))
    model = network()
    with pytest.raises(ConfigError, match="teacher is the model itself"):
        recover(model, data(), RecoverConfig(distill=0.5), teacher=model)
    with monkeypatch.context() as patch:
        patch.setattr(tune, "world", lambda: World(0, 2))
        patch.setattr(tune.dist, "get_backend_config", lambda: "cpu:gloo,cuda:gloo")
        with pytest.raises(ConfigError, match=r"FSDP on GPUs: the processes talk by cpu:gloo.*NCCL"):
            recover(model, data(), RecoverConfig(fsdp=True), device="cuda")
        with pytest.raises(ConfigError, match="compiled fine-tune in 2 processes"):
            recover(model, data(), RecoverConfig(compile=True))
    with pytest.raises(ConfigError, match="A fine-tune by FSDP: this is one process"):
        recover(model, data(), RecoverConfig(fsdp=True))
    with pytest.raises(ConfigError, match="no parameter of the model requires a gradient"):
        recover(network().requires_grad_(False), data())
    with pytest.raises(DataError, match="epoch 0 has no batches"):
        recover(network(), [])
    with pytest.raises(DataError, match="no target in Tensor"):
        recover(network(), [x for x, _ in data()])
    with pytest.raises(DataError, match="did not call the model"):
        recover(
            network(),
            data(),
            RecoverConfig(distill=0.5),
            teacher=network(1),
            loss=lambda model, batch: model[5].bias.sum(),
        )


def test_schedule_and_decay():
    rates = [rate(step, 100, 0.1, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.01) and max(rates) == rates[9] == rates[10] and rates[-1] < 1e-4
    assert rate(0, 1, 0.1, 0.05) == 0.1 and rate(150, 100, 0.1, 0.1) == 0
    decayed, free = decay_groups(network(), 0.1)
    assert [p.ndim for p in decayed["params"]] == [4, 2] and decayed["weight_decay"] == 0.1
    assert all(p.ndim == 1 for p in free["params"]) and free["weight_decay"] == 0


def test_frozen_parameters_stay():
    model = network()
    model[0].requires_grad_(False)
    before = state(model)
    recover(model, data(), CONFIG)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[5].weight, before["5.weight"])


def test_the_lowest_metric_is_kept_where_lower_is_better():
    model, metrics = network(), iter([9.0, 5.0, 4.0, 4.0, 6.0])
    result = recover(model, data(), CONFIG, evaluate=lambda _: next(metrics), lower_is_better=True)
    assert (result.best_epoch, result.best, result.last) == (3, 4.0, 6.0)


def test_adamw_learns_and_decays_only_matrices():
    config = CONFIG.model_copy(update={"optimizer": "adamw", "lr": 0.01, "schedule": "linear"})
    result = recover(network(), data(), config, evaluate=accuracy)
    assert result.history[0].metric < 0.7 < result.best
    groups = make_optimizer(network(), config).param_groups
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]
    assert [group["betas"][0] for group in groups] == [0.9, 0.9]


def test_clipping_bounds_the_step():
    def moved(clip):
        model = network()
        before = state(model)
        recover(
            model, data(1), RecoverConfig(epochs=1, lr=1.0, momentum=0, warmup=0, weight_decay=0, clip=clip)
        )
        steps = [(value.detach() - before[name]).norm() for name, value in model.named_parameters()]
        return float(torch.stack(steps).norm())

    assert moved(0.0) > 0.1 and moved(0.01) == pytest.approx(0.01, rel=1e-3)


def test_a_linear_fall_ends_at_zero():
    rates = [rate(step, 100, 0.1, 0.1, "linear") for step in range(100)]
    assert (
        max(rates) == rates[9] == rates[10] and rates[32] == pytest.approx(0.1 * 68 / 90) and rates[-1] < 2e-3
    )


def test_a_cpu_computes_in_float32_whatever_is_asked():
    with lower_precision("auto", torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


class OwnLoss(nn.Module):
    """A language model as those of transformers: it shifts the labels itself, and hides those of -100."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 5)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.table(input_ids)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def cycle():
    ids = (torch.arange(5) + torch.arange(4)[:, None]) % 5
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def test_a_model_that_takes_labels_gives_its_own_loss():
    model, batch = OwnLoss(), cycle()
    assert cross_entropy(model, batch) == model(**batch).loss
    config = RecoverConfig(epochs=30, lr=0.5, optimizer="adamw", weight_decay=0)
    recover(model, [batch], config)
    assert (model.table.weight.argmax(1) == (torch.arange(5) + 1) % 5).all()


def test_distillation_of_tokens_leaves_padding_out():
    logits, batch = torch.arange(24.0).view(2, 3, 4), cycle()
    batch["attention_mask"] = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(without_padding(logits, batch), logits.flatten(0, 1)[[0, 1, 3]])
    assert torch.equal(without_padding(logits[:, 0], batch), logits[:, 0])
    teacher, student = OwnLoss(), OwnLoss()
    config = RecoverConfig(epochs=60, lr=0.3, optimizer="adamw", weight_decay=0, distill=1.0)
    recover(student, [cycle()], config, teacher=teacher)
    gap = student.table.weight.softmax(1) - teacher.table.weight.softmax(1)
    assert gap.abs().max() < 0.05
