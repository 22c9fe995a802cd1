"""What can be done with one pruned network; `python benchmarks/deployed.py` runs it.

python benchmarks/deployed_cell.py own/lstm-tagger
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import zoo
from coverage_cell import SHARE, random_share
from cria_prune import Plan, apply, discover, load, save, verify
from cria_prune.planning.plan import make_plan
from cria_prune.structure.groups import without_residual
from staged import Stage, Values, stages

TOLERANCE, TOKENS = 1e-3, 5
"""Relative: other kernels, float32."""


class Cell:
    """One network, pruned to half of the units of every inner group, and what it goes through then."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dense: nn.Module
        self.model: nn.Module
        self.example: Any
        self.plan: Plan

    def steps(self) -> list[Stage]:
        """The stages in their order; all but the first stand alone."""
        return [(name, getattr(self, name)) for name in ("prune", *AFTER)]

    def prune(self) -> Values:
        self.dense, self.example = zoo.build(self.name)
        if hasattr(getattr(self.dense, "config", None), "use_cache"):
            self.dense.config.use_cache = False  # export takes no cache as an output; generate asks for it
        groups = without_residual(discover(self.dense, self.example))
        self.plan = make_plan(groups, random_share(groups, SHARE, zoo.SEED))
        self.model = apply(self.dense, self.plan)
        left, before = (sum(item.numel() for item in net.parameters()) for net in (self.model, self.dense))
        return {"left": left / before}

    def export(self) -> Values:
        args, kwargs = self.inputs(self.example)
        program = torch.export.export(copy.deepcopy(self.model), args, kwargs, strict=False)
        return {"difference": apart(self.first(program.module(), self.example), self.expected(self.example))}

    def onnx(self) -> Values:
        """Two examples make the file, three run it."""
        import onnxruntime

        args, kwargs = self.inputs(self.example)
        batch = torch.export.Dim("batch", min=1, max=64)
        sizes = [{0: batch} if item.shape[:1] == (2,) else {} for item in (*args, *kwargs.values())]
        shapes: Any = dict(zip(kwargs, sizes, strict=True)) if kwargs else tuple(sizes)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            try:
                torch.onnx.export(
                    copy.deepcopy(self.model), args, path, kwargs=kwargs, dynamo=True, dynamic_shapes=shapes,
                    verbose=False,
                )  # fmt: skip
            except (
                Exception
            ) as error:  # the exporter's own text is advice; what stopped it is the first cause
                while error.__cause__ is not None:
                    error = error.__cause__  # type: ignore[assignment]
                raise RuntimeError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            other = zoo.another(self.example)
            given = other.values() if isinstance(other, dict) else [other]
            names = [item.name for item in session.get_inputs()]
            run = session.run(None, dict(zip(names, (item.numpy() for item in given), strict=False)))
        return {"difference": apart(torch.from_numpy(run[0]), self.expected(other))}

    def generate(self) -> Values:
        """Greedy tokens with the cache and without are the same."""
        if not hasattr(self.model, "generate") or not self.model.can_generate():
            return {"not applicable": "it does not generate"}
        given = {name: item for name, item in self.example.items() if not name.startswith("decoder")}
        options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
        with torch.no_grad():
            both = [self.model.generate(**given, **options, use_cache=cache) for cache in (True, False)]
        if not torch.equal(*both):
            raise AssertionError("the tokens with the cache are others than those without")
        return {"tokens": both[0].shape[1]}

    def save(self) -> Values:
        with tempfile.TemporaryDirectory() as folder:
            path = save(Path(folder) / "pruned", self.model, self.plan)
            loaded = load(path, zoo.build(self.name)[0]).model
        found = self.first(loaded, self.example)
        return {"difference": apart(found, self.expected(self.example))}

    def again(self) -> Values:
        """A second pruning of the result, verified."""
        groups = without_residual(discover(self.model, self.example))
        plan = make_plan(groups, random_share(groups, SHARE, zoo.SEED))
        smaller = apply(self.model, plan)
        left, before = (sum(item.numel() for item in net.parameters()) for net in (smaller, self.model))
        return {"left": left / before, "proven": verify(self.model, plan, smaller, self.example).difference}

    def inputs(self, example: zoo.Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((), example) if isinstance(example, dict) else ((example,), {})

    def first(self, model: Any, example: zoo.Example) -> Tensor:
        with torch.no_grad():
            return next(item for item in tree_leaves(zoo.forward(model, example)) if isinstance(item, Tensor))

    def expected(self, example: zoo.Example) -> Tensor:
        return self.first(self.model.eval(), example)


AFTER = ("export", "onnx", "generate", "save", "again")


def apart(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value.

    Raises:
        AssertionError: it is above the tolerance.
    """
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference < TOLERANCE:
        raise AssertionError(f"the outputs differ by {difference:.1e} of the largest")
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("network", choices=zoo.names())
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    stages(Cell(options.network).steps(), alone=set(AFTER))


if __name__ == "__main__":
    main()
