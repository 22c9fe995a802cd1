"""The suite that takes minutes, in a reduced form: one seed and one share of it, with its own training."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from cria_prune.cli.main import app


def test_a_part_of_the_digits_suite_runs_whole(tmp_path: Path) -> None:
    words = ["bench", "digits", "--criterion", "random", "--criterion", "innovation", "--reduction", "0.75",
             "--seed", "1", "--output", str(tmp_path), "--quiet"]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["cells"] == answer["measured"] == 4 and answer["failed"] == 0
    dense = json.loads((tmp_path / "dense-seed1.json").read_text())["dense"]
    found = {
        name: json.loads((tmp_path / f"inner-{name}-0.75-rounds4-seed1-epochs10.json").read_text())
        for name in ("random", "innovation")
    }
    assert dense > 0.97 and all(item["pruned"] < item["recovered"] for item in found.values())
    assert found["innovation"]["recovered"] > 0.97 and found["innovation"]["report"]["reached"] >= 0.75
    repaired = json.loads(
        (tmp_path / "inner-innovation-0.75-rounds4-seed1-epochs10-repair-norms.json").read_text()
    )
    assert repaired["pruned"] > found["innovation"]["pruned"] + 0.2 and repaired["recovered"] > 0.97
    assert "innovation" in (tmp_path / "report.html").read_text()
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.glob("*.json"))
    assert json.loads(CliRunner().invoke(app, words).stdout.splitlines()[-1])["measured"] == 0
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.glob("*.json")) == before
