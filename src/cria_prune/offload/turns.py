"""Recording and scoring in turns: no more moments in memory at a time than were allowed.

A model runs its blocks one after another, each on what the one before it gave. So the calibration batches can
go through the first blocks, wait on disk, and go on through the next ones; each weight is read once, and
only the blocks of a stretch are in memory. Whether a model is such a chain is tried, not assumed.

Legend: d = units of a group, n = features that a consumer reads, r = columns of a sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import (
    tree_flatten,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from cria_prune.base.batches import Batch, limited, outputs
from cria_prune.base.dispatched import Loaded
from cria_prune.base.errors import StructureError
from cria_prune.base.events import passed
from cria_prune.base.modules import (
    attributes_kept,
    device_of,
    forward_of,
    give_back,
    offloading_hooks,
)
from cria_prune.base.progress import Progress
from cria_prune.config import PruneConfig
from cria_prune.criteria.score import check_telling, find_criterion
from cria_prune.recording.signals import Collector
from cria_prune.recording.states import reads_of
from cria_prune.resume.turns import Spilled, TurnStore
from cria_prune.spectrum.importance import Importance
from cria_prune.stages import Prepared, rank
from cria_prune.structure.groups import UnitGroup, UnitGroups


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
        hooks = [hook for block in self.blocks[first : last + 1] for hook in _hooks(block)]
        with ExitStack() as stack:
            stack.enter_context(attributes_kept(hooks, "weights_map"))
            for hook in hooks:
                hook.weights_map = _Held(hook.weights_map)
            for number, block in enumerate(self.blocks):
                stack.enter_context(forward_of(block, partial(run.call, number, block.forward)))
            yield
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


class _Held(Loaded):
    """A map of weights that keeps those that were loaded."""

    def __init__(self, inner: Mapping[str, Tensor]) -> None:
        super().__init__(inner)
        self._loaded = dict[str, Tensor]()

    def __getitem__(self, key: str) -> Tensor:
        # accelerate lets go of a weight after each forward. Within
        # a stretch it is loaded once, not once for every batch.
        if key not in self._loaded:
            self._loaded[key] = self._inner[key]
        return self._loaded[key]


def _hooks(block: nn.Module) -> Iterator[Any]:
    for module in block.modules():
        yield from offloading_hooks(module)


@dataclass(frozen=True)
class Turn:
    """Groups that are recorded together.

    Attributes:
        groups: the groups.
        blocks: first and last of the blocks that run; None where the whole model does.
    """

    groups: tuple[UnitGroup, ...]
    blocks: tuple[int, int] | None


def score_in_turns(
    prepared: Prepared,
    scratch: Path,
    memory: int,
    progress: Progress,
    kept: TurnStore | None = None,
) -> tuple[dict[str, Importance], Spilled, int]:
    """Record and score every prunable group of a dispatched model.

    Args:
        prepared: the dispatched model, which is left as it was, and batches that are the same in every pass;
            the moments for the repair are kept with the repair `once`.
        scratch: a folder for moments, and for what goes from block to block.
        memory: bytes for the moments and weights of a turn; a turn has one block at least.
        progress: where to show the turns.
        kept: what is kept of the turns, to go on from; None keeps nothing.

    Returns:
        Importances in the order of the network, moments for the repair, and how many turns there were.
    """
    model, groups, config = prepared.model, prepared.groups, prepared.config
    spilled, found = Spilled(scratch, device_of(model)), dict[str, Importance]()
    if not find_criterion(config.score).needs and config.repair != "once":
        return dict(rank(prepared).importances), spilled, 0
    chain, turns = plan_turns(model, groups, config, memory, scratch, prepared.example)
    done = 0
    if kept is not None:
        done, found = kept.read(spilled, chain)
    with progress.bar("record", len(turns)) as bar:
        bar.update(done)
        for number, turn in enumerate(turns[done:], done + 1):
            passed("turn", number=number, turns=len(turns))
            part = replace(prepared, groups=replace(groups, groups=turn.groups))
            ranking = None
            with nullcontext() if turn.blocks is None or chain is None else chain.stretch(*turn.blocks):
                if turn.groups:
                    # Scores of a part may be alike, as they may in a small
                    # group of a whole network; all are looked at in the end.
                    ranking = rank(part, whole=False)
                else:  # nothing to read there, but the blocks after it need what it gives
                    for batch in limited(prepared.batches, config.record.examples):
                        outputs(model, batch)
            if ranking is not None:
                found |= ranking.importances
                for name, moments in (ranking.consumed or {}).items():
                    spilled.add(name, moments)
            if kept is not None:
                # First the turn is noted, then what it was given is removed. A
                # kill between the two leaves a file too many, never one too few.
                kept.write(number, found, spilled, chain)
            if chain is not None:
                chain.forget()
            # Its moments lie on disk. Without this they would be held until the next turn has its own.
            del ranking
            give_back()
            bar.update()
    check_telling(config.score.criterion, found)
    return {group.name: found[group.name] for group in groups.prunable}, spilled, len(turns)


def plan_turns(
    model: nn.Module, groups: UnitGroups, config: PruneConfig, memory: int, scratch: Path, example: Batch
) -> tuple[Chain | None, list[Turn]]:
    """Return the turns, and the chain of blocks if they are stretches of it.

    All together where the memory allows; else stretches of blocks; else, where the model is no chain of
    blocks, groups one after another, each with a pass of the whole model.
    """
    sizes = moment_bytes(groups.prunable, config)
    # One pass of the whole model is the cheapest, where its moments have room.
    if sum(sizes.values()) <= memory:
        return None, [Turn(groups.prunable, None)]
    # Whether the model is a chain is tried on the example, in a
    # folder of its own: the real chain counts its turns from 0.
    trial = scratch / "trial"
    trial.mkdir(exist_ok=True)
    chain = Chain.of(model, trial)
    if chain is not None:
        outside = [group for group in groups.prunable if _block_of(chain, group) is None]
        turns = [
            *_stretches(chain, groups.prunable, sizes, memory),
            *(Turn(part, None) for part in _parts(outside, sizes, memory)),
        ]
        stretches = [turn.blocks for turn in turns if turn.blocks is not None]
        if len(stretches) > 1 and chain.is_whole(example, stretches):
            return Chain.of(model, scratch), turns
    return None, [Turn(part, None) for part in _parts(groups.prunable, sizes, memory)]


def _block_of(chain: Chain, group: UnitGroup) -> int | None:
    """Return the block that a group is recorded in; None where it is in none, or in several."""
    found = {chain.place(tap.tensor) for tap in (*group.inputs, *group.outputs)}
    return found.pop() if len(found) == 1 else None


def _stretches(
    chain: Chain, groups: Sequence[UnitGroup], sizes: Mapping[str, int], memory: int
) -> Iterator[Turn]:
    taken: list[UnitGroup] = []
    first, used = 0, 0
    for number, block in enumerate(chain.blocks):
        own = [group for group in groups if _block_of(chain, group) == number]
        cost = sum(sizes[group.name] for group in own) + sum(weight.nbytes for weight in block.parameters())
        # A stretch has one block at least, or it would never end.
        if number > first and used + cost > memory:
            yield Turn(tuple(taken), (first, number - 1))
            taken, first, used = [], number, 0
        taken, used = [*taken, *own], used + cost
    yield Turn(tuple(taken), (first, len(chain.blocks) - 1))


def _parts(
    groups: Sequence[UnitGroup], sizes: Mapping[str, int], memory: int
) -> Iterator[tuple[UnitGroup, ...]]:
    """Yield the groups in parts that fit into the memory, one group at least."""
    part: list[UnitGroup] = []
    for group in groups:
        if part and sum(sizes[item.name] for item in (*part, group)) > memory:
            yield tuple(part)
            part = []
        part.append(group)
    if part:
        yield tuple(part)


def moment_bytes(groups: Sequence[UnitGroup], config: PruneConfig) -> dict[str, int]:
    """Return group -> the bytes of its moments while they are made: the sums, beside the result."""
    reads = reads_of(find_criterion(config.score).needs)
    kept = Collector(groups, config.record, config.repair == "once", reads).memory()
    return {item.name: item.while_recording + item.afterwards for item in kept}
