"""A network as an ONNX file with any batch and length, checked in onnxruntime against torch.

The exporter is that of PyTorch (`torch.onnx.export(dynamo=True)`). A number that it bakes in by mistake, a
batch or a mask of the example, would be wrong without an error, so what it writes is run on other sizes than
those that it saw, with padding, and compared; a file that differs is not kept.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cria_prune.base.batches import Batch, check_memory, map_tensors
from cria_prune.base.errors import ArtifactError, CertificateError, needed, said
from cria_prune.base.files import refused
from cria_prune.base.kinds import plain
from cria_prune.base.modules import attributes_kept, buffers_kept, cache_off, named_tensors, unchanged
from cria_prune.deploy.axes import BATCH, Axes, batch_axes, padded, resized, sizes_of, with_lengths
from cria_prune.deploy.session import EXTRA, Flat, OnnxModule, ran, tensors_of

TOLERANCE = 1e-3
"""Largest |onnx - torch| / max |torch| of an output that is taken for the same."""
LARGEST = 1_500_000_000  # bytes of one file, of which the format allows 2 GiB
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class OnnxExport:
    """What was exported, and how far it is from torch; prints as one line.

    Attributes:
        inputs: name of an input -> its shape, the axes of any size by name.
        outputs: names of the outputs.
        checked: the sizes on which it was compared: `{"batch": 3, "length": 19}`.
        error: largest |onnx - torch| / max |torch| over the outputs and these sizes.
        bytes: of the file, with its weights.
        opset: of the operations.
        notes: what its user has to know.
    """

    inputs: dict[str, list[int | str]]
    outputs: tuple[str, ...]
    checked: tuple[dict[str, int], ...]
    error: float
    bytes: int
    opset: int
    notes: tuple[str, ...] = field(default=(), repr=False)

    @property
    def dynamic(self) -> tuple[str, ...]:
        """The axes that may have any size."""
        shapes = self.inputs.values()
        return tuple(dict.fromkeys(axis for shape in shapes for axis in shape if isinstance(axis, str)))

    def __str__(self) -> str:
        return (
            f"any {' and '.join(self.dynamic)}, relative difference to torch at most {self.error:.1e} on "
            f"{len(self.checked)} other sizes, {self.bytes:,} bytes"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return {
            "inputs": self.inputs, "outputs": list(self.outputs), "dynamic": list(self.dynamic),
            "checked": list(self.checked), "error": self.error, "bytes": self.bytes, "opset": self.opset,
            "notes": list(self.notes),
        }  # fmt: skip


def export_file(model: nn.Module, example: Batch, path: Path) -> OnnxExport:
    """Write a network as one ONNX file, with its weights beside it where it is too large for one.

    Args:
        model: in any mode; exported in evaluation mode, in float32, without a key-value cache.
        example: one batch, as its forward takes it. Numbers and flags in it are part of the file.
        path: the file; what is there is replaced.

    Raises:
        ArtifactError: the exporter stops at something, or the tensors have no values.
        CertificateError: the file computes something else than the network.
        DataError: the network does not run on another number of examples, or there is no tensor.
        PackageError: onnx, onnxscript or onnxruntime is not installed.
    """
    asked, notes = f"Exporting a {type(model).__name__} to ONNX", list[str]()
    with needed(EXTRA, asked):
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    model, example = in_float32(plain(model), example, asked, notes)
    with ExitStack() as stack:
        for kept in (buffers_kept(model), unchanged(model), cache_off(model)):
            stack.enter_context(kept)
        model.eval()
        network = Flat(model, example).eval()
        tensors, axes = tensors_of(example), batch_axes(network, example)
        *tries, last = *((made, by) for made, by in with_lengths(network, tensors, axes)), (axes, 0)
        first: CertificateError | ArtifactError | None = None
        for made, by in (*tries, last):
            try:
                found = _exported(network, tensors, made, by, path, asked)
            except (ArtifactError, CertificateError) as error:
                first = first or error
                continue
            if first is not None:
                notes.append(f"fewer axes have any size than torch takes: {first.found}")
            return OnnxExport(**found, notes=tuple(notes))
    assert first is not None
    raise first


def in_float32(model: nn.Module, example: Batch, asked: str, notes: list[str]) -> tuple[nn.Module, Batch]:
    """Return model and example on the CPU in float32, which is what every runtime computes in."""
    tensors = named_tensors(model).values()
    if any(item.is_meta for item in tensors):
        raise ArtifactError(asked, "its tensors have no values", "Load its weights before it is exported")
    if any(item.dtype in HALVES for item in tensors):
        notes.append("its weights of half types are stored in float32")
    if any(item.dtype in HALVES or item.device.type != "cpu" for item in tensors):
        model = copy.deepcopy(model).to("cpu").float()
    return model, map_tensors(
        example, lambda item: item.to("cpu", torch.float32 if item.dtype in HALVES else item.dtype)
    )


def _exported(
    network: Flat, tensors: Sequence[Tensor], axes: Axes, by: int, path: Path, asked: str
) -> dict[str, Any]:
    """Export with these axes, write the file and compare it."""
    example = resized(tensors, axes, {BATCH: 2})
    outputs = ran(network, example)
    program = _program(network, example, list(outputs), axes, asked)
    weights = sum(item.numel() * item.element_size() for item in named_tensors(network).values())
    try:
        program.save(str(path), external_data=weights > LARGEST)
    except OSError as error:
        raise refused(f"Writing {path}", error) from error
    checked, worst = _checked(network, tensors, axes, by, path, asked)
    files = (path, path.with_name(f"{path.name}.data"))
    shapes = zip(network.names, example, axes, strict=True)
    return {
        "inputs": {
            name: [known.get(axis, size) for axis, size in enumerate(item.shape)]
            for name, item, known in shapes
        },
        "outputs": tuple(outputs), "checked": checked, "error": worst,
        "bytes": sum(item.stat().st_size for item in files if item.exists()),
        "opset": int(program.model.opset_imports[""]),
    }  # fmt: skip


def _program(network: Flat, example: Sequence[Tensor], outputs: Sequence[str], axes: Axes, asked: str) -> Any:
    """Return what the exporter makes; where it stops at the fused attention, with the written-out one."""
    configs = [
        config for item in network.modules() if hasattr(config := getattr(item, "config", None), FUSED)
    ]
    failure: Exception | None = None
    for written_out in (False, True) if configs else (False,):
        try:
            with calm(), attributes_kept(configs, FUSED), torch.no_grad():
                for config in configs if written_out else ():
                    setattr(config, FUSED, "eager")
                return torch.onnx.export(
                    network, tuple(example), dynamo=True, verbose=False, input_names=network.names,
                    output_names=list(outputs), dynamic_shapes=(tuple(map(dict, axes)),),
                )  # fmt: skip
        except Exception as error:  # whatever the exporter meets
            check_memory(error, asked, "Use a machine with more memory")
            failure = failure or error
    assert failure is not None
    raise ArtifactError(
        asked, f"the exporter of torch {torch.__version__} stops with {_cause(failure)}", MEND
    )


def _checked(
    network: Flat, tensors: Sequence[Tensor], axes: Axes, by: int, path: Path, asked: str
) -> tuple[tuple[dict[str, int], ...], float]:
    """Return the sizes on which the file was compared with torch, and the largest relative difference.

    Raises:
        CertificateError: it does not run, or computes something else.
    """
    lengths = {name: size for name, size in sizes_of(tensors, axes).items() if name != BATCH}
    other = {name: max(1, size + by) for name, size in lengths.items()}
    shorter = {name: max(1, size // 2) for name, size in lengths.items()}
    sizes = ({BATCH: 3, **other}, {BATCH: 1, **shorter}, {BATCH: 2, **lengths})
    todo = "Mend what depends on the size of its input in forward, or report it with the network"
    worst = 0.0
    try:
        session = OnnxModule(path)
    except Exception as error:  # whatever the runtime says of a file
        raise CertificateError(asked, f"onnxruntime cannot read the file, {said(error)}", todo) from error
    for size in sizes:
        given = padded(network.names, resized(tensors, axes, size))
        expected = ran(network, given)
        try:
            found = session(**dict(zip(network.names, given, strict=True)))
        except Exception as error:  # whatever the runtime says of inputs
            raise CertificateError(asked, f"on {size} onnxruntime stops with {said(error)}", todo) from error
        for name, one in expected.items():
            apart = relative(one, found[name])
            if not apart <= TOLERANCE:
                found_said = f"on {size} its {name!r} differs from torch by {apart:.1e} of the largest value"
                raise CertificateError(asked, found_said, todo)
            worst = max(worst, apart)
    return sizes, worst


def relative(expected: Tensor, found: Tensor) -> float:
    """Return the largest |found - expected| over the largest |expected|; infinite where shapes differ.

    >>> relative(torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0]))
    0.25
    """
    if expected.shape != found.shape:
        return float("inf")
    one, other = expected.double(), found.double()
    same = (one == other) | (one.isnan() & other.isnan())  # infinities too
    if bool(same.all()):
        return 0.0
    apart = float(((one - other).abs().masked_fill(same, 0)).max())
    return apart / max(float(one[one.isfinite()].abs().max()) if bool(one.isfinite().any()) else 0.0, 1e-30)


def _cause(error: BaseException) -> str:
    """Return what is behind an error of the exporter, whose own text is advice to its developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return said(error)


@contextmanager
def calm() -> Iterator[None]:
    """Keep what the exporter and the quantiser say to their developers away."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


FUSED = "_attn_implementation"
MEND = "Mend what it names in forward, export with another version of torch, or serve the network with torch"
