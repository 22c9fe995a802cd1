"""One measurement as a process of its own: what it found so far survives a crash, a hang or a limit.

The child prints one JSON object per finished stage (`stages` does that); the parent collects them
(`collect`) and says how it ended.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Values = dict[str, Any]
Stage = tuple[str, Callable[[], Values]]


def stages(steps: Iterable[Stage], alone: Container[str] = ()) -> None:
    """Run the steps in order and print what each returns, with its seconds and CPU seconds.

    An error ends them, but for the error of a step in `alone`, on which no later one rests.
    """
    warnings.simplefilter("ignore")
    for name, step in steps:
        print(json.dumps({"begins": name}), flush=True)
        start, busy = time.perf_counter(), time.process_time()
        try:
            values = step()
        except Exception as error:
            print(json.dumps({"stage": name, "values": {"error": said(error)}}), flush=True)
            if name not in alone:
                return
            continue
        spent = {
            "seconds": round(time.perf_counter() - start, 3),
            "cpu": round(time.process_time() - busy, 3),
        }
        values = {**spent, **values}
        print(json.dumps({"stage": name, "values": values}), flush=True)


def said(error: BaseException) -> str:
    """Return the type and the first line of an error, without addresses in memory or folders."""
    line = (str(error).strip().splitlines() or [""])[0]
    return re.sub(r"0x[0-9a-f]+|/\S*/", "", f"{type(error).__name__}: {line}")[:300]


def collect(script: str, arguments: list[str], limit: float) -> Values:
    """Run a script beside this file; return stage -> values, one with the error where it did not end well."""
    command = [sys.executable, str(HERE / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, timeout=limit, env=environment)
        output, end = done.stdout, f"the process ended with code {done.returncode}" if done.returncode else ""
        if done.returncode:
            print(done.stderr.decode(errors="replace")[-2000:], file=sys.stderr)
    except subprocess.TimeoutExpired as stopped:
        output, end = stopped.stdout or b"", f"no answer within {limit:g} s"
    found: Values = {}
    running = "start"
    for line in output.decode(errors="replace").splitlines():
        item = json.loads(line) if line.startswith("{") else {}
        running = item.get("begins", running)
        if "stage" in item:
            found[item["stage"]] = item["values"]
    if end:
        found.setdefault(running, {"error": end})
    return found


def merged(sets: list[set[str]]) -> list[list[str]]:
    """Join the sets that share a member; return those of two and more, sorted."""
    found: list[set[str]] = []
    for item in sets:
        touching = [other for other in found if other & item]
        found = [other for other in found if not other & item] + [item.union(*touching)]
    return sorted(sorted(item) for item in found if len(item) > 1)
