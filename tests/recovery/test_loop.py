"""A fine-tune that was stopped, by SIGKILL too, goes on from its state and ends with the same bits."""

import copy
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from kills import at_call, half_written, kill, replace, replaced_and_killed, save, signals_of
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader

from cria_prune.base.errors import ArtifactError
from cria_prune.base.metrics import cross_entropy
from cria_prune.config import RecoverConfig
from cria_prune.recovery import loop as states
from cria_prune.recovery.step import make_optimizer, moments, set_moments
from cria_prune.recovery.tune import recover
from cria_prune.resume import store

EPOCHS, BATCHES = 3, 4
CONFIGS = {
    "sgd": RecoverConfig(epochs=EPOCHS, lr=0.05),
    "adamw": RecoverConfig(epochs=EPOCHS, lr=0.01, optimizer="adamw", schedule="linear", clip=1.0),
}


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(64, 3),
        )


def data(count=BATCHES):
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(3, (8 * count,), generator=generator)
    x = torch.randn(8 * count, 1, 4, 4, generator=generator)
    x[torch.arange(8 * count), 0, 0, y] += 3
    return list(zip(x, y, strict=True))


def loader(count=BATCHES):
    """Shuffled by torch's global generator, anew in every epoch."""
    return DataLoader(data(count), batch_size=8, shuffle=True)


def accuracy(model):
    x, y = next(iter(DataLoader(data(), batch_size=64, shuffle=True)))  # draws from the generator as well
    return (model(x).argmax(1) == y).float().mean().item()


class Stop(BaseException):
    """As abrupt as a signal: nothing between the loss and the test catches it."""


class StopAt:
    """The cross-entropy, which counts its calls and does something at one of them."""

    def __init__(self, step=0, action=None):
        self.step, self.action, self.calls = step, action, 0

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == self.step:
            self.action()
        return cross_entropy(model, batch)


def stop():
    raise Stop


def tuned(config, folder=None, loss=None, model=None, batches=None, **options):
    options = {"evaluate": accuracy, "save_every": 0.0, **options}
    return recover(model or network(), batches or loader(), config, loss=loss, state=folder, **options)


def weights(model):
    return copy.deepcopy(model.state_dict())


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def same_result(left, right):
    return (
        same(left.model.state_dict(), right.model.state_dict())
        and left.history == right.history
        and (left.best_epoch, left.best, left.last) == (right.best_epoch, right.best, right.last)
    )


@pytest.fixture(scope="module")
def whole():
    """The same fine-tunes without a state or an interruption."""
    return {name: tuned(config) for name, config in CONFIGS.items()}


# The children: killed for real, each in a process of its own.


KILLS = {  # name: (optimizer, step of the kill, what the writing of the state is replaced by)
    "sgd-in-mid-epoch": ("sgd", 7, {}),
    "adamw-in-mid-epoch": ("adamw", 7, {}),
    "first-batch-of-an-epoch": ("adamw", BATCHES + 1, {}),
    "half-of-the-first-state": ("sgd", 0, {"save_file": at_call(1, half_written, save)}),
    "half-of-a-later-state": ("adamw", 0, {"save_file": at_call(6, half_written, save)}),
    "before-the-rename": ("sgd", 0, {"replace": at_call(6, lambda *_: kill(), replace)}),
    "after-the-rename": ("adamw", 0, {"replace": at_call(6, replaced_and_killed, replace)}),
    "before-the-rename-of-the-last": (
        "sgd",
        0,
        {"replace": at_call(EPOCHS * (BATCHES + 1) + 1, lambda *_: kill(), replace)},
    ),
}


def children(folder):
    """Run each case in a fork until it is killed; print the signals as JSON (the main of a subprocess)."""
    signals = {}
    for name, (optimizer, step, patches) in KILLS.items():
        child = os.fork()
        if child == 0:
            store.save_file = patches.get("save_file", save)
            os.replace = patches.get("replace", replace)
            tuned(CONFIGS[optimizer], Path(folder) / name, StopAt(step, kill))
            os._exit(0)
        signals[name] = os.WTERMSIG(os.waitpid(child, 0)[1])
    print(json.dumps(signals))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with what the killed processes left."""
    folder = tmp_path_factory.mktemp("killed")
    # The forks come from a process in which torch has computed nothing, so that it has no threads; the
    # optimizers would import torch._dynamo in each of them.
    before = f"import torch, torch._dynamo; torch.set_num_threads({torch.get_num_threads()}); "
    assert signals_of("tests.recovery.test_loop", str(folder), before=before) == dict.fromkeys(
        KILLS, signal.SIGKILL
    )
    return folder


@pytest.mark.parametrize("name", KILLS)
def test_after_a_sigkill_the_same_bits_come_out_and_no_finished_step_is_run_again(name, killed, whole):
    optimizer, step, _ = KILLS[name]
    folder, loss = killed / name, StopAt()
    if name == "half-of-the-first-state":
        assert not (folder / states.NAME).exists()
    assert same_result(tuned(CONFIGS[optimizer], folder, loss), whole[optimizer])
    total = EPOCHS * BATCHES
    # the writes: one before the first step, one per step, one more per epoch
    todo = {
        "half-of-the-first-state": total,
        "half-of-a-later-state": total - 4,  # the sixth is that of the end of the first epoch
        "before-the-rename": total - 4,
        "after-the-rename": total - 4,
        "before-the-rename-of-the-last": 0,
    }
    assert loss.calls == todo.get(name, total - step + 1)
    assert [path.name for path in folder.iterdir()] == [states.NAME]


@pytest.mark.parametrize(
    ("name", "every", "steps"),
    [("sgd", 0.0, (1, 2, 5, 12)), ("adamw", 0.0, (3, 4, 8)), ("adamw", 1e9, (4, 5, 11))],
)
def test_stopped_at_any_step_it_ends_with_the_same_bits(name, every, steps, whole, tmp_path):
    for step in steps:
        folder, rest = tmp_path / str(step), StopAt()
        with pytest.raises(Stop):
            tuned(CONFIGS[name], folder, StopAt(step, stop), save_every=every)
        assert same_result(tuned(CONFIGS[name], folder, rest, save_every=every), whole[name])
        done = step - 1 if every == 0 else (step - 1) // BATCHES * BATCHES
        assert rest.calls == EPOCHS * BATCHES - done


def test_stopped_again_and_again_and_while_it_measures(whole, tmp_path):
    measured, stops, result = [], 0, None

    def metric(model):
        measured.append(None)
        if len(measured) in (1, 3, 4):
            raise Stop
        return accuracy(model)

    while result is None:
        try:
            result = tuned(CONFIGS["sgd"], tmp_path, StopAt(3, stop), evaluate=metric)
        except Stop:
            stops += 1
    assert same_result(result, whole["sgd"]) and stops == 7


def test_batches_by_epoch_are_skipped_by_iterating(tmp_path):
    seen = []

    def batches(epoch):
        for x, y in DataLoader(data(), batch_size=8):
            seen.append((epoch, len(seen)))
            yield x + epoch, y

    expected = tuned(CONFIGS["sgd"], batches=batches)
    with pytest.raises(Stop):
        tuned(CONFIGS["sgd"], tmp_path, StopAt(7, stop), batches=batches)
    assert same_result(tuned(CONFIGS["sgd"], tmp_path, batches=batches), expected)


def test_a_metric_where_lower_is_better_and_the_best_epoch_before_the_stop(tmp_path):
    def result(folder, loss=None):
        values = iter([9.0, 2.0, 4.0, 5.0] if loss or folder is None else [4.0, 5.0])
        options = {"evaluate": lambda _: next(values), "lower_is_better": True}
        return tuned(CONFIGS["sgd"], folder, loss, **options)

    with pytest.raises(Stop):
        result(tmp_path, StopAt(6, stop))
    expected = result(None)
    assert expected.best_epoch == 1 and same_result(result(tmp_path), expected)


def test_a_tied_weight_is_kept_and_stays_tied(tmp_path):
    def tied():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3)]
        layers[2].weight = layers[0].weight
        return nn.Sequential(nn.Flatten(), *layers)

    expected = tuned(CONFIGS["adamw"], model=tied())
    with pytest.raises(Stop):
        tuned(CONFIGS["adamw"], tmp_path, StopAt(6, stop), model=tied())
    result = tuned(CONFIGS["adamw"], tmp_path, model=tied())
    assert same_result(result, expected) and result.model[3].weight is result.model[1].weight


def test_once_finished_the_same_call_returns_the_same_without_training(whole, tmp_path):
    tuned(CONFIGS["adamw"], tmp_path)
    loss = StopAt()
    again = tuned(CONFIGS["adamw"], tmp_path, loss, evaluate=lambda _: pytest.fail("measured"))
    assert same_result(again, whole["adamw"]) and loss.calls == 0
    with safe_open(tmp_path / states.NAME, "pt") as file:
        assert all(name.startswith("best/") for name in file.keys())  # noqa: SIM118


def test_modes_generators_and_gradients_are_put_back(tmp_path):
    with pytest.raises(Stop):
        tuned(CONFIGS["sgd"], tmp_path, StopAt(7, stop))
    model, before = network().train(), torch.get_rng_state()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    strides = model[3].weight.stride()
    tuned(CONFIGS["sgd"], tmp_path, model=model)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert model[0].weight.grad.sum() == 36 and model[3].weight.stride() == strides


def test_an_interrupt_of_a_fine_tune_that_goes_on_keeps_the_best_so_far(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    seen = []

    def metric(model):
        seen.append(weights(model))
        return float(len(seen))

    with pytest.raises(Stop):
        tuned(CONFIGS["sgd"], tmp_path, StopAt(6, stop), evaluate=metric)
    model = network()
    with pytest.raises(KeyboardInterrupt):
        tuned(CONFIGS["sgd"], tmp_path, StopAt(2, interrupt), model=model, evaluate=metric)
    assert len(seen) == 2 and same(weights(model), seen[1])


def test_without_epochs_no_state_is_kept(tmp_path):
    assert tuned(RecoverConfig(epochs=0), tmp_path / "none").best_epoch == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("finished", [False, True])
def test_the_state_of_another_fine_tune_is_refused_and_told(finished, tmp_path):
    config = CONFIGS["sgd"]
    if finished:
        tuned(config, tmp_path)
    else:
        with pytest.raises(Stop):
            tuned(config, tmp_path, StopAt(7, stop))
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    kept = (tmp_path / states.NAME).read_bytes()
    for match, options in {
        r"config, lr: there 0\.05, here 0\.1\. Pass another folder, or remove this one": {
            "config": config.model_copy(update={"lr": 0.1})
        },
        r"weights at the start, model: there \w{12}\.\.\., here": {"model": network(1)},
        r"tensors, 1\.weight: there torch\.float32 \(4,\), here torch\.float32 \(3, 16\)": {"model": narrow},
        r"batches per epoch: there 4, here 3": {"batches": loader(3)},
        r"metric: there higher is better, here nothing": {"evaluate": None},
        r"metric: there higher is better, here lower is better": {"lower_is_better": True},
    }.items():
        model = options.setdefault("model", network())
        before = weights(model)
        with pytest.raises(ArtifactError, match=f"its state is of another one: .*{match}"):
            tuned(**{"config": config, "folder": tmp_path, **options})
        assert same(weights(model), before)
    assert (tmp_path / states.NAME).read_bytes() == kept


def test_the_teacher_belongs_to_the_fine_tune(tmp_path):
    config = CONFIGS["sgd"].model_copy(update={"distill": 0.5})
    expected = tuned(config, teacher=network(5))
    with pytest.raises(Stop):
        tuned(config, tmp_path, StopAt(7, stop), teacher=network(5))
    with pytest.raises(ArtifactError, match="weights at the start, teacher"):
        tuned(config, tmp_path, teacher=network(6))
    assert same_result(tuned(config, tmp_path, teacher=network(5)), expected)


def test_a_damaged_state_is_an_error_whatever_the_damage(tmp_path):
    with pytest.raises(Stop):
        tuned(CONFIGS["sgd"], tmp_path, StopAt(7, stop))
    path = tmp_path / states.NAME
    whole = path.read_bytes()
    cut = [whole[:size] for size in range(0, len(whole), len(whole) // 20)]
    flipped = []
    for place in (*range(0, 40, 3), *range(40, len(whole), len(whole) // 40), len(whole) - 1):
        flipped.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    said = b'"step\\":6'
    assert said in whole.replace(b" ", b"")
    edited = whole.replace(b'step\\": 6', b'step\\": 9')
    for damaged in (*cut, *flipped, edited, b"{}", whole + b"0"):
        assert damaged != whole
        path.write_bytes(damaged)
        model = network()
        with pytest.raises(ArtifactError, match=r"recovery\.safetensors: .*Pass another folder, or remove"):
            tuned(CONFIGS["sgd"], tmp_path, model=model)
        assert same(weights(model), weights(network()))
    path.unlink()
    path.mkdir()
    with pytest.raises(ArtifactError, match="Reading the state"):
        tuned(CONFIGS["sgd"], tmp_path)


def test_a_state_of_other_tensors_is_an_error(tmp_path):
    with pytest.raises(Stop):
        tuned(CONFIGS["sgd"], tmp_path, StopAt(7, stop))
    keeper = states.Keeper(tmp_path, {}, 0).store
    facts, parts = keeper.read()
    for part, name, error in (("weights", "0.weight", "other names"), ("losses", "epoch", "'losses'")):
        kept = parts[part].pop(name)
        keeper.write(facts, parts)
        model = network()
        with pytest.raises(ArtifactError, match=f"do not fit the model.*{error}"):
            tuned(CONFIGS["sgd"], tmp_path, model=model)
        assert same(weights(model), weights(network()))
        parts[part][name] = kept


def test_a_full_disk_is_an_error_the_weights_are_put_back_and_the_last_state_serves(whole, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = StopAt(7, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard)))
    model = network()
    try:
        with pytest.raises(
            ArtifactError, match=r"Keeping the state .* the system refused.*the disk has room"
        ):
            tuned(CONFIGS["adamw"], tmp_path, fill, model=model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(weights(model), weights(network()))
    assert [path.name for path in tmp_path.iterdir()] == [states.NAME]
    rest = StopAt()
    assert same_result(tuned(CONFIGS["adamw"], tmp_path, rest), whole["adamw"]) and rest.calls == 6


def test_a_folder_that_cannot_be_one_is_told_before_the_training(tmp_path):
    (tmp_path / "file").write_text("")
    loss = StopAt()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArtifactError):
            tuned(CONFIGS["sgd"], folder, loss)
    assert loss.calls == 0


def test_what_a_state_cannot_hold_is_told():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    extra = nn.Sequential(nn.Flatten(), Extra(16, 3))
    with pytest.raises(ArtifactError, match="_extra_state of the model is no tensor"):
        tuned(CONFIGS["sgd"], "never", model=extra)
    distilled = CONFIGS["sgd"].model_copy(update={"distill": 0.5})
    with pytest.raises(ArtifactError, match="_extra_state of the teacher is no tensor"):
        tuned(distilled, "never", teacher=extra)


def test_another_dtype_than_safetensors_has_is_told(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ArtifactError, match=r"safetensors knows no torch\.complex128"):
        tuned(CONFIGS["sgd"], tmp_path, model=model)


def test_moments_take_the_memory_layout_of_their_parameters():
    model = network().to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, CONFIGS["adamw"])
    held = {"1.exp_avg": torch.randn(4, 4, 3, 3), "1.step": torch.tensor(2.0)}
    set_moments(optimizer, held)
    assert same(moments(optimizer), held)
    assert optimizer.state[model[3].weight]["exp_avg"].stride() == model[3].weight.stride() != (36, 9, 3, 1)


def test_the_state_may_be_removed_and_the_fine_tune_starts_anew(whole, tmp_path):
    with pytest.raises(Stop):
        tuned(CONFIGS["sgd"], tmp_path / "state", StopAt(7, stop))
    shutil.rmtree(tmp_path / "state")
    loss = StopAt()
    assert same_result(tuned(CONFIGS["sgd"], tmp_path / "state", loss), whole["sgd"])
    assert loss.calls == EPOCHS * BATCHES
