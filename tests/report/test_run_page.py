"""The report: one page with everything in it, whatever the names and whatever is missing."""

from __future__ import annotations

import ast
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cria_prune.base.errors import ArtifactError
from cria_prune.planning.plan import Plan
from cria_prune.repair.fidelity import Distance, Fidelity
from cria_prune.report import curves, html, pictures, run_page
from cria_prune.report.pictures import GONE, KEPT, plot_rounds, plot_scores, plot_widths
from cria_prune.report.run_page import render, write_report

NASTY = "<script>alert('x')</script> & $\\frac$ \"q\""


def full_result() -> dict:
    return {
        "title": "Digits",
        "metric": "accuracy",
        "dense": 0.97,
        "pruned": 0.61,
        "recovered": 0.963,
        "parameters_dense": 127_082,
        "parameters": 60_000,
        "macs_dense": 2.5e6,
        "macs": 1.2e6,
        "reduction": 0.5279,
        "asked": 0.5,
        "of": "parameters",
        "reachable": 0.93,
        "rounds": [
            {
                "round": 1,
                "parameters": 90_000,
                "reduction": 0.2918,
                "metric": 0.9,
                "seconds": {"record": 1.5},
            },
            {
                "round": 2,
                "parameters": 60_000,
                "reduction": 0.5279,
                "metric": None,
                "seconds": {"record": 2.5},
                "repairs": [
                    {
                        "tensor": "hidden.weight",
                        "recovered": 0.75,
                        "cut": True,
                        "effective": 640,
                        "regressors": 256,
                        "lacking": 96,
                    },
                    {"tensor": "linear.weight", "recovered": 0.5, "cut": False, "lacking": 0},
                ],
                "unrepaired": {"table.weight": "is read by an operation"},
                "fidelity": {
                    "as cut": Fidelity(102, (Distance("logits", 102, 0.5, 0.8, 0.4, 0.75),)).to_dict(),
                    "repaired": Fidelity(102, (Distance("logits", 102, 0.1, 0.9, 0.1, 0.875),)).to_dict(),
                },
            },
        ],
        "widths": {"conv1": [32, 16], "hidden": [128, 60], "linear": [10, 10]},
        "scores": {"conv1": {"scores": list(np.linspace(0, 1, 32)), "kept": list(range(16, 32))}},
        "frozen": {"linear": "it is the model's output"},
        "seconds": {"record": 4.0, "recover": 130.0},
        "provenance": {"torch": "2.13.0", "commit": "abc123", "dirty": False, "device": None},
        "config": {"plan": {"reduction": 0.5}},
    }


class Checker(HTMLParser):
    """Every tag is closed in order; collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def check(page: str) -> Checker:
    parser = Checker()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(parser.tags)
    for name, value in parser.attributes:
        assert not name.startswith("on") and name != "src"
        if name.endswith("href"):
            assert value.startswith("#")
    ids = re.findall(r'<(?:path|clipPath)[^>]* id="([^"]*)"', page)
    assert all(page.count(f'"#{i}"') + page.count(f"#{i})") for i in set(ids))
    return parser


def test_everything_is_on_the_page(tmp_path):
    where = write_report(tmp_path / "r.html", full_result())
    parser = check(where.read_text(encoding="utf-8"))
    text = " ".join(" ".join(parser.words).replace("\xa0", " ").split())
    for piece in (
        "asked 50.00 % , removed 52.79 % , at most possible 93.00 %",
        "dense 97.00 % 127,082 2.5 M",
        "recovered 96.30 % 60,000 1.2 M",
        "to dense -0.70 points 47.21 % 48.00 %",
        "2 60,000 52.79 % – 2.5 s",
        "On 102 calibration examples",
        "2 repaired logits 0.1 87.50 % 0.1 0.900",
        "table.weight – – – not repaired: is read by an operation linear.weight 50.00 % – read no unit that "
        "left hidden.weight 75.00 % 2.5 96",
        "conv1 16 of 32 stay",
        "32 → 16",
        "recover 2 min 10 s",
        "it is the model's output",
        "commit abc123",
        '"reduction": 0.5',
    ):
        assert piece in text, piece
    assert "device" not in text
    assert parser.tags.count("svg") == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.html"]


def test_a_folder_gets_a_page(tmp_path):
    assert write_report(tmp_path, {}) == tmp_path / "report.html"
    with pytest.raises(ArtifactError, match="the system refused"):
        write_report(tmp_path / "none" / "r.html", {})


@pytest.mark.parametrize("key", sorted(full_result()))
def test_any_key_may_be_missing(key, monkeypatch):
    result = full_result()
    if key not in ("rounds", "widths", "scores"):
        monkeypatch.setattr(run_page, "figure", lambda *args: "<figure></figure>")
    del result[key]
    check(render(result))
    check(render({**result, key: None}))
    check(render({key: full_result()[key]}))


def test_nothing_at_all():
    parser = check(render({}))
    assert "Pruning report" in parser.words and "section" not in parser.tags


def test_all_text_is_escaped():
    result = full_result()
    result |= {
        "title": NASTY,
        "metric": NASTY,
        "of": NASTY,
        "frozen": {NASTY: NASTY},
        "config": {NASTY: NASTY},
    }
    result |= {"widths": {NASTY: [4, 2]}, "scores": {NASTY: {"scores": [0, 1.0, 2, 3], "kept": [2, 3]}}}
    result |= {"provenance": {NASTY: NASTY}, "seconds": {NASTY: 1.0}}
    result["rounds"] = [{"round": NASTY, "parameters": 1, "metric": 1.0, "seconds": {NASTY: 1}}]
    page = render(result)
    check(page)
    assert "<script" not in page


def test_a_title_that_looks_like_the_frame():
    page = render({"title": "{body}", "config": {"a": "{title}"}})
    assert page.count("<header>") == 1 and "&quot;{title}&quot;" in page


def test_the_same_result_gives_the_same_page():
    assert render(full_result()) == render(full_result())


def test_the_worst_repairs_are_seen_and_the_others_unfold():
    layers = [{"tensor": f"layer{number}", "recovered": 1 - number / 20} for number in range(14)]
    page = render({"repairs": layers, "unrepaired": {"": "as cut is nearer"}})
    seen, _, rest = page.partition("<details><summary>4 more")
    assert seen.index("layer13") < seen.index("layer4<") and "layer3<" in rest and "layer3<" not in seen
    assert "Nothing was repaired: as cut is nearer" in seen
    assert "Repair of every layer" not in render({"rounds": [{"round": 1}]})


def test_a_metric_that_is_no_share():
    result = full_result() | {
        "metric": "perplexity",
        "dense": 12.345,
        "pruned": 88.0,
        "recovered": float("nan"),
    }
    words = " ".join(check(render(result)).words)
    assert "12.35" in words and "88" in words and "points" not in words


def test_rounds_without_a_metric_have_no_column_for_it():
    result = full_result()
    assert "removed accuracy time" in " ".join(" ".join(check(render(result)).words).split())
    result["rounds"] = [{**row, "metric": None} for row in result["rounds"]]
    assert "removed time" in " ".join(" ".join(check(render(result)).words).split())


def test_many_groups_are_cut_off_and_said(monkeypatch):
    monkeypatch.setattr("cria_prune.report.run_page.PLOTS", 2)
    entry = {"scores": [0.0, 1.0], "kept": [1]}
    page = render({"scores": {f"g{number}": entry for number in range(4)}})
    assert "2 of 4 layers are shown, evenly over the depth" in page and page.count("<svg") == 2


# Plots


def test_plots_give_back_the_axes_they_were_given():
    from matplotlib.figure import Figure

    axes = Figure().subplots(3)
    plan = Plan({"a": 4, "b": 2}, {"a": (0, 1, 2), "b": (0, 1)}, (), {})
    assert plot_widths(plan, axes[0]) is axes[0]
    assert plot_rounds(full_result()["rounds"], axes[1]) is axes[1]
    assert plot_scores([1.0, 2.0, 3.0], [1, 2], axes[2]) is axes[2]


def test_widths_draw_the_numbers():
    ax = plot_widths({"a": [4, 3], "b": [2, 2]})
    before, after = ax.containers
    assert [bar.get_width() for bar in before] == [4, 2]
    assert [bar.get_width() for bar in after] == [3, 2]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]


def test_scores_draw_every_unit_and_the_cut():
    from matplotlib.colors import to_rgba

    scores = np.random.default_rng(0).random(100)
    kept = np.sort(np.argsort(scores)[40:])
    ax = plot_scores(scores, kept)
    gone, stay = ([bar.get_height() for bar in container] for container in ax.containers)
    assert (sum(gone), sum(stay)) == (40, 60)
    colours = [container[0].get_facecolor() for container in ax.containers]
    assert colours == [to_rgba(GONE), to_rgba(KEPT)]
    assert ax.lines[0].get_xdata()[0] == scores[kept].min()


@pytest.mark.parametrize(
    "scores", [[], [1.0], [2.0, 2.0], [float("nan"), 1.0], [float("inf")] * 2, [1e300, 1e-300]]
)
def test_odd_scores(scores):
    plot_scores(scores, list(range(len(scores))))


def test_rounds_skip_unknown_metrics():
    ax = plot_rounds(
        [{"round": 0, "metric": 0.5, "parameters": 10}, {"round": 1, "metric": None}], metric="accuracy"
    )
    line = ax.figure.axes[1].lines[0]
    assert line.get_ydata().tolist() == [50.0]
    assert len(plot_rounds([]).lines) == 0


@pytest.mark.parametrize("module", [pictures, pictures, curves, html, run_page])
def test_matplotlib_is_imported_inside(module):
    """No statement at the top of the module imports it (type checking aside)."""
    top = ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
    names = [ast.unparse(node) for node in top if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert names and not any("matplotlib" in name for name in names)


def test_rounds_that_were_not_measured_are_bridged_by_a_dotted_line() -> None:
    history = [
        {"round": name, "metric": value} for name, value in (("dense", 0.9), (1, None), (2, 0.3), (3, 0.8))
    ]
    right = plot_rounds(history, metric="accuracy").figure.axes[1]
    assert [line.get_linestyle() for line in right.lines] == [":", "-", "None"]
    assert [text.get_text() for text in right.texts] == ["90", "30", "80"]
