"""How a command knows the result of an earlier run again."""

from __future__ import annotations

from typing import Any

import pytest

from cria_prune import PruneConfig, RecoverConfig
from cria_prune.cli.job import _as_now


def kept(criterion: str, **score: Any) -> dict[str, Any]:
    config = PruneConfig(score={"criterion": criterion}).model_dump(mode="json")
    tuning = RecoverConfig().model_dump(mode="json")
    return {"prune": {**config, "score": {**config["score"], **score}}, "recover": tuning}


@pytest.mark.parametrize("criterion", ["innovation", "distortion", "l2"])
def test_a_result_of_before_is_known_by_the_ridge_that_nobody_read(criterion: str) -> None:
    """Until 0.1.0 a ridge of 0.01 stood there whatever the criterion."""
    assert _as_now(kept(criterion, ridge=0.01)) == kept(criterion)
    assert _as_now(kept(criterion, seed=7)) != kept(criterion)
    before, now = (
        kept(criterion),
        kept(criterion),
    )  # and until there were several repairs, whether there was one
    del before["prune"]["repair"]
    for flag, repair in ((True, "once"), (False, "none")):
        before["prune"]["compensate"], now["prune"]["repair"] = flag, repair
        assert _as_now(before) == now != kept(criterion)


def test_a_result_of_before_says_nothing_of_single_groups() -> None:
    before = kept("l2")
    for name in ("ignore", "protect", "share", "keep", "to_parameters", "to_macs"):
        del before["prune"]["plan"][name]
    assert before != kept("l2") == _as_now(before)


@pytest.mark.parametrize(
    "config", [None, {}, {"recover": {}}, {"prune": {"score": {"ridge": "x", "own": 1}}}]
)
def test_what_is_of_another_version_stays_another(config: Any) -> None:
    assert _as_now(config) == config
