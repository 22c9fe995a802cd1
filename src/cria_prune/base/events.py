"""Named moments of the work, which a listener may count, show or interrupt; see `watch`.

Of several processes each tells its own listeners what it does itself. An event comes where the work begins,
but for those that say otherwise. Facts are the live objects of the work: read them, and change nothing.

    ===========  ==============================================================  ======================
    event        the moment                                                      facts
    ===========  ==============================================================  ======================
    dense        a recipe makes or reads its dense model                         task, seed
    weights      a Hugging Face folder is read whole                             folder
    calibration  calibration examples are drawn                                  task, examples
    inputs       what the items of a batch are taken for is known                model, text
    reference    the model is copied, to compare its cuts with                   model
    capture      a model's operations are captured                               model
    discover     the unit groups are found                                       model
    record       a pass over the calibration batches                             model, groups
    batch        after a batch of that pass                                      number, examples
    turn         a turn of a pruning layer by layer                              number, turns
    score        the units are scored                                            criterion, states
    scored       after they are                                                  scores
    factored     after two graphs were factored, in place of an eigensolver      device
    losses       what each group's cut costs alone is measured                   groups, levels, done
    level        after what one level of a group costs is known                  level
    time         the seconds that each group's cut saves are measured            model, groups
    plan         what stays is chosen                                            groups, target
    repair       the consumers are repaired                                      kept, consumed, plan
    refitted     after a layer was refitted                                      number, layers
    cut          a model is cut, or the copy of a trial                          model, plan
    verify       a cut model, or a folder, is compared with the masked model     plan, source, folder
    norms        the batch norms are measured again                              model
    fidelity     a network is compared with another one on held-out examples     model, other
    round        after a round is over, and kept where that was asked for        number, rounds
    evaluate     a recipe's metric is measured                                   model
    train        a fine-tune                                                     model
    epoch        the batches of an epoch are asked for                           epoch
    step         a training step                                                 step
    measure      a fine-tune measures its metric                                 model
    write        a pruned folder is written layer by layer                       folder
    shard        one of its files is written                                     path
    written      after the last of them                                          folder
    certify      a written folder is loaded again by a fresh process             folder
    cell         a cell of a bench is measured                                   cell
    ===========  ==============================================================  ======================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

EVENTS = (
    *(
        "dense",
        "weights",
        "calibration",
        "inputs",
        "reference",
        "capture",
        "discover",
        "record",
        "batch",
        "turn",
    ),
    *(
        "score",
        "factored",
        "scored",
        "losses",
        "level",
        "time",
        "plan",
        "repair",
        "refitted",
        "cut",
        "verify",
        "norms",
        "fidelity",
        "round",
    ),
    *("evaluate", "train", "epoch", "step", "measure", "write", "shard", "written", "certify", "cell"),
)


@dataclass(frozen=True)
class Event:
    """A moment that was passed: its name, one of `EVENTS`, and what there is to know of it."""

    name: str
    facts: Mapping[str, Any]


Listener = Callable[[Event], None]
_LISTENERS: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


def passed(event: str, **facts: Any) -> None:
    """Tell those who listen in this context, the outermost first; an error of theirs ends the work here."""
    assert event in EVENTS, event
    for listener in _LISTENERS.get():
        listener(Event(event, facts))


@contextmanager
def watch(listener: Listener) -> Iterator[None]:
    """Call a listener at the named moments of all work inside; the module's docstring has their table.

    What the listener raises interrupts the work at that moment: a KeyboardInterrupt as Ctrl-C would, anything
    else as an error of that stage would. Watches may be nested. They hold for their own thread or task.

    Args:
        listener: gets an event: its `name`, and a mapping of `facts`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from cria_prune import prune, watch
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> names = []
        >>> with watch(lambda event: names.append(event.name)):
        ...     result = prune(net, [torch.randn(32, 4) for _ in range(4)])
        >>> names.count("record"), names.count("batch"), names.count("capture")
        (1, 4, 3)
    """
    token = _LISTENERS.set((*_LISTENERS.get(), listener))
    try:
        yield
    finally:
        _LISTENERS.reset(token)
