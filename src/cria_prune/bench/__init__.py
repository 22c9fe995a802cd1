"""Criteria against each other: the same network, groups, budget and recovery; one result file per cell."""
