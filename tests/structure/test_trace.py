"""What follows the units through the captured operations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cria_prune.structure.rules import attention, computed, experts, layers, positions, recurrent, shape
from cria_prune.structure.rules.core import RULES

FOLDER = Path(shape.__file__).parent


def test_a_fresh_process_knows_every_rule() -> None:
    """Modules register their rules when they are imported; this suite imports all of them."""
    rules = (layers, attention, computed, experts, positions, recurrent, shape)
    here = {*(module.__name__ for module in rules), f"{shape.__package__}.core"}
    assert here == {f"{shape.__package__}.{path.stem}" for path in FOLDER.glob("[!_]*.py")}
    code = "from cria_prune.structure import trace; print(*sorted(trace.RULES))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(RULES)
    assert {"linear", "reshape", "getitem", "scaled_dot_product_attention"} <= RULES.keys()
