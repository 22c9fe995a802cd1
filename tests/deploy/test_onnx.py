"""ONNX files: any batch and length, checked; what cannot be exported is said, and nothing is left behind."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cria_prune import export_onnx
from cria_prune.base.errors import ArtifactError, CertificateError, DataError, PackageError
from cria_prune.deploy import onnx as exporter
from cria_prune.deploy.folder import check_export
from cria_prune.deploy.onnx import relative
from cria_prune.deploy.session import OnnxModule

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Tokens(nn.Module):
    """Tokens under a mask: an embedding, a mean over what is seen, a layer; `scale` is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        seen = attention_mask[..., None].to(self.embedding.weight.dtype)
        hidden = (self.embedding(input_ids) * seen).sum(1) / seen.sum(1)
        return {"logits": scale * self.layer(hidden)}


class Whole(nn.Module):
    """One vector, and no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Baked(Whole):
    """What the exporter sees is not what runs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + float(torch.compiler.is_exporting())


class Stopping(Whole):
    """The exporter stops at a value that decides."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


TEXT = {
    "input_ids": torch.arange(12).view(2, 6),
    "attention_mask": torch.ones(2, 6, dtype=torch.long),
    "scale": 2.0,
}


def test_any_batch_and_length_and_int8_beside_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tokens().double().half().train()  # half types are stored in float32
    done = export_onnx(tmp_path / "out", model, TEXT, int8=True)
    assert done.onnx.dynamic == ("batch", "length") and done.onnx.error < 1e-5 and model.training
    assert done.onnx.inputs["input_ids"] == ["batch", "length"] and done.onnx.outputs == ("logits",)
    assert "stored in float32" in done.onnx.notes[0]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.onnx", "model_quantized.onnx", "export.json"}
    # The second oracle: another size than any that was checked, by hand, with the scale of the example.
    ids, mask = torch.randint(20, (5, 11)), torch.ones(5, 11, dtype=torch.long)
    mask[:, 4:] = 0
    session = OnnxModule(tmp_path / "out" / "model.onnx").session
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        expected = model.eval().float()(ids, mask, 2.0)["logits"]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
    module = OnnxModule(tmp_path / "out" / "model.onnx")
    whole = module(input_ids=ids)["logits"]  # no mask is a mask of ones
    torch.testing.assert_close(whole, module(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"])
    with pytest.raises(DataError, match=r"the file does not read segments. Export with an example that"):
        module(input_ids=ids, segments=ids)
    with pytest.raises(DataError, match=r"it lacks input_ids"):
        module(attention_mask=mask)
    assert done.int8 is not None and done.int8.layers == 1
    distance = done.int8.fidelity.worst
    assert 0 < distance.relative_error < 0.01 and distance.divergence is not None
    assert "made of the one" in done.int8.measured_on and "agrees on" in str(done)
    with pytest.raises(ArtifactError, match=r"it is not empty.*pass overwrite=True"):
        export_onnx(tmp_path / "out", model, TEXT)
    check_export(tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(ArtifactError, match=r"it holds mine.txt, so not all of it is an export of Cria"):
        export_onnx(tmp_path / "out", model, TEXT, overwrite=True)


REFUSED = {
    "no batch": (Whole(), torch.randn(5), DataError, "any size for Whole: on 2 examples in place of 5"),
    "no dimension": (Whole(), torch.tensor(1.0), DataError, "'x', has no dimension. Give an example"),
    "baked in": (Baked(), torch.randn(2, 5), CertificateError, "on {'batch': 3} its 'output' differs"),
    "stops": (Stopping(), torch.randn(2, 5), ArtifactError, "a Stopping to ONNX: the exporter of torch"),
    "no values": (Whole().to("meta"), torch.randn(2, 5), ArtifactError, "its tensors have no values"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_said_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    model, example, kind, text = REFUSED[name]
    with pytest.raises(kind, match=re.escape(text)):
        export_onnx(tmp_path / "out", model, example)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_fixed_length_and_an_example_of_one(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    done = export_onnx(tmp_path / "out", net, torch.randn(1, 3, 6))
    assert done.onnx.inputs == {"input": ["batch", 3, 6]} and done.onnx.error < 1e-5


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(PackageError, match=rf"{name} is not installed.*cria-prune\[onnx\]"):
                export_onnx(tmp_path / "out", Whole(), torch.randn(2, 5))
    assert list(tmp_path.iterdir()) == []


def test_the_difference_is_of_the_largest_value() -> None:
    one = torch.tensor([1.0, -4.0, float("inf")])
    assert relative(one, one) == 0 and relative(one, one[:2]) == float("inf")
    assert relative(one, torch.tensor([1.0, -3.0, float("inf")])) == 0.25
    assert relative(one, torch.tensor([1.0, -4.0, 5.0])) == float("inf")
    assert not relative(one[:2], torch.tensor([1.0, float("nan")])) <= exporter.TOLERANCE
