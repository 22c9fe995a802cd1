"""One thread per test process: the tensors are small, and waiting threads cost more than they help."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import: no test waits for a server that cannot be reached

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import Elsewhere
from hypothesis import HealthCheck, settings
from slow import is_slow

from cria_prune.artifact import certificate, reload
from cria_prune.artifact.checkpoint import load
from cria_prune.tasks.pooling import Behind

torch.set_num_threads(1)
# How long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

DEVICES = ["mps", "cuda"] if torch.cuda.is_available() else ["mps"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests."""
    for item in items:
        if is_slow(item.name):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def as_wide_as_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are as wide as without a terminal, whatever a runner of tests says of its own."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def no_vision_on_the_path() -> Iterator[None]:
    """What the zoo puts on the path is found by no other test of this process, nor by one that it starts."""
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate without its fresh process, where that is not what is tested."""

    def loaded(_scratch: Path, job: dict[str, Any], inputs: dict[str, torch.Tensor], tokens: Any) -> Any:
        folder = Path(job["folder"])
        loader = getattr(pytest.importorskip("transformers"), job["loader"], None)
        model = load(folder).model if loader is None else loader.from_pretrained(folder).eval()
        found = reload.outputs(model, inputs)
        if job["tokens"]:
            found["generated"] = reload.generated(model, inputs, job["prompt"], job["tokens"])
        embedded = "Cria's own pooling" if job["sentences"] else None
        if embedded:
            with torch.no_grad():
                found[reload.EMBEDDING] = Behind(folder, model.config.hidden_size).of(model, tokens)
        versions = dict.fromkeys(("python", "torch", "transformers", "safetensors"), "0")
        said = {"class": type(model).__name__, "wrong": {}, "seconds": 0.0, "versions": versions}
        return {**said, "embedded": embedded, "notes": []}, found

    monkeypatch.setattr(certificate, "_there", loaded)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device other than the CPU; sums in float32 are not rounded to fewer bits on it."""
    if request.param == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield "cuda"
        return
    with Elsewhere():
        yield "mps"
