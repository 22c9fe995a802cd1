"""The blocks of a model, run a stretch at a time: what a stretch gives is kept on disk for the next one.

A model runs its blocks one after another, each on what the one before it gave. So the calibration batches can
go through the first blocks, wait on disk, and go on through the next ones; each weight is read once, and
only the blocks of a stretch are in memory. Whether a model is such a chain is tried, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import (
    tree_flatten,
    tree_leaves,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from cria_prune.base.batches import Batch, map_tensors, model_inputs
from cria_prune.base.errors import StructureError
from cria_prune.base.modules import cache_off, offloading_hooks


class Chain:
    """The blocks of a model, which its forward calls once each, in their order.

    Args:
        model: the model; it is put back as it was after every stretch.
        path: name of the list of blocks.
        folder: for what goes from block to block.
    """

    def __init__(self, model: nn.Module, path: str, folder: Path) -> None:
        self.model, self.path, self._folder = model, path, folder
        self.blocks: list[Any] = list(model.get_submodule(path).children())
        self._form: Any = None  # of what a block gives: tensors, or a tuple with them
        self._turn = 0

    @classmethod
    def of(cls, model: nn.Module, folder: Path) -> Chain | None:
        """Return the list of blocks that holds most of the parameters, or None where there is no list."""
        lists = {path: item for path, item in model.named_modules() if isinstance(item, nn.ModuleList)}
        sizes = {
            path: sum(weight.nbytes for weight in item.parameters())
            for path, item in lists.items()
            if len(item) > 1
        }
        return cls(model, max(sizes, key=lambda path: sizes[path]), folder) if sizes else None

    def place(self, tensor: str) -> int | None:
        """Return the number of the block that a tensor of the model is in; None outside the blocks."""
        head, _, _ = tensor.removeprefix(f"{self.path}.").partition(".")
        return int(head) if tensor.startswith(f"{self.path}.") and head.isdecimal() else None

    @contextmanager
    def stretch(self, first: int, last: int) -> Iterator[None]:
        """Inside, a forward runs the blocks `first` to `last` alone; the weights of these stay loaded.

        The other blocks give what they are to give at once: those before, what came out of the stretch
        before this one, for the same batch; those after, what this stretch gives. Forwards have to
        be of the same batches in the same order in every stretch. The first stretch begins at block 0.
        """
        run = _Run(self, first, last)
        kept = [(hook, hook.weights_map) for block in self.blocks[first : last + 1] for hook in _hooks(block)]
        # accelerate has put a forward of its own on each block, which loads the
        # weights. It is called inside, and is what has to be there again afterwards.
        own = [(block, vars(block).get("forward")) for block in self.blocks]
        try:
            for hook, inner in kept:
                hook.weights_map = _Held(inner)
            for number, (block, _) in enumerate(own):
                block.forward = partial(run.call, number, block.forward)
            yield
        finally:
            for block, before in own:
                vars(block).pop("forward", None)
                if before is not None:
                    block.forward = before
            for hook, inner in kept:
                hook.weights_map = inner
        # Only after a stretch that came to its end: one that failed is done again with the same files.
        self._turn += 1

    def forget(self) -> None:
        """Remove what the stretches before this one were given."""
        for turn in range(self._turn):
            for path in self._folder.glob(f"{turn}-*.safetensors"):
                path.unlink()

    def form(self) -> dict[str, Any] | None:
        """Return as plain JSON what `take` needs to go on; None where it cannot be said so."""
        if self._form is None:
            return {"turn": self._turn, "tree": None, "rest": []}
        tree, rest = self._form
        if not all(item is None or isinstance(item, (bool, int, float, str)) for item in rest):
            return None
        try:
            return {"turn": self._turn, "tree": treespec_dumps(tree), "rest": rest}
        except (NotImplementedError, TypeError):
            return None

    def take(self, said: dict[str, Any]) -> None:
        """Go on where another chain of the same blocks and folder was."""
        self._turn = int(said["turn"])
        self._form = None if said["tree"] is None else (treespec_loads(said["tree"]), list(said["rest"]))

    def is_whole(self, example: Batch, stretches: list[tuple[int, int]]) -> bool:
        """Say whether stretches one after another give the outputs of a plain forward, bit for bit."""
        # Bit for bit, not nearly: scores and plans are to be those of the whole
        # model. A forward that is no chain (blocks that share something, or are
        # called twice) differs or raises, and the model is then recorded as a whole.
        expected = outputs(self.model, example)
        try:
            for first, last in stretches:
                with self.stretch(first, last):
                    found = outputs(self.model, example)
                self.forget()
        except (StructureError, RuntimeError, TypeError, ValueError, LookupError):
            return False
        return len(found) == len(expected) and all(map(torch.equal, found, expected))

    def write(self, batch: int, value: Any) -> None:
        """Keep what the last block of a stretch gave for a batch."""
        leaves, form = tree_flatten(value)
        rest = [None if isinstance(item, Tensor) else item for item in leaves]
        self._form = form, rest
        tensors = {str(place): item for place, item in enumerate(leaves) if isinstance(item, Tensor)}
        # safetensors refuses tensors that share memory, as views of one tensor do.
        tensors = {name: item.detach().clone().contiguous() for name, item in tensors.items()}
        save_file(tensors, self._folder / f"{self._turn + 1}-{batch}.safetensors")

    def read(self, batch: int) -> Any:
        """Return what the stretch before gave for a batch."""
        form, rest = self._form
        # Copied: a file's tensors lie anywhere in memory, and some processors then multiply to other bits.
        read = load_file(self._folder / f"{self._turn}-{batch}.safetensors")
        held = {name: value.clone() for name, value in read.items()}
        return tree_unflatten([held.get(str(place), item) for place, item in enumerate(rest)], form)


class _Run:
    """One stretch: which block comes next, of which batch."""

    def __init__(self, chain: Chain, first: int, last: int) -> None:
        self.chain, self.first, self.last = chain, first, last
        self.batch, self.next, self.value = -1, 0, None

    def call(self, number: int, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block, or give what stands for its result.

        Raises:
            StructureError: it is not its turn.
        """
        # A block out of turn would be given what stands for another's result.
        if number != self.next:
            raise StructureError(
                f"Running the blocks of {self.chain.path!r} one after another",
                f"block {number} came where block {self.next} was due",
                "Give more memory, so that the model is recorded as a whole",
            )
        self.next = (number + 1) % len(self.chain.blocks)
        # The first block begins a batch. What it would give was
        # kept by the stretch before, unless there was none.
        if number == 0:
            self.batch += 1
            self.value = self.chain.read(self.batch) if self.first else None
        if self.first <= number <= self.last:
            self.value = block(*args, **kwargs)
        if number == self.last < len(self.chain.blocks) - 1:
            self.chain.write(self.batch, self.value)
        return self.value


class _Held(Mapping[str, Tensor]):
    """A map of weights that keeps those that were loaded."""

    def __init__(self, inner: Mapping[str, Tensor]) -> None:
        self._inner, self._loaded = inner, dict[str, Tensor]()

    def __getitem__(self, key: str) -> Tensor:
        # accelerate lets go of a weight after each forward. Within
        # a stretch it is loaded once, not once for every batch.
        if key not in self._loaded:
            self._loaded[key] = self._inner[key]
        return self._loaded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner)

    def __len__(self) -> int:
        return len(self._inner)


def _hooks(block: nn.Module) -> Iterator[Any]:
    for module in block.modules():
        yield from offloading_hooks(module)


def outputs(model: nn.Module, example: Batch) -> list[Tensor]:
    """Return the tensors of a model's output for an example, in evaluation mode."""
    args, kwargs = model_inputs(map_tensors(example, torch.clone))
    with cache_off(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        return [item for item in tree_leaves(model.eval()(*args, **kwargs)) if isinstance(item, Tensor)]
