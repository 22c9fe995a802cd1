"""Criteria against each other: the same network, groups, budget and recovery; one result file per cell."""

from cria_prune.bench.cell import cells, config_of, file_name
from cria_prune.bench.run import run_grids
from cria_prune.bench.suite import Grid, packaged, read_suite

__all__ = ["Grid", "cells", "config_of", "file_name", "packaged", "read_suite", "run_grids"]
