"""A bench: its result files, and one HTML page of them: tables, pictures with intervals, provenance."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from cria_prune.base.errors import some
from cria_prune.base.files import is_plain_file
from cria_prune.base.metrics import metric as metric_of
from cria_prune.config import OF, REPAIRED, repair_of_before
from cria_prune.report.curves import mean_interval, plot_bench
from cria_prune.report.html import (
    Part,
    count,
    figure,
    metric_text,
    number,
    page,
    pictures,
    share,
    table,
)

VARIED = ("criterion", "reduction", "seed", "network")
"""Keys of a cell that are no setting: a table of one setting has them as rows, columns, repeats and title."""

Setting = tuple[tuple[str, str], ...]
"""Names and values of all other keys of a cell, sorted."""
Points = dict[float, dict[int, float]]
"""Reduction -> seed -> value."""


class Cell(BaseModel):
    """Where a result stands in the grid; further keys are settings."""

    model_config = ConfigDict(extra="allow")

    criterion: str
    reduction: float
    seed: int = 0
    dense_seed: int | None = None
    network: str = ""

    @model_validator(mode="before")
    @classmethod
    def _as_now(cls, values: Any) -> Any:
        return repair_of_before(values) if isinstance(values, Mapping) else values

    def setting(self) -> Setting:
        """Return all that is neither criterion, reduction, seed nor network."""
        rest = {key: value for key, value in self.model_dump().items() if key not in VARIED}
        return tuple(sorted((key, _text(value)) for key, value in rest.items() if value is not None))


def _text(value: Any) -> str:
    """Return the value of a setting as text, several of them with their names.

    >>> _text(4), _text({"lr": 0.1, "distill": 0.5})
    ('4', 'distill 0.5, lr 0.1')
    """
    if not isinstance(value, Mapping):
        return str(value)
    return ", ".join(f"{key} {value[key]}" for key in sorted(value))


class CellFile(BaseModel):
    """One result file."""

    model_config = ConfigDict(extra="ignore")

    cell: Cell
    metric: str = "accuracy"  # files from before there were others do not name it
    pruned: float | None = None
    recovered: float | None = None
    report: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    provenance: dict[str, Any] = {}


@dataclass
class Bench:
    """A bench as its files say it.

    Attributes:
        cells: all result files, by name.
        dense: seed -> metric of the dense model.
        left: names of other JSON files, with the reason.
    """

    cells: list[CellFile] = field(default_factory=list)
    dense: dict[int, float] = field(default_factory=dict)
    origins: list[dict[str, Any]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def settings(self) -> list[Setting]:
        """Return the settings that occur, sorted; numbers by value."""
        found = {item.cell.setting() for item in self.cells}
        return sorted(found, key=lambda setting: [(key, _order(value)) for key, value in setting])

    def values(self, setting: Setting, key: str) -> dict[str, Points]:
        """Return criterion -> reduction -> seed -> value of "pruned" or "recovered", where there is one."""
        found: dict[str, Points] = {}
        for item in self.cells:
            value = getattr(item, key)
            if item.cell.setting() == setting and value is not None and math.isfinite(value):
                points = found.setdefault(item.cell.criterion, {})
                points.setdefault(item.cell.reduction, {})[item.cell.seed] = value
        return found

    def of(self, setting: Setting) -> list[CellFile]:
        """Return the cells of a setting."""
        return [item for item in self.cells if item.cell.setting() == setting]

    def dense_of(self, setting: Setting) -> list[float]:
        """Return the figures of the dense models that the cells of a setting start from, each value once."""
        cells = [item.cell for item in self.of(setting)]
        seeds = {cell.seed if cell.dense_seed is None else cell.dense_seed for cell in cells}
        return sorted({self.dense[seed] for seed in seeds if seed in self.dense})

    @property
    def criteria(self) -> list[str]:
        """All criteria, sorted."""
        return sorted({item.cell.criterion for item in self.cells})


def read_bench(folder: Path) -> Bench:
    """Read the result files of a folder, not those of folders in it; a file that is none is named in `left`.

    A cell is JSON with `cell`; the figure of a dense model JSON with `dense` and a seed in its provenance.
    """
    bench = Bench()
    for path in sorted(folder.glob("*.json")):
        if not is_plain_file(path):
            bench.left.append(f"{path.name}: no regular file")
            continue
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(said, dict) and "cell" in said:
                bench.cells.append(CellFile.model_validate(said))
            elif isinstance(said, dict) and isinstance(said.get("dense"), (int, float)):
                origin = said.get("provenance") or {}
                bench.dense[int(origin.get("seed") or 0)] = float(said["dense"])
                bench.origins.append(dict(origin))
            else:
                bench.left.append(f"{path.name}: no cell of a bench")
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            bench.left.append(f"{path.name}: its {where!r} is damaged")
        except (OSError, ValueError, TypeError, RecursionError):
            bench.left.append(f"{path.name}: it cannot be read")
    bench.origins += [item.provenance for item in bench.cells]
    return bench


def curve(points: Points) -> list[tuple[float, list[float]]]:
    """Return the points as the pictures take them: (reduction, values in the order of the seeds)."""
    return [(share, [seeds[seed] for seed in sorted(seeds)]) for share, seeds in sorted(points.items())]


def distinct(origins: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """Return the different values of a key of several provenances, sorted."""
    return sorted({str(item[key]) for item in origins if item.get(key) is not None})


def _order(value: str) -> tuple[float, str]:
    try:
        return float(value), ""
    except ValueError:
        return math.inf, value


STATES = (("pruned", "Right after pruning"), ("recovered", "After recovery"))
STAGES = {
    "scoring": ("record", "discover", "score"),
    "cutting": ("surgery", "plan", "repair", "compensate", "batch norms", "verify"),
    "Torch-Pruning and its search": ("prune", "search"),
    "recovery": ("recover",),
}
SAID = {
    **{("repair", value): text for value, text in REPAIRED.items()},
    ("batch_norm", "True"): "batch norms measured again",
    ("batch_norm", "False"): "batch norms as they were",
    ("quick", "True"): "quick training data",
    ("quick", "False"): "all training data",
    **{("of", value): f"share of the {text}" for value, text in OF.texts.items()},
}
WITH = {"tune": "tuned by {}", "dense_seed": "dense model {}"}
PLURAL = {"rounds": "round", "epochs": "epoch"}
ORIGIN = {
    "platform": "platform", "cpus": "processors", "device": "device", "cria_prune": "Cria",
    "python": "Python", "torch": "torch", "numpy": "numpy", "data": "data",
}  # fmt: skip
"""Key of a provenance -> what a page calls it."""
LISTED = 12  # so many commits or files are named, the others counted


def render_bench(bench: Bench, name: str) -> str:
    """Return the page of a bench.

    Args:
        bench: what `read_bench` found; at least one cell.
        name: of the folder, where the cells name no network.
    """
    networks = distinct([{"network": item.cell.network or None} for item in bench.cells], "network")
    settings = sorted(bench.settings(), key=lambda setting: not bench.values(setting, "recovered"))
    parts: list[Part] = [(setting_title(setting), _setting(bench, setting)) for setting in settings]
    parts += [("Time", _times(bench)), ("Provenance", _origins(bench)), ("Not on this page", _left(bench))]
    return page(f"Bench: {', '.join(networks) or name}", _lead(bench), parts)


def setting_title(setting: Setting) -> str:
    """Return a setting in words.

    >>> setting_title((("epochs", "3"), ("rounds", "1"), ("scope", "inner")))
    'scope inner, 1 round, 3 epochs of recovery'
    >>> setting_title((("of", "macs"), ("repair", "once")))
    'share of the MACs, repaired at once'
    >>> setting_title((("ranking", "global"), ("repair", "none")))
    'ranking global, without repair'
    >>> setting_title((("dense_seed", "1"), ("tune", "distill 0.5")))
    'dense model 1, tuned by distill 0.5'
    """
    known = dict(setting)
    words = [f"scope {known.pop('scope')}"] if "scope" in known else []
    for key in ("rounds", "epochs"):
        if key in known:
            value = known.pop(key)
            after = " of recovery" if key == "epochs" else ""
            some = f"{value} {PLURAL[key]}{'' if value == '1' else 's'}{after}"
            words.append("no recovery" if (key, value) == ("epochs", "0") else some)
    for key, value in known.items():
        plain = key if value == "True" else WITH.get(key, f"{key} {{}}").format(value)
        words.append(SAID.get((key, value), plain))
    return ", ".join(words) or "all cells"


def _lead(bench: Bench) -> str:
    shares = sorted({item.cell.reduction for item in bench.cells})
    asked = ", ".join(f"{100 * item:g} %" for item in shares)
    return (
        f"<p class=lead>{_many(len(bench.cells), 'cell')}: "
        f"{_many(len(bench.criteria), 'criterion', 'criteria')}, "
        f"asked to remove {asked}. {escape(_seeds_text(bench.cells))}</p>"
    )


def _seeds_text(cells: Sequence[CellFile]) -> str:
    """Say how many seeds there are, and so whether an interval can be shown."""
    seeds = sorted({item.cell.seed for item in cells})
    points = Counter((item.cell.setting(), item.cell.criterion, item.cell.reduction) for item in cells)
    fewest, most = min(points.values()), max(points.values())
    several = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    named = ", ".join(map(str, seeds))
    if most == 1:
        return f"One seed per point ({named}): there are no intervals."
    return f"{several} seeds per point ({named}); ± is half of the 95 % t-interval of the mean."


def _setting(bench: Bench, setting: Setting) -> str:
    cells = bench.of(setting)
    metric = cells[0].metric
    drawn: list[str] = []
    order: list[str] = []
    ranking = ""
    for key, title in reversed(STATES):  # ranked after recovery where there was one
        values = bench.values(setting, key)
        if not values:
            continue
        if not order:
            last = max(asked for points in values.values() for asked in points)
            order = _ranked(values, last, metric)
            ranking = f"Best first at {100 * last:g} %{' after recovery' if key == 'recovered' else ''}."
        picture = partial(
            plot_bench,
            {name: curve(values[name]) for name in sorted(values)},
            metric=metric,
            dense=bench.dense_of(setting),
            names=bench.criteria,
        )
        label = f"{title}: {metric} against reduction"
        drawn = [
            figure(picture, (4.2, 3.9), label, f"<b>{title}</b>"),
            _values_table(values, order, ranking, title, metric),
            *drawn,
        ]
    reached = [found for item in cells if (found := number(item.report.get("reached"))) is not None]
    ends = sorted({share(min(reached)), share(max(reached))}) if reached else []
    said = f"Reached {' to '.join(ends)}. " if ends else ""
    dense = bench.dense_of(setting)
    unit = " %" if metric_of(metric).share else ""
    words = f"Dense: {with_interval(dense, metric)}{unit}. " if dense else ""
    note = f"<p>{words}{said}{escape(_seeds_text(cells))}</p>"
    return note + pictures("pair", drawn)


def _values_table(
    values: dict[str, Points], order: Sequence[str], ranking: str, title: str, metric: str
) -> str:
    """Criteria in the rows, in their `order`, which `ranking` explains; reductions in the columns."""
    shares = sorted({asked for points in values.values() for asked in points})
    most = max(len(seeds) for points in values.values() for seeds in points.values())
    rows = []
    for name in sorted(values, key=lambda name: order.index(name) if name in order else len(order)):
        cells = []
        for asked in shares:
            seeds = values[name].get(asked, {})
            few = f" ({len(seeds)})" if seeds and len(seeds) < most else ""
            cells.append(with_interval(list(seeds.values()), metric) + few if seeds else "–")
        rows.append([name, *cells])
    unit = f"{metric} in %" if metric_of(metric).share else metric
    words = f"<p><b>{title}</b>: {escape(unit)}, by the share asked to remove. {escape(ranking)}</p>"
    head = ["criterion", *(f"{100 * asked:g} %" for asked in shares)]
    return f"<div>{words}{table(head, rows, 'bench')}</div>"


def _ranked(values: dict[str, Points], last: float, metric: str) -> list[str]:
    """Return the criteria, the best at the reduction `last` first; those without a value there at the end."""
    sign = -1 if metric_of(metric).higher_is_better else 1
    there = {name: points[last] for name, points in values.items() if points.get(last)}
    best = {name: sign * statistics.fmean(seeds.values()) for name, seeds in there.items()}
    return sorted(values, key=lambda name: (best.get(name, math.inf), name))


def with_interval(values: Sequence[float], metric: str) -> str:
    """Return the mean of some values of a metric, with half of its t-interval where there are several."""
    (mean, half), shared = mean_interval(values), metric_of(metric).share
    text = f"{100 * mean:.2f}" if shared else metric_text(mean, metric)
    if half is None:
        return text
    # On a telephone the line may break before the sign, and not after it.
    return f"{text} ±\N{NO-BREAK SPACE}" + (f"{100 * half:.2f}" if shared else f"{half:.3g}")


def _times(bench: Bench) -> str:
    """Mean seconds per criterion, the stages in three."""
    rows = []
    for name in bench.criteria:
        cells = [item.seconds for item in bench.cells if item.cell.criterion == name]
        spent = [
            [sum(item.get(stage, 0.0) for stage in stages) for item in cells if stages[0] in item]
            for stages in STAGES.values()
        ]
        rows.append([name, *(f"{statistics.fmean(found):.2f}" if found else "–" for found in spent)])
    known = any(cell != "–" for row in rows for cell in row[1:])
    words = "<p>Mean seconds per cell, over all settings; the recovery where there was one.</p>"
    return words + table(["criterion", *STAGES], rows, "bench") if known else ""


def _origins(bench: Bench) -> str:
    found = {key: distinct(bench.origins, key) for key in ("time", "commit", *ORIGIN)}
    dates, dirty = found["time"], sum(bool(item.get("dirty")) for item in bench.origins)
    rows = [
        ["dates", " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]]))],
        ["commits", some(found["commit"], LISTED)],
        ["changed after the commit", _many(dirty, "file") if dirty else "none"],
        *([title, some(found[key], LISTED)] for key, title in ORIGIN.items()),
    ]
    return table(["", ""], [row for row in rows if row[1]], "words")


def _left(bench: Bench) -> str:
    if not bench.left:
        return ""
    more = len(bench.left) - LISTED
    said = [*map(escape, bench.left[:LISTED]), *([f"and {count(more)} more"] if more > 0 else [])]
    listed = "".join(f"<li>{words}</li>" for words in said)
    return f"<p>Files in the folder that are no result of this bench.</p><ul>{listed}</ul>"


def _many(items: int, noun: str, plural: str = "") -> str:
    return f"{items:,} {noun if items == 1 else plural or noun + 's'}"
