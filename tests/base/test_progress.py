import io

import pytest

from cria_prune.base.progress import Progress, track


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_are_few_and_carry_fields_and_time_left():
    stream, clock = io.StringIO(), Clock()
    with Progress(quiet=False, stream=stream, clock=clock).bar("train", 1000) as bar:
        for _ in range(1000):
            clock.now += 0.1
            bar.update(loss=0.5, metric=None)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "train: 100/1000 (10%), 90 s left, loss 0.5"
    assert lines[-1] == "train: 1000/1000 (100%), 100 s, loss 0.5"


def test_lines_are_at_least_two_seconds_apart_and_the_last_one_is_written():
    stream, clock = io.StringIO(), Clock()
    with Progress(quiet=False, stream=stream, clock=clock).bar("fast", 10) as bar:
        for _ in range(10):
            clock.now += 0.1
            bar.update()
    assert stream.getvalue() == "fast: 10/10 (100%), 1 s\n"


def test_a_slow_step_without_a_total_still_speaks():
    stream, clock = io.StringIO(), Clock()
    with Progress(quiet=False, stream=stream, clock=clock).bar("slow") as bar:
        clock.now += 31
        bar.update(seen="x")
    assert stream.getvalue() == "slow: 1, 31 s, seen x\n"


def test_quiet_writes_nothing():
    stream = io.StringIO()
    assert list(track([1, 2], label="x", progress=Progress(stream=stream))) == [1, 2]
    assert stream.getvalue() == ""


def test_a_terminal_gets_bars_that_nest_and_stop_on_an_error():
    stream = Terminal()
    progress = Progress(quiet=False, stream=stream)
    with pytest.raises(RuntimeError), progress.bar("outer", 2) as outer:
        outer.update(loss=0.25)
        for _ in range(2):
            list(track(range(3), label="inner", progress=progress))
            assert [task.description for task in progress._rich.tasks] == ["outer"], "finished steps pile up"
        raise RuntimeError
    assert "outer" in stream.getvalue() and "inner" in stream.getvalue() and "loss 0.25" in stream.getvalue()
    assert progress._rich is None


def test_track_takes_an_iterator_and_its_total():
    stream = io.StringIO()
    assert list(track(iter("ab"), 2, "items", Progress(quiet=False, stream=stream))) == ["a", "b"]
    assert stream.getvalue() == "items: 2/2 (100%), 0 s\n"
