"""A network becomes a folder for onnxruntime: model.onnx, in int8 if asked, configuration and tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import nn

from cria_prune.base.batches import Batch
from cria_prune.base.files import COPIED, check_free, copy_known, is_plain_file, whole_folder, write_json
from cria_prune.base.inputs import read, read_one
from cria_prune.base.kinds import plain
from cria_prune.base.progress import quiet
from cria_prune.deploy.int8 import Int8Export, compared, quantize_file
from cria_prune.deploy.onnx import OnnxExport, export_file, in_float32

ONNX, INT8, FACTS, CONFIG = "model.onnx", "model_quantized.onnx", "export.json", "config.json"
"""Names that `optimum.onnxruntime` looks for, and what was measured."""
OURS = (ONNX, INT8, f"{ONNX}.data", f"{INT8}.data", FACTS, CONFIG, *COPIED)


@dataclass(frozen=True)
class Exported:
    """What a folder for onnxruntime holds; prints as one line or two.

    Attributes:
        onnx: the float file.
        int8: the other one, if it was asked for.
        parameters: of the network.
        left_out: files of the source that were not copied, with the reason.
    """

    onnx: OnnxExport
    int8: Int8Export | None
    parameters: int
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        return str(self.onnx) if self.int8 is None else f"{self.onnx}\n{self.int8}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        found: dict[str, Any] = {"parameters": self.parameters, "onnx": self.onnx.to_dict()}
        return found if self.int8 is None else {**found, "int8": self.int8.to_dict()}


def export_onnx(
    path: str | Path,
    model: nn.Module,
    example: Batch,
    *,
    int8: bool = False,
    batches: Iterable[Batch] | None = None,
    source: str | Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a folder with a network as ONNX, checked in onnxruntime against torch; whole or not at all.

    The batch may have any size, and so may the length of texts, waves and sequences where the network takes
    any. The file is run on three sizes that the exporter did not see, with padding where there is a mask. A
    language model is exported without a key-value cache.

    Args:
        path: the folder; it must not hold files unless `overwrite`.
        model: any network; it is left as it was.
        example: one batch, as its forward takes it.
        int8: also write `model_quantized.onnx`, with weights in int8 and activations quantised as they come.
        batches: what the distance of the int8 file is measured on; made of the example if None.
        source: folder of a Hugging Face model: its config.json, tokenizer and processor go along.
        provenance: kept in `export.json`; plain JSON.
        overwrite: replace a folder that this function wrote, once the new one is checked.

    Raises:
        ArtifactError: the exporter or the quantiser stops at something, the place is taken, or the system
            refuses. Nothing is left behind.
        CertificateError: the file computes something else than the network.
        DataError: the network does not run on another number of examples, or on the batches.
        PackageError: onnx, onnxscript or onnxruntime is not installed.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> export_onnx("net-onnx", net, torch.randn(2, 4)).onnx.dynamic  # doctest: +SKIP
        ('batch',)
    """
    model = plain(model)
    example = read_one(model, example)
    with whole_folder(path, overwrite, check_export) as folder:
        onnx = export_file(model, example, folder / ONNX)
        quantised = None
        if int8:
            layers = quantize_file(folder / ONNX, folder / INT8)
            there, example = in_float32(model, example, "Comparing an int8 file", [])
            given = None if batches is None else read(there, batches)
            apart, what = compared(there, folder / INT8, example, given)
            files = (folder / INT8, folder / f"{INT8}.data")
            size = sum(file.stat().st_size for file in files if file.exists())
            quantised = Int8Export(size, layers, apart, what)
        left_out = _beside(folder, model, None if source is None else Path(source))
        parameters = sum(item.numel() for item in model.parameters())
        found = Exported(onnx, quantised, parameters, left_out)
        said = {"format": "cria-export", "version": 1, "model": type(model).__name__, **found.to_dict()}
        write_json(folder / FACTS, {**said, "provenance": provenance})
    return found


def check_export(target: Path, overwrite: bool) -> None:
    """Raise an ArtifactError unless a folder may be written: it is new, empty, or of `export_onnx`."""
    check_free(target, overwrite, FACTS, _is_ours, "is an export of Cria")


def _is_ours(path: Path) -> bool:
    return not path.is_dir() and any(fnmatch(path.name, pattern) for pattern in OURS)


def _beside(folder: Path, model: Any, source: Path | None) -> tuple[str, ...]:
    """Write the configuration and copy tokenizer and processor; return what was left out."""
    if source is not None and is_plain_file(source / CONFIG):
        (folder / CONFIG).write_bytes((source / CONFIG).read_bytes())
        return copy_known(source, folder)
    if hasattr(getattr(model, "config", None), "model_type") and hasattr(model.config, "save_pretrained"):
        with quiet():
            model.config.save_pretrained(folder)
    return ()
