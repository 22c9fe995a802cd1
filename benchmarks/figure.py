"""Draw the figure of the README: accuracy against size, with Torch-Pruning beside it, from the result files.

python benchmarks/figure.py

The numbers are kept beside the picture. A test compares them with the result files, and the picture with the
numbers, by the hash in its metadata.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from typing import Any

from cria_prune.report.curves import mean_interval
from result_cells import ALL, PLAIN, ROOT, Cells, dense_of, pick, read, way

PICTURE = ROOT / "docs" / "pictures" / "tradeoff.png"
NUMBERS = PICTURE.with_suffix(".json")
PANELS = {"cifar10-resnet20": "ResNet-20", "cifar10-resnet56": "ResNet-56"}
CUTS = {
    "Cria, cut and repaired, no training": ("innovation", ALL),
    "Cria, cut alone, no training": ("innovation", PLAIN),
    "Torch-Pruning, magnitude, no training": ("tp-magnitude", PLAIN),
    **{
        f"Torch-Pruning, {name}": (f"tp-{name}", PLAIN)
        for name in ("bn-scale", "fpgm", "lamp", "taylor", "hessian")
    },
}
"""What is drawn without training: a label, the criterion, and what is done beside cutting."""
RECOVERED = {
    "Cria, after three epochs": ("innovation-magnitude", ALL),
    "Torch-Pruning, after three epochs": ("tp-magnitude", PLAIN),
}
"""What is drawn after a fine-tune, at half of the parameters, where both leave the same number of them. The
two stars stand beside each other (`shift`), or one would hide the other."""
BLUE, RED, GREY, INK = "#1f5fbf", "#c8442c", "#b9b4ad", "#333333"
STYLES: dict[str, dict[str, Any]] = {
    "Cria, cut and repaired, no training": {"color": BLUE, "marker": "o", "linewidth": 2.4, "zorder": 5},
    "Cria, cut alone, no training": {"color": BLUE, "linestyle": "--", "linewidth": 1.4, "zorder": 4},
    "Torch-Pruning, magnitude, no training": {"color": RED, "marker": "s", "linewidth": 2.4, "zorder": 5},
    "Cria, after three epochs": {"color": BLUE, "marker": "*", "markersize": 15, "shift": 0.7},
    "Torch-Pruning, after three epochs": {**{"color": RED, "marker": "*", "markersize": 15, "shift": -0.7}},
}
OTHERS = {"color": GREY, "linewidth": 1.2, "zorder": 2}
"""Torch-Pruning's other importances, alike and under one label: none is higher at half of the parameters."""


def numbers() -> dict[str, Any]:
    """Network -> the dense accuracy, and for every label its points, all in percent."""
    found: dict[str, Any] = {}
    for network in PANELS:
        cells = [
            item for item in pick(read(network), scope="inner", rounds=4) if not item["cell"].get("tune")
        ]
        dense = [100 * item["dense"] for item in dense_of(network).values()]
        found[network] = {
            "dense": round(statistics.mean(dense), 3),
            "right after pruning": {
                label: points([item for item in pick(cells, criterion=name, epochs=0) if way(item) == how])
                for label, (name, how) in CUTS.items()
            },
            "after three epochs": {
                label: points(smallest(pick(cells, criterion=name, epochs=3), how))
                for label, (name, how) in RECOVERED.items()
            },
        }
    return found


def smallest(cells: Cells, how: tuple[Any, ...]) -> Cells:
    """The cells of the smallest network that was measured by more than two draws."""
    chosen = [item for item in cells if way(item) == how]
    sizes = [item["report"]["parameters"] for item in chosen]
    least = min(size for size in sizes if sizes.count(size) > 2)
    return [item for item in chosen if item["report"]["parameters"] == least]


def points(cells: Cells) -> list[dict[str, Any]]:
    """One point for every share that was asked for: what was left, and a 95 % t-interval over the draws."""
    key = "recovered" if any(item["cell"]["epochs"] for item in cells) else "pruned"
    found = []
    for share in sorted({item["cell"]["reduction"] for item in cells} - {0.25}):  # that one has one draw
        drawn = pick(cells, reduction=share)
        mean, half = mean_interval([100 * item[key] for item in drawn])
        left = statistics.mean(
            item["report"]["parameters"] / item["report"]["parameters_dense"] for item in drawn
        )
        found.append(
            {
                "asked": share,
                "left": round(100 * left, 3),
                "accuracy": round(mean, 3),
                "half_width": None if half is None else round(half, 3),
                "draws": len(drawn),
            }
        )
    return found


def text(values: dict[str, Any]) -> str:
    """The numbers as they are kept."""
    return json.dumps(values, indent=1) + "\n"


def signature(kept: str) -> str:
    """What the picture says of the numbers that it was drawn from."""
    return f"sha256 of tradeoff.json: {hashlib.sha256(kept.encode()).hexdigest()}"


def panel(ax: Any, title: str, values: dict[str, Any]) -> None:
    """Draw one network: lines without training, stars after it."""
    dense = values["dense"]
    ax.axhline(dense, color=INK, linewidth=0.9, linestyle=":", zorder=1)
    ax.text(
        49.0, dense + 1.2, f"dense network: {dense:.1f} %", ha="right", va="bottom", fontsize=10, color=INK
    )
    for label, found in values["right after pruning"].items():
        style = STYLES.get(label, OTHERS)
        shown = (
            label
            if label in STYLES
            else "Torch-Pruning, five other importances"
            if "taylor" in label
            else None
        )
        left, height = [100.0, *(p["left"] for p in found)], [dense, *(p["accuracy"] for p in found)]
        bars = [0.0, *(p["half_width"] or 0.0 for p in found)]
        whole = bars if label in STYLES else None
        ax.errorbar(left, height, yerr=whole, capsize=3, elinewidth=1.1, label=shown, **style)
    for label, found in values["after three epochs"].items():
        style = dict(STYLES[label])
        shift = style.pop("shift")
        ax.errorbar(
            [p["left"] + shift for p in found],
            [p["accuracy"] for p in found],
            yerr=[p["half_width"] or 0.0 for p in found],
            **{"linestyle": "none", "markeredgecolor": "white", "zorder": 6, "label": label, **style},
        )
    ax.set_title(f"{title} on CIFAR-10", fontsize=13, color=INK)
    ax.set_xlabel("parameters left, %", fontsize=11)
    ax.set_xlim(101.5, 47)
    ax.set_ylim(0, 100)
    ax.grid(color="#e6e3df", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)


def draw(values: dict[str, Any]) -> Any:
    """Return the figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.2), facecolor="white", layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (network, title) in zip(axes, PANELS.items(), strict=True):
        panel(ax, title, values[network])
    axes[0].set_ylabel("test accuracy, %", fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=10.5)
    return figure


def main() -> None:
    kept = text(numbers())
    NUMBERS.write_text(kept)
    draw(json.loads(kept)).savefig(PICTURE, dpi=160, metadata={"Description": signature(kept)})


if __name__ == "__main__":
    main()
