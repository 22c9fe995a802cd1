"""Killing a process at a chosen moment, also in the middle of writing a state."""

import os
import signal

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
    """Return `original`, which at its call of that number is `function`."""
    calls = []

    def called(*args, **kwargs):
        calls.append(None)
        return (function if len(calls) == number else original)(*args, **kwargs)

    return called
