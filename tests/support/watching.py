"""Counting and interrupting the work at its named moments; see `cria_prune.base.events`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from cria_prune import watch
from cria_prune.base.events import EVENTS, Event


@contextmanager
def at(event: str, number: int, action: Callable[[Event], object]) -> Iterator[list[Event]]:
    """Collect the events of a name; at the one of that number (from 1) the action takes place."""
    assert event in EVENTS, event
    seen: list[Event] = []

    def listener(item: Event) -> None:
        if item.name == event:
            seen.append(item)
            if len(seen) == number:
                action(item)

    with watch(listener):
        yield seen


def counted(event: str) -> AbstractContextManager[list[Event]]:
    """Collect the events of a name."""
    return at(event, 0, lambda _: None)


def interrupted_at(
    event: str, number: int = 1, error: BaseException | type[BaseException] = KeyboardInterrupt
) -> AbstractContextManager[list[Event]]:
    """Collect the events of a name, and raise at the one of that number."""

    def stop(_: Event) -> None:
        raise error

    return at(event, number, stop)


@contextmanager
def never(*events: str) -> Iterator[None]:
    """Let the test fail if one of these moments is passed inside."""
    assert set(events) <= set(EVENTS), events

    def listener(item: Event) -> None:
        if item.name in events:
            pytest.fail(f"{item.name} was passed")

    with watch(listener):
        yield
