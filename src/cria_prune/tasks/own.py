"""The user's own network as a task: a function that makes it, a loader, a metric and a loss of theirs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from inspect import Parameter
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset

from cria_prune.base.batches import Batch, batch_size, batch_target, describe, limited, model_inputs
from cria_prune.base.errors import ArtifactError, ConfigError, CriaError, DataError, said, some
from cria_prune.base.events import passed
from cria_prune.base.inputs import Inputs, Reader
from cria_prune.base.metrics import LOWER, Loss, metric
from cria_prune.base.modules import device_of, digest, first_names, modes_kept, named_tensors, random_kept
from cria_prune.base.progress import Progress
from cria_prune.config import RecordConfig, RecoverConfig
from cria_prune.tasks.base import EpochBatches, Task, fingerprint
from cria_prune.tasks.functions import (
    check_alone,
    imported,
    needed,
    said_arguments,
    seeded,
    users_code,
)

EXAMPLES = RecordConfig().examples
MAKER = "a function without arguments that returns a module, or (module, example)"
GIVES = "a DataLoader, an iterable of batches, or a function without arguments that returns one"
NO_LOADER = "Give --loader package.module:function, which returns a DataLoader or another iterable of batches"
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name of a state."""


@dataclass(frozen=True)
class Own:
    """What the user gave of a network of their own; functions as `package.module:function`.

    Attributes:
        factory: makes the dense network, for a checkpoint of it.
        weights: file of its trained weights, safetensors; None: those that it is made with.
        loader: gives the batches to calibrate and train on.
        test_loader: gives those for `evaluate` and for fidelity; None: the loader.
        evaluate: (model) or (model, loader) to a number.
        better: which numbers are better, `higher` or `lower`; None: by the function's name.
        loss: (outputs, targets) or (model, batch) to a scalar; None: cross-entropy.
        inputs: what of a tuple the forward is given; see `base.inputs`.
        examples: that are used of a loader at most; None: 1,024 to look at, and all to train on of a loader
            that has a length.
        seed: that the loader's order and the network's weights are drawn by.
    """

    factory: str | None = None
    weights: Path | None = None
    loader: str | None = None
    test_loader: str | None = None
    evaluate: str | None = None
    better: str | None = None
    loss: str | None = None
    inputs: Inputs | None = None
    examples: int | None = None
    seed: int = 0

    def __bool__(self) -> bool:
        return any((self.factory, self.weights, self.loader, self.test_loader, self.evaluate, self.loss))


def made(text: str, meta: bool = False, seed: int = 0) -> tuple[nn.Module, Batch | None]:
    """Return the module that a function makes, in eval mode, and the example that it gives with it.

    Args:
        text: `package.module:function`.
        meta: every tensor is on the meta device and takes no memory.
        seed: of the weights that it draws.

    Raises:
        ConfigError: it cannot be imported or called, or gives something else; the text says what.
    """
    asked = f"The model {text}"
    function = imported(text, asked, MAKER)
    if not callable(function):
        raise ConfigError(asked, f"{text.partition(':')[2]!r} is {type(function).__name__}", f"Name {MAKER}")
    given: Any = function
    if not isinstance(function, nn.Module):
        check_alone(function, text, asked)
        try:
            elsewhere = torch.device("meta") if meta else nullcontext()
            with users_code(asked, f"Give {MAKER}"), seeded(seed), elsewhere:
                given = function()
        except DataError as error:
            found = error.found.replace("it raised", "the function raised", 1)
            raise ConfigError(asked, found, error.todo) from error
    model, example = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(asked, f"the function returned {type(given).__name__}", f"Give {MAKER}")
    return (model.to("meta") if meta else model).eval(), example


def read_weights(model: nn.Module, path: Path) -> None:
    """Read trained weights into a model; nothing but safetensors is read.

    Names may all begin with what DataParallel or torch.compile put there.

    Raises:
        ArtifactError: there is no such file, it is a pickle or damaged, or is of another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    asked = f"The weights {path}"
    if path.suffix.lower() in PICKLED:
        new, call = path.with_suffix(".safetensors"), f"({str(path)!r}, weights_only=True)"
        raise ArtifactError(
            asked, "it is a pickle, which can run code, and safetensors alone are read",
            f"Convert it by two lines of Python: state = torch.load{call}, and safetensors.torch.save_file("
            f"{{name: value.clone() for name, value in state.items()}}, {str(new)!r})",
        )  # fmt: skip
    if not path.is_file():
        near = sorted(item.name for item in path.parent.glob("*.safetensors")) if path.parent.is_dir() else []
        hint = f"; {path.parent} has {some(near)}" if near else ""
        raise ArtifactError(asked, f"there is no such file{hint}", "Give a .safetensors file")
    try:
        state: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(asked, f"it cannot be read, {said(error)}", "Give a .safetensors file") from error
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    own = model.state_dict()
    first = first_names(own)
    missing = [name for name, one in first.items() if not {name, one} & state.keys()]
    wrong = [f"{len(missing)} are missing ({some(missing)})"] if missing else []
    unknown = sorted(name for name in state if name not in own)
    wrong += [f"{len(unknown)} are not its own ({some(unknown)})"] if unknown else []
    shapes = [
        f"{name} is {tuple(value.shape)} and not {tuple(own[name].shape)}"
        for name, value in state.items() if name in own and own[name].shape != value.shape
    ]  # fmt: skip
    if shapes:
        wrong.append(some(shapes, between="; "))
    if wrong:
        found = f"they are of another network than {type(model).__name__}: {'; '.join(wrong)}"
        raise ArtifactError(asked, found, "Give the weights of the network that the function makes")
    model.load_state_dict(state, strict=False)


class Loader:
    """The batches that a user's object or function gives, any number of times.

    Args:
        text: `package.module:name`.
        examples: of one that never ends so many are used.
        reader: tells what of a batch is an input, and so how many examples it has.

    Raises:
        ConfigError: it cannot be imported, or is nothing that gives batches.
    """

    def __init__(
        self, text: str, examples: int, reader: Callable[[Batch], Batch] = lambda batch: batch
    ) -> None:
        self.text, self.asked, self.examples, self._reader = text, f"The loader {text}", examples, reader
        self._given = imported(text, self.asked, GIVES)
        self._read: list[Batch] | None = None
        if callable(self._given) and not isinstance(self._given, Iterable):
            check_alone(self._given, text, self.asked)
        else:
            self._checked(self._given)

    def whole(self) -> Any:
        """Return the user's own object, made anew where a function makes it; of an iterator what was read.

        Raises:
            DataError: the function raised.
            ConfigError: it gives no batches.
        """
        given = self._given
        if callable(given) and not isinstance(given, Iterable):
            with users_code(self.asked, "Mend it"):
                return self._checked(given())
        if isinstance(given, Iterator):  # it can be gone through once
            if self._read is None:
                self._read = list(limited(self._named(given), self.examples))
            return self._read
        return given

    @property
    def sized(self) -> bool:
        """Whether it says how many batches there are, and so ends."""
        return _length(self.whole()) is not None

    def batches(self, examples: int | None = None) -> Iterator[Batch]:
        """Give its batches, until `examples` have come.

        Raises:
            DataError: there is none, or the loader raised.
        """
        found = self._named(self.whole())
        empty = True
        for batch in found if examples is None else limited(found, examples):
            empty = False
            yield batch
        if empty:
            raise DataError(
                self.asked, "it gave no batch",
                "Give one with at least one batch; an iterator that was used up gives none",
            )  # fmt: skip

    def _named(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        todo, end = "Mend it, or leave out the examples that it fails on", object()
        with users_code(self.asked, todo):
            left = iter(batches)
        while True:  # nothing is changed for others while they work on a batch
            with users_code(self.asked, todo):
                batch: Any = next(left, end)
            if batch is end:
                return
            yield self._reader(batch)

    def _checked(self, given: Any) -> Any:
        if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
            raise ConfigError(
                self.asked, f"it is a {type(given).__name__}, a data set that gives single examples",
                "Give its batches: DataLoader(dataset, batch_size=64)",
            )  # fmt: skip
        nested = isinstance(given, (tuple, list)) and any(isinstance(item, DataLoader) for item in given)
        if nested or isinstance(given, (Tensor, str, Mapping)) or not isinstance(given, Iterable):
            raise ConfigError(self.asked, f"it is {describe(given)}", f"Give {GIVES}")
        return given


def _length(given: Any) -> int | None:
    """Return how many batches there are; None where that is not said."""
    try:
        return len(given) if isinstance(given, Sized) else None
    except TypeError:  # a DataLoader over a data set without a length
        return None


class Bounded:
    """A loader's batches, as often as they are gone through, until so many examples have come."""

    def __init__(self, loader: Loader, examples: int | None) -> None:
        self._loader, self._examples = loader, examples
        self._count: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self._loader.batches(self._examples)

    def __len__(self) -> int:
        if self._count is None:
            known = None if self._examples is not None else _length(self._loader.whole())
            # A schedule needs the number of steps. Counted, the batches need not be held all at once.
            with random_kept():
                self._count = sum(1 for _ in self._loader.batches(self._examples)) if known is None else known
        return self._count


class Evaluation:
    """A function of the user's that measures a model.

    Args:
        text: `package.module:function`: (model) or (model, loader) to a number; a `device` is given too.
        loader: for a function that takes one; None if there is none.
        given: the loader was given for it alone.

    Raises:
        ConfigError: it cannot be imported, or takes other arguments.
    """

    def __init__(self, text: str, loader: Loader | None, given: bool) -> None:
        self.text, self.asked = text, f"The function {text}"
        self.function = imported(text, self.asked, "a function of a model that returns a number")
        if not callable(self.function):
            found = f"it is a {type(self.function).__name__}"
            raise ConfigError(self.asked, found, "Name a function of a model that returns a number")
        wanted = needed(self.function)
        own = [item for item in wanted if item.name != "device"]
        if given and len(own) == 1:  # a loader that it can do without
            own += [item for item in _optional(self.function) if any(map(item.name.__contains__, BATCHES))][
                :1
            ]
        names = [item.name for item in own]
        self._kinds = {item.name: item.kind for item in (*wanted, *own)}
        if not 1 <= len(own) <= 2 or (given and len(own) == 1):
            arguments = ", ".join(name if number < 2 else f"{name}=..." for number, name in enumerate(names))
            raise ConfigError(
                self.asked, f"it takes {said_arguments(names)}, and is given a model"
                + (" and the test loader" if given else ", and a loader where it takes two"),
                "Leave out --test-loader" if len(own) == 1
                else f"Wrap it: def my_{self.name}(model, loader): return {self.name}({arguments})",
            )  # fmt: skip
        models = [name for name in names if _is_model(name)]
        self._model = models[0] if len(models) == 1 else names[0]
        self.loader = loader if len(own) == 2 else None
        if len(own) == 2 and loader is None:
            raise ConfigError(
                self.asked, f"it takes {said_arguments(names)}, and there is no loader", NO_LOADER
            )

    @property
    def name(self) -> str:
        """The function's own name."""
        return self.text.rpartition(":")[2].rpartition(".")[2]

    def __call__(self, model: nn.Module) -> float:
        """Return what the function says of a model, in evaluation mode; the modes are put back.

        Raises:
            DataError: it raised, or returned something else than a finite number.
        """
        passed("evaluate", model=model)
        todo = "Mend it; it is given the model in evaluation mode, on the device where the work is done"
        with modes_kept(model), random_kept(), users_code(self.asked, todo):
            model.eval()
            values = {name: self._value(name, model) for name in self._kinds}
            places = [name for name, kind in self._kinds.items() if kind is Parameter.POSITIONAL_ONLY]
            found = self.function(*(values.pop(name) for name in places), **values)
        return self._number(found)

    def _value(self, name: str, model: nn.Module) -> Any:
        if name == self._model:
            return model
        if name == "device":
            return device_of(model)
        assert self.loader is not None
        whole = self.loader.whole()
        # What never ends would never be measured.
        return whole if _length(whole) is not None else self.loader.batches(self.loader.examples)

    def _number(self, found: Any) -> float:
        if isinstance(found, (Tensor, np.ndarray, np.generic)) and int(np.prod(found.shape)) == 1:
            found = found.item()
        if isinstance(found, bool) or not isinstance(found, Real):
            what = (
                f"a dict of {', '.join(map(str, found))}" if isinstance(found, Mapping) else describe(found)
            )
            what = "nothing" if found is None else what
            todo = (
                "Return the number itself"
                if found is not None
                else "Return the number; to print it is not enough"
            )
            raise DataError(self.asked, f"it returned {what}, and no number", todo)
        number = float(found)
        if not np.isfinite(number):
            raise DataError(self.asked, f"it returned {number}", "Return a finite number")
        if self.name == "accuracy" and not 0 <= number <= 1:
            raise DataError(
                self.asked, f"it returned {number:g}, and an accuracy is a share between 0 and 1",
                "Return the share, or give the function another name (percent_correct)",
            )  # fmt: skip
        return number


BATCHES = ("loader", "data", "batches")
"""Words in the name of an argument that takes a loader."""


def _optional(function: Callable[..., Any]) -> list[Parameter]:
    return [
        item for item in inspect.signature(function).parameters.values() if item.default is not item.empty
    ]


def _is_model(name: str) -> bool:
    return "model" in name or name in ("net", "network", "module")


WORSE = ("loss", "error", "perplexity", "ppl", "nll", "mse", "mae", "rmse", "wer", "cer", "fid")
"""Words in a function's name by which lower numbers are better."""


def metric_of(function: str, better: str | None) -> str:
    """Return the name of what a function measures; it says where lower numbers are better.

    >>> metric_of("accuracy", None), metric_of("val_loss", None), metric_of("f1", "lower")
    ('accuracy', 'val_loss (lower is better)', 'f1 (lower is better)')
    """
    lower = better == "lower" or (
        better is None and any(word in WORSE for word in function.lower().split("_"))
    )
    if not lower:
        # A name that would be taken for a loss by itself.
        return function if metric(function).higher_is_better else f"value of {function}"
    return f"{function}{LOWER}"


class Objective:
    """A loss of the user's, as (model, batch) to a scalar.

    Args:
        text: `package.module:function`: of (outputs, targets), (outputs, batch) or (model, batch); a class
            or an object of torch's losses.
        inputs: what of a tuple the forward is given.

    Raises:
        ConfigError: it cannot be imported, or takes other arguments.
    """

    def __init__(self, text: str, inputs: Inputs | None) -> None:
        self.asked, self._inputs = f"The loss {text}", inputs
        wanted = "a function of (outputs, targets) or of (model, batch) that returns a scalar tensor"
        function = imported(text, self.asked, wanted)
        if isinstance(function, type):
            check_alone(function, text, self.asked)
            with users_code(self.asked, f"Name {wanted}"):
                function = function()
        if not callable(function):
            raise ConfigError(self.asked, f"it is a {type(function).__name__}", f"Name {wanted}")
        self.function = function
        plain = function.forward if isinstance(function, nn.Module) else function
        parameters = _positional(plain)
        names, least = [item.name for item in parameters], len(needed(plain))
        if len(names) < 2 or least > 2:
            raise ConfigError(
                self.asked, f"it takes {said_arguments(names[: max(least, 2)])}", f"Name {wanted}"
            )
        first = parameters[0]
        self.of_model = _is_model(first.name)
        self.of_model |= "Module" in str(first.annotation)
        self.of_batch = "batch" in names[1]
        given = "batch" if self.of_model or self.of_batch else "targets"
        self.note = f"loss: {text}({'model' if self.of_model else 'outputs'}, {given})"
        self._reader: Reader | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a model on a batch.

        Raises:
            DataError: the batch has no target, or the function raised or returned no scalar tensor.
        """
        if self.of_model:
            values: tuple[Any, ...] = (model, batch)
        else:
            self._reader = self._reader or Reader(model, self._inputs)
            batch = self._reader(batch)
            args, kwargs = model_inputs(batch)
            target = batch if self.of_batch else batch_target(batch)
            if target is None:
                raise DataError(
                    self.asked, f"found no target in {describe(batch)}",
                    "Give (inputs, target) pairs or mappings with labels, or a loss of (model, batch)",
                )  # fmt: skip
            values = (model(*args, **kwargs), target)
        with users_code(self.asked, "Mend it, or give a loss of (model, batch)"):
            found = self.function(*values)
        return self._scalar(found)

    def _scalar(self, found: Any) -> Tensor:
        if not isinstance(found, Tensor):
            todo = (
                "Return the tensor itself, without .item()" if isinstance(found, Real) else "Return a tensor"
            )
            raise DataError(self.asked, f"it returned {describe(found)}, and no scalar tensor", todo)
        if found.numel() != 1:
            raise DataError(
                self.asked, f"it returned {describe(found)}, and no scalar tensor", "Return its mean"
            )
        if torch.is_grad_enabled() and not found.requires_grad:
            raise DataError(
                self.asked, "its value has no gradient", "Leave out .detach(), .item() and no_grad in it"
            )
        return found.reshape(())


def _positional(function: Callable[..., Any]) -> list[Parameter]:
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [item for item in found if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)]


@dataclass(eq=False)
class OwnTask(Task):
    """A network of the user's own, with their data, metric and loss.

    Args:
        factory: `package.module:function` that makes the dense network.
        own: what else they gave.
    """

    factory: str
    own: Own = field(default_factory=Own)
    architecture = ""
    recover_defaults = RecoverConfig(lr=0.01)
    lacking = ("no --evaluate was given", "Give --evaluate package.module:function")
    trainable = True

    def __post_init__(self) -> None:
        self.name = self.factory.replace(":", "-")
        own, limit = self.own, self.own.examples or EXAMPLES
        self.model, self._example = made(self.factory, seed=own.seed)
        if own.weights is not None:
            read_weights(self.model, own.weights)
        self._loader = None if own.loader is None else Loader(own.loader, limit, self._reader)
        self._test = self._loader
        if own.test_loader is not None:
            self._test = Loader(own.test_loader, limit, self._reader)
        self._evaluation = None
        if own.evaluate is not None:
            self._evaluation = Evaluation(own.evaluate, self._test, own.test_loader is not None)
        self.metric = metric_of("metric" if self._evaluation is None else self._evaluation.name, own.better)
        self.loss: Loss | None = None if own.loss is None else Objective(own.loss, own.inputs)
        said = {"factory": self.factory, "loader": own.loader, "test_loader": own.test_loader}
        said |= {"evaluate": own.evaluate, "better": own.better, "loss": own.loss}
        self.options: Mapping[str, Any] = {
            **{key: value for key, value in said.items() if value is not None}, "dense": self.weights,
        }  # fmt: skip

    @cached_property
    def weights(self) -> str:
        """The hash of the dense network's weights."""
        return digest("", named_tensors(self.model))

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self.model, self.own.inputs)

    @property
    def loader(self) -> Loader:
        """The batches to look at and to train on. Raises a ConfigError where none were given."""
        if self._loader is None:
            raise ConfigError(f"Batches for {self.factory}", "there is no loader", NO_LOADER)
        return self._loader

    @cached_property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        """What a user has to know of what was given: what the items of the batches were taken for."""
        found = list(self._reader.notes)
        if isinstance(self.loss, Objective):
            found.append(self.loss.note)
        if self.own.weights is None and self.own.factory is None and self._is_drawn():
            found.append(
                f"warning: the weights of {self.factory} are random: with another seed it makes others. Give "
                "the trained ones with --weights, or let the function load them"
            )
        if self._loader is not None:
            count = sum(map(batch_size, self.calibration(self.own.examples or EXAMPLES, self.own.seed)))
            found.append(f"calibration: {count:,} examples of {self.own.loader}")
        return tuple(found)

    @property
    def named(self) -> str:  # type: ignore[override]
        """The options that name this network for a checkpoint of it."""
        given = {"factory": self.factory, "loader": self.own.loader, "evaluate": self.own.evaluate}
        given |= {"loss": self.own.loss}
        return "".join(f" --{key} {value}" for key, value in given.items() if value is not None)

    def _is_drawn(self) -> bool:
        try:
            other, _ = made(self.factory, seed=self.own.seed + 1)
        except CriaError:  # it can be called once
            return False
        return digest("", named_tensors(other)) != self.weights

    @cached_property
    def example(self) -> Batch:  # type: ignore[override]
        """One batch: the one that the function gives with the network, else the loader's first."""
        if self._example is not None:
            return self._reader(self._example)
        with seeded(self.own.seed):
            return next(self.loader.batches())

    def dense(self, seed: int = 0, progress: Progress | None = None) -> nn.Module:
        """Return the dense network, with its weights."""
        return self.model

    def untrained(self) -> nn.Module:
        """Return the dense network."""
        return self.model

    def blank(self) -> nn.Module:
        """Return the dense network, to load a checkpoint into a copy of it."""
        return self.model

    def calibration(self, examples: int, seed: int = 0) -> list[Batch]:
        """Return the loader's first examples, or all where it has fewer; the same for the same seed."""
        passed("calibration", task=self.name, examples=examples)
        if (examples, seed) not in self._splits:
            with seeded(seed):
                found = list(self.loader.batches(examples))
            self._splits.clear()  # one draw at a time
            self._splits[examples, seed] = found  # type: ignore[index]
        return list(self._splits[examples, seed])  # type: ignore[index]

    def train_batches(
        self,
        seed: int = 0,
        batch_size: int | None = None,
        augment: bool = True,
        device: torch.device | str = "cpu",
    ) -> EpochBatches:
        """Return a function from the epoch to the loader's batches, in the loader's own order and size."""
        most = self.own.examples or (None if self.loader.sized else EXAMPLES)
        batches = Bounded(self.loader, most)
        return lambda epoch: batches

    def validation_batches(self, limit: int | None = None) -> Iterable[Batch]:
        """Return one batch: the user's function knows by itself what it measures on."""
        return [self.example]

    def test_batches(self, limit: int | None = None) -> Iterable[Batch]:
        """Return what a network is compared with another one on: of the test loader, or the loader.

        Raises:
            ConfigError: a limit is asked for.
        """
        if limit is not None:
            raise ConfigError(
                f"At most {limit} test examples", f"{self.own.evaluate} knows by itself what it measures on",
                "Leave out --limit, and give a shorter --test-loader",
            )  # fmt: skip
        if self._test is None:
            return [self.example]
        return Bounded(self._test, self._test.examples)

    def fingerprint(self, *splits: str) -> str:
        """Return the SHA-256, in hex, of the calibration examples; of "test" that of the function's text."""
        if splits == ("test",):
            function = None if self._evaluation is None else self._evaluation.function
            try:
                text = inspect.getsource(function)  # type: ignore[arg-type]
            except (TypeError, OSError):
                text = ""
            return digest(f"{self.own.evaluate} {self.own.test_loader} {text}", {})
        batches = self.calibration(self.own.examples or EXAMPLES, self.own.seed)
        return fingerprint(*(item for item in tree_leaves(batches) if isinstance(item, Tensor)))

    @property
    def measured(self) -> bool:
        """Whether there is a function that measures."""
        return self._evaluation is not None

    @property
    def tested_on(self) -> str:
        """What measures, and on which loader."""
        assert self._evaluation is not None
        loader = self._evaluation.loader
        if loader is None:
            return self._evaluation.text
        most = "" if loader.sized else f", its first {loader.examples:,} examples"
        return f"{self._evaluation.text} on {loader.text}{most}"

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], progress: Progress | None = None) -> float:
        """Return what the user's function says of the model; it brings its own batches."""
        assert self._evaluation is not None
        return self._evaluation(model)

    def epoch(self, data: Any, seed: int, batch_size: int, augment: bool) -> Iterable[Batch]:
        """There are no splits: `train_batches` takes the loader."""
        raise NotImplementedError

    def chosen(self, data: Any, index: Tensor, seed: int | None = None) -> Iterable[Batch]:
        """There are no splits: `calibration` takes the loader."""
        raise NotImplementedError

    def tensors(self, data: Any) -> Iterable[Tensor]:
        """There are no splits: `fingerprint` takes the calibration examples."""
        raise NotImplementedError
