"""Recording and scoring in turns: no more moments in memory at a time than were allowed.

Legend: d = units of a group, n = features that a consumer reads, r = columns of a sketch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from cria_prune.base.batches import Batch
from cria_prune.base.events import passed
from cria_prune.base.modules import device_of, give_back
from cria_prune.base.progress import Progress
from cria_prune.config import PruneConfig, RecordConfig
from cria_prune.criteria.score import check_telling, find_criterion
from cria_prune.offload.chain import Chain, outputs
from cria_prune.recording.collect import limited
from cria_prune.recording.signals import Collector
from cria_prune.recording.states import reads_of
from cria_prune.resume.turns import Spilled, TurnStore
from cria_prune.spectrum.importance import Importance
from cria_prune.stages import Prepared, rank
from cria_prune.structure.groups import UnitGroup, UnitGroups


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
            the moments for the repair are kept with `compensate`.
        scratch: a folder for moments, and for what goes from block to block.
        memory: bytes for the moments and weights of a turn; a turn has one block at least.
        progress: where to show the turns.
        kept: what is kept of the turns, to go on from; None keeps nothing.

    Returns:
        Importances in the order of the network, moments for the repair, and how many turns there were.
    """
    model, groups, config = prepared.model, prepared.groups, prepared.config
    spilled, found = Spilled(scratch, device_of(model)), dict[str, Importance]()
    if not find_criterion(config.score).needs and not config.compensate:
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
                    _pass(model, prepared.batches, config.record)
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
        turns = [
            *_stretches(chain, groups.prunable, sizes, memory),
            *_outside(chain, groups.prunable, sizes, memory),
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


def _outside(
    chain: Chain, groups: Sequence[UnitGroup], sizes: Mapping[str, int], memory: int
) -> Iterator[Turn]:
    rest = [group for group in groups if _block_of(chain, group) is None]
    yield from (Turn(part, None) for part in _parts(rest, sizes, memory))


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
    kept = Collector(groups, config.record, config.compensate, reads).memory()
    return {item.name: item.while_recording + item.afterwards for item in kept}


def _pass(model: nn.Module, batches: Iterable[Batch], config: RecordConfig) -> None:
    for batch in limited(batches, config.examples):
        outputs(model, batch)
