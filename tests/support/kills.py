"""Killing a process at a chosen moment, also in the middle of writing a state."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from cria_prune.resume import store

save = store.save_file
replace = os.replace


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(tensors, path, metadata):
    save(tensors, path, metadata)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    kill()


def replaced_and_killed(*args):
    replace(*args)
    kill()


def at_call(number, function, original):
    """Return `original`, which at its call of that number is `function`; layers of a walk do not count."""
    calls = []

    def called(*args, **kwargs):
        if any("walk-" in str(item) for item in args):
            return original(*args, **kwargs)
        calls.append(None)
        return (function if len(calls) == number else original)(*args, **kwargs)

    return called


def signals_of(module, *arguments, before=""):
    """Call `children(*arguments)` of a test module, such as `tests.recovery.test_loop`, in a fresh process.

    Args:
        before: statements that come first.

    Returns:
        What it printed, from JSON.
    """
    root = Path(__file__).parents[2]
    code = (
        f"import sys; sys.path[:0] = {[str(root), str(Path(__file__).parent)]!r}; {before}"
        f"import {module} as test; test.children(*{arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
