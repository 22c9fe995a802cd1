"""What turns texts, images and recordings into a model's inputs, read from its folder or given in Python."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Mapping
from functools import cached_property
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from cria_prune.base.errors import ArtifactError, ConfigError, DataError, needed, said
from cria_prune.base.progress import quiet
from cria_prune.tasks.loading import find_library, has_tokenizer, read_by

IMAGES = ("preprocessor_config.json", "processor_config.json")
FALLBACK = "Pil"
"""What transformers appends to the name of an image processor that needs no torchvision."""


class Processors:
    """The tokenizer, the image processor and the feature extractor of a model, each read when it is needed.

    Args:
        folder: of the model; None where all that is needed is `given`.
        given: a tokenizer, an image processor, a feature extractor, or a processor that holds some of them.
    """

    def __init__(self, folder: Path | None = None, given: Any = None) -> None:
        self.folder, self._given = folder, given

    def _part(self, *names: str, kinds: tuple[str, ...]) -> Any:
        """Return a part of what was given, or it itself where its class is of such a kind; None of others."""
        for name in names:
            found = getattr(self._given, name, None)
            if found is not None and not isinstance(found, (str, bool)):
                return found
        is_it = any(kind in item.__name__ for item in type(self._given).__mro__ for kind in kinds)
        return self._given if is_it else None

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ArtifactError: there is none, or it cannot be read.
        """
        found = self._part("tokenizer", kinds=("Tokenizer",))
        if found is not None:
            return found
        asked = f"The tokenizer in {self._place}"
        todo = "Copy tokenizer.json and tokenizer_config.json of the base model into the folder"
        if self.folder is None:
            raise ConfigError("Texts for the model", "no tokenizer was given", "Pass it as processor=")
        if not has_tokenizer(self.folder):
            raise ArtifactError(asked, "the folder holds none", todo)
        return read_by("AutoTokenizer", self.folder, asked, todo)

    @cached_property
    def images(self) -> Any:
        """The image processor; without torchvision the one of the same settings that needs none.

        Raises:
            ArtifactError: there is none, or it cannot be read.
        """
        found = self._part("image_processor", kinds=("ImageProcessor", "ImageProcessing"))
        return self._read("AutoImageProcessor", "image_processor") if found is None else found

    @cached_property
    def sounds(self) -> Any:
        """The feature extractor of recordings.

        Raises:
            ArtifactError: there is none, or it cannot be read.
        """
        found = self._part("feature_extractor", kinds=("FeatureExtractor", "SequenceFeatureExtractor"))
        return self._read("AutoFeatureExtractor", "feature_extractor") if found is None else found

    @cached_property
    def whole(self) -> Any:
        """The processor of a model that reads images between its tokens.

        Raises:
            ArtifactError: there is none, or it cannot be read.
        """
        if hasattr(self._given, "image_processor") and hasattr(self._given, "tokenizer"):
            return self._given
        asked = f"The processor in {self._place}"
        settings = self._settings("processor_config.json") | self._settings("preprocessor_config.json")
        name = settings.get("processor_class")
        name = name or self._settings("tokenizer_config.json").get("processor_class")
        library = find_library(asked)
        kind = getattr(library, str(name), None)
        if kind is None:
            raise ArtifactError(
                asked, f"it names the class {name!r}", "Copy processor_config.json of the base model"
            )
        inner = self._settings("processor_config.json")
        options = {
            key: value
            for key, value in inner.items()
            if not isinstance(value, dict) and not key.endswith("_class")
        }
        template = None if self.folder is None else self.folder / "chat_template.jinja"
        if template is not None and template.is_file():
            options["chat_template"] = template.read_text(encoding="utf-8")
        with quiet():
            return kind(image_processor=self.images, tokenizer=self.tokenizer, **options)

    @property
    def _place(self) -> str:
        return "no folder" if self.folder is None else str(self.folder)

    def _settings(self, name: str) -> dict[str, Any]:
        path = Path() if self.folder is None else self.folder / name
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _read(self, auto: str, part: str) -> Any:
        asked = f"The {part.replace('_', ' ')} in {self._place}"
        todo = "Copy preprocessor_config.json (or processor_config.json) of the base model into the folder"
        if self.folder is None:
            raise ConfigError(f"{asked}", "none was given", "Pass it as processor=")
        if not any((self.folder / name).is_file() for name in IMAGES):
            raise ArtifactError(asked, "the folder holds none", todo)
        library = find_library(asked)
        settings = self._settings("preprocessor_config.json")
        settings = settings or self._settings("processor_config.json").get(part, {})
        name = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
        if part == "image_processor":
            name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
            # The Auto class and the usual classes ask for torchvision, whose twin needs Pillow alone.
            for kind in (f"{name}{FALLBACK}", name):
                found = _made(getattr(library, kind, None), settings)
                if found is not None and not library.utils.is_torchvision_available():
                    return found
        return read_by(auto, self.folder, asked, todo)


def _made(kind: Any, settings: Mapping[str, Any]) -> Any:
    try:
        with quiet():
            return None if kind is None else kind.from_dict(dict(settings))
    except (ImportError, TypeError, ValueError):
        return None


def open_image(value: Any, channels: int, row: int) -> Any:
    """Return an image as Pillow has it.

    Args:
        value: a path, bytes, a mapping with `bytes` or `path`, an image of Pillow, or an array
            (height, width) or (height, width, channels).
        channels: 1 for grey, 3 for colours; 0 to leave it as it is.
        row: its number, from 0, for the error.

    Raises:
        DataError: it cannot be read.
        PackageError: Pillow is not installed.
    """
    with needed("recipes", "An image"):
        from PIL import Image

    name, held = _named(value, f"the image of row {row}")
    try:
        if isinstance(held, (str, Path)):
            image: Any = Image.open(held)
        elif isinstance(held, (bytes, bytearray)):
            image = Image.open(io.BytesIO(held))
        elif hasattr(held, "convert"):
            image = held
        else:
            image = Image.fromarray(np.asarray(held))
        image.load()
        return image if not channels else image.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # whatever a damaged file makes a decoder raise
        raise DataError(f"Reading {name}", said(error), "Replace the file, or take it out") from error


def read_sound(value: Any, rate: int, row: int) -> np.ndarray:
    """Return a recording at a rate, (samples,) float32 from -1 to 1, its channels averaged.

    WAV files of whole numbers are read by Python's own library; others by soundfile, where it is installed.

    Args:
        value: a path, bytes, a mapping with `bytes`, `path` or `array` and `sampling_rate`, or an array
            (samples,) that is at this rate.
        rate: samples per second that the model reads.
        row: its number, from 0, for the error.

    Raises:
        DataError: it cannot be read.
        PackageError: it is no WAV file of whole numbers, and soundfile is not installed.
    """
    name, held = _named(value, f"the recording of row {row}")
    if isinstance(value, Mapping) and value.get("array") is not None:
        found, theirs = np.asarray(value["array"], dtype=np.float32), int(value.get("sampling_rate") or rate)
    elif isinstance(held, (str, Path, bytes, bytearray)):
        found, theirs = _decoded(held, name)
    else:
        found, theirs = np.asarray(held, dtype=np.float32), rate
    found = found.mean(axis=-1) if found.ndim > 1 else found
    if theirs != rate:
        from scipy.signal import resample_poly

        common = gcd(theirs, rate)
        found = resample_poly(found, rate // common, theirs // common)
    if not len(found):
        raise DataError(f"Reading {name}", "it holds no samples", "Replace the file, or take it out")
    return np.ascontiguousarray(found, dtype=np.float32)


def _decoded(held: str | Path | bytes | bytearray, name: str) -> tuple[np.ndarray, int]:
    def source() -> Any:
        return io.BytesIO(held) if isinstance(held, (bytes, bytearray)) else str(held)

    try:
        with wave.open(source(), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
        if width == 1:
            found = (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
        else:
            parts = np.frombuffer(data, np.uint8).reshape(-1, width).astype(np.int64)
            whole = (parts << (8 * np.arange(width))).sum(axis=1)
            found = ((whole - ((whole >> (8 * width - 1)) << (8 * width))) / 2.0 ** (8 * width - 1)).astype(
                np.float32
            )
        return found.reshape(-1, channels), rate
    except (wave.Error, EOFError):
        pass  # compressed, or of floats
    except OSError as error:
        raise DataError(f"Reading {name}", said(error), "Replace the file, or take it out") from error
    with needed("audio", f"Reading {name}, which is no WAV file of whole numbers,"):
        import soundfile
    try:
        data, rate = soundfile.read(source(), dtype="float32", always_2d=True)
    except Exception as error:  # whatever a damaged file makes a decoder raise
        raise DataError(f"Reading {name}", said(error), "Replace the file, or take it out") from error
    return data, int(rate)


def _named(value: Any, otherwise: str) -> tuple[str, Any]:
    """Return how a file is called in an error, and what holds it."""
    if isinstance(value, Mapping):
        path, data = value.get("path"), value.get("bytes")
        return (f"{otherwise} ({path})" if path else otherwise), data if data is not None else path
    return (str(value) if isinstance(value, (str, Path)) else otherwise), value
