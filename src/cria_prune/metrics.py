"""How a metric is read: which direction is better, and how its values and changes are written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A metric by its name.

    Attributes:
        name: as in tables and JSON keys.
        higher_is_better: direction.
        share: whether its values are shares of one, written as per cent.
    """

    name: str
    higher_is_better: bool = True
    share: bool = False

    def better(self, new: float, old: float) -> bool:
        """Say whether `new` is at least as good as `old`."""
        return new >= old if self.higher_is_better else new <= old

    def text(self, value: float | None) -> str:
        """Return a value as a person reads it: `98.80 %`, or four digits; nothing for None."""
        if value is None:
            return ""
        return f"{value * 100:.2f} %" if self.share else f"{value:.4g}"

    def change(self, before: float | None, after: float | None) -> str:
        """Return the way from one value to another: points for shares, a factor for perplexities.

        >>> metric("accuracy").change(0.9, 0.88), metric("perplexity-128").change(20.0, 25.0)
        ('-2.00 points', '1.250 times')
        """
        if before is None or after is None:
            return ""
        if self.share:
            return f"{(after - before) * 100:+.2f} points"
        factor = self.name.startswith("perplexity") and before > 0
        return f"{after / before:.3f} times" if factor else f"{after - before:+.4g}"


def metric(name: str) -> Metric:
    """Return what is known of a metric; of an unknown one, higher is better.

    `accuracy` is a share; a name that starts with `perplexity` or `loss` is better when lower.
    """
    lower = name.startswith(("perplexity", "loss"))
    return Metric(name, higher_is_better=not lower, share=name == "accuracy")
