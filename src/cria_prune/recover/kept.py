"""How a fine-tune is kept on disk, and how it goes on from there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cria_prune.recover.guard import generators, put_back, set_generators, trained
from cria_prune.recover.schedule import all_of, moments, set_moments
from cria_prune.recover.source import Source
from cria_prune.recover.state import BATCHES, Facts, Keeper
from cria_prune.store import State

if TYPE_CHECKING:
    from cria_prune.recover.run import Run


def due(run: Run, keeper: Keeper) -> bool:
    """Say whether a state is due within an epoch; of several processes the first one's clock counts."""
    if run.parallel is None:
        return keeper.due()
    return bool(run.here.total(torch.tensor(float(keeper.due() and run.here.first))))


def keep(run: Run, keeper: Keeper) -> None:
    """Write the state of a fine-tune; all processes call it, and the first one writes."""
    facts = Facts(
        identity={**keeper.identity, BATCHES: run.count},
        history=run.history,
        best_epoch=run.best_epoch,
        step=run.step,
        finished=run.finished,
    )
    parts: dict[str, State] = {"best": run.best_state or {}}
    if not run.finished:
        if run.parallel is not None:
            parts["norms"] = run.parallel.each()
        if run.sharded is not None:
            parts["optimizer"] = run.sharded.whole(moments(run.optimizer))
        elif run.here.first:
            parts["optimizer"] = moments(run.optimizer)
        else:  # it writes nothing
            return
        parts["weights"] = run.copied()
        parts["losses"] = {"epoch": torch.tensor(run.losses, dtype=torch.float64)}
        parts["generators"], parts["opened"] = generators(run.device), run.opened or {}
    if run.here.first:
        keeper.write(facts, parts)


def go_on(run: Run, keeper: Keeper, source: Source) -> bool:
    """Bring a fine-tune to the state on disk; say whether there was one.

    Raises:
        ArtifactError: it is damaged, or of another fine-tune.
    """
    found = keeper.read()
    if found is None:
        return False
    facts, parts = found
    run.count = source.sized(0)[1]
    keeper.check(facts, run.count)
    run.history, run.best_epoch, run.step = list(facts.history), facts.best_epoch, facts.step
    run.finished = facts.finished
    share = all_of if run.sharded is None else run.sharded.share
    own = trained(run.model)
    try:
        for part in ("best",) if run.finished else ("best", "weights"):
            if parts[part].keys() != own.keys():
                raise LookupError("they have other names")
            put_back(run.model, {name: share(value, own[name]) for name, value in parts[part].items()})
        if not run.finished:
            set_moments(run.optimizer, parts.get("optimizer", {}), share)
            if run.parallel is not None:
                run.parallel.take(parts.get("norms", {}))
            run.losses = parts["losses"]["epoch"].tolist()
            run.opened = parts.get("opened")
            set_generators(parts["generators"], run.device)
    except (LookupError, ValueError, RuntimeError) as error:
        raise keeper.damaged(f"its tensors do not fit the model: {error}") from error
    run.best_state = parts["best"] if run.sharded is None or run.here.first else {}
    return True
