"""Configurations: frozen, round trips, clear errors, presets."""

import sys

import pytest

from cria_prune import PruneConfig, preset
from cria_prune.base.errors import ConfigError, PackageError
from cria_prune.bench.suite import Grid


def test_round_trip_through_json_and_yaml() -> None:
    config = PruneConfig(plan={"reduction": 0.3, "of": "macs"}, score={"pairs": 0.25})
    assert PruneConfig.from_text(config.to_json()) == config == PruneConfig.from_text(config.to_yaml())


def test_json_is_read_without_pyyaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    config = PruneConfig(plan={"reduction": 0.3})
    assert PruneConfig.from_text(config.to_json()) == config
    for call in (config.to_yaml, lambda: PruneConfig.from_text("verify: true")):
        with pytest.raises(PackageError, match=r"pyyaml is not installed.*'cria-prune\[recipes\]'"):
            call()


def test_unknown_keys_and_bad_values_name_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"rounds: .*found 0.*Known keys: reduction, of, rounds"):
        PruneConfig(plan={"rounds": 0})
    with pytest.raises(ConfigError, match="Known keys: record, score, plan, verify"):
        PruneConfig(planning={})
    with pytest.raises(ConfigError, match=r"found list\. Write a mapping"):
        PruneConfig.from_text("[1, 2]")
    with pytest.raises(ConfigError, match="Write valid YAML or JSON"):
        PruneConfig.from_text("plan: [")


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        PruneConfig().verify = False


def test_the_paper_preset_is_the_protocol_of_the_abstracts() -> None:
    config = preset("paper", reduction=0.3, rounds=8)
    assert (config.score.criterion, config.score.pairs, config.plan.ranking) == (
        "distortion",
        "all",
        "uniform",
    )
    assert (config.plan.reduction, config.plan.rounds) == (0.3, 8)
    with pytest.raises(ConfigError, match="Known presets: paper"):
        preset("llama")


def test_what_was_once_compensate_is_a_repair() -> None:
    """Files from before there were several repairs said true or false, grids and cells of benches too."""
    assert PruneConfig(compensate=True).repair == "once" and PruneConfig(compensate=False).repair == "none"
    assert PruneConfig.from_text("compensate: false").given() == {"repair": "none"}
    grid = Grid(network="digits", criteria=["l2"], reductions=[0.5], compensate=[False, True])
    assert grid.repair == ("none", "once")
    for wrong in ({"compensate": "sometimes"}, {"compensate": True, "repair": "once"}):
        with pytest.raises(ConfigError, match=r"compensate: Extra inputs .*Known keys: .*repair"):
            PruneConfig(**wrong)
    with pytest.raises(ConfigError, match=r"repair: Input should be 'walk', 'once' or 'none' .found 'foo'"):
        PruneConfig(repair="foo")
