"""Which share of one network can go without residual width; an older version of the package runs it too.

    python benchmarks/removable_cell.py own/lstm-tagger

`python benchmarks/coverage.py --before` runs it on the networks of `BEFORE` and files what it says under
`before`: with the source of an older commit first on PYTHONPATH, that is what this commit could do.
"""

from __future__ import annotations

import argparse

import torch

import zoo
from cria_prune import discover
from cria_prune.config import PlanConfig
from cria_prune.planning.budget import largest_reachable
from cria_prune.structure.groups import without_residual
from staged import Values, stages


def measure(name: str) -> Values:
    """Discover the groups and return the largest share that can go at the default floor."""
    groups = without_residual(discover(*zoo.build(name)))
    return {
        "groups": len(groups.prunable),
        "reachable": largest_reachable(groups, PlanConfig().floor, "parameters") if groups.prunable else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("network", choices=zoo.names())
    options = parser.parse_args()
    torch.set_num_threads(1)
    stages([("removable", lambda: measure(options.network))])


if __name__ == "__main__":
    main()
