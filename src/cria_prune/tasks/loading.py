"""A Hugging Face folder or hub name -> its model and example inputs; never from code or pickles."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cria_prune.base.errors import ArtifactError, CriaError, DataError, needed, said
from cria_prune.base.events import passed
from cria_prune.base.progress import quiet
from cria_prune.base.sentences import encoder_folder

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json"),
    "sentencepiece.bpe.model",
)
FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md")


def find_folder(name: str) -> Path:
    """Return the folder of a model: the folder of that name, or a snapshot of the hub's repository.

    Raises:
        ArtifactError: it is neither, or the hub cannot be reached.
        PackageError: huggingface_hub is not installed.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    asked = f"The model {name}"
    if not HUB_NAME.fullmatch(name):
        raise ArtifactError(
            asked, "there is no such folder", "Give a folder, or a name of the hub like organisation/model"
        )
    with needed("hf", asked):
        from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=list(FETCHED)))
    except Exception as error:  # whatever a server can make another library raise
        raise ArtifactError(
            asked,
            f"there is no such folder, and the hub gives {said(error)}",
            f"Fetch it where there is a network (hf download {name} --local-dir FOLDER) and give that folder",
        ) from error


def has_tokenizer(folder: Path) -> bool:
    """Say whether a folder holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZERS)


CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_pretrained(folder: Path, meta: bool = False, auto: str | None = None, **options: Any) -> nn.Module:
    """Return the model of a Hugging Face folder in eval mode, on the CPU or without values.

    The class is the first of `architectures` in config.json that transformers has, else the base model of
    the configuration (`AutoModel`). Of a folder of sentence-transformers it is the encoder. Code in the
    folder is not run and nothing is asked of a server.

    Args:
        folder: holds config.json, and the weights as safetensors if there are any.
        meta: leave the weights and make every tensor on the meta device: shapes without memory. A
            folder without weights is read like this too.
        auto: Auto class in the place of `AutoModel`, where the configuration names no class.
        options: further ones of `from_pretrained`, such as `device_map`.

    Raises:
        ArtifactError: transformers is missing or does not know the model, the weights are pickles, are
            quantized or are not those of the model, or a file is damaged.
    """
    asked = f"Reading the Hugging Face model in {folder}"
    library, folder = find_library(asked), encoder_folder(folder)
    weights = not meta and _has_weights(folder, asked)
    if weights and not options:
        passed("weights", folder=folder)
    with reading(library, asked):
        config = read_config(library, folder)
        known = known_class(library, config)
        maker = getattr(library, auto or "AutoModel")
        if weights:
            return _with_values(known or maker, folder, config, asked, options).eval()
        with torch.device("meta"):
            model: nn.Module = known(config) if known else maker.from_config(config)
        return model.eval()


@contextmanager
def reading(library: ModuleType, asked: str) -> Iterator[None]:
    """Keep transformers quiet; what a file makes it raise becomes an ArtifactError about what was asked."""
    with quiet():
        try:
            yield
        except CriaError:
            raise
        except Exception as error:  # whatever a file can make another library raise
            raise ArtifactError(
                asked,
                f"transformers {library.__version__} stops with {said(error)}",
                "Check config.json and the weights; models whose code lies in their folder are not run",
            ) from error


def read_by(kind: str, source: str | Path, asked: str, todo: str, **options: Any) -> Any:
    """Return what `kind.from_pretrained` of transformers reads from a folder or hub name; code does not run.

    Raises:
        ArtifactError: it is not there, or cannot be read.
        PackageError: transformers is not installed.
    """
    library, local = find_library(asked), Path(source).is_dir()
    try:
        with quiet():
            return getattr(library, kind).from_pretrained(
                str(Path(source).resolve() if local else source),
                local_files_only=local,
                trust_remote_code=False,
                **options,
            )
    except Exception as error:  # whatever files and servers can make another library raise
        raise ArtifactError(asked, said(error), todo) from error


def read_config(library: ModuleType, folder: Path) -> Any:
    """Return the configuration in a folder; neither code in it nor a kernel that it names is used."""
    config = library.AutoConfig.from_pretrained(
        str(folder.resolve()), local_files_only=True, trust_remote_code=False
    )
    config._attn_implementation = None  # the file may name a kernel on a server
    return config


def find_library(asked: str) -> ModuleType:
    """Return the module transformers. Raises a PackageError, about what was asked, where it is missing."""
    with needed("hf", asked):
        import transformers
    return transformers


def _has_weights(folder: Path, asked: str) -> bool:
    """Say whether there are safetensors. Raises an ArtifactError where there are pickles instead."""
    if (folder / "adapter_config.json").exists():
        raise ArtifactError(
            asked, "it holds an adapter beside or in place of the model", "Merge it into the model and save"
        )
    if (folder / WEIGHTS).exists():
        return True
    if (folder / INDEX).exists():
        shards(folder / INDEX, asked)
        return True
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ArtifactError(
            asked,
            f"the weights are pickles ({pickles[0]}), which can run code when they are read",
            "If you trust the file, convert it once: AutoModel.from_pretrained(FOLDER), with the class that "
            "you need, then .save_pretrained(NEW) writes safetensors. Or pass --meta to inspect shapes only",
        )
    return False


def shards(path: Path, asked: str) -> list[str]:
    """Return the files that an index names. Raises an ArtifactError for all but safetensors beside it."""
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        wrong = sorted(
            str(name) for name in names if Path(name).name != name or Path(name).suffix != ".safetensors"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(asked, f"{path.name} cannot be read, {error}", "Copy the folder again") from error
    if wrong:
        raise ArtifactError(
            asked, f"{path.name} names {wrong[0]!r}", "Only safetensors in the folder itself are read"
        )
    return sorted(names)


def known_class(library: ModuleType, config: Any) -> Any:
    """Return the first of the `architectures` of a configuration that transformers has, or None."""
    for name in config.architectures or ():
        found = getattr(library, str(name), None)
        if isinstance(found, type) and issubclass(found, library.PreTrainedModel):
            return found
    return None


def _with_values(kind: Any, folder: Path, config: Any, asked: str, options: Mapping[str, Any]) -> nn.Module:
    if getattr(config, "quantization_config", None) is not None:
        raise ArtifactError(
            asked,
            "its weights are quantized",
            "Give the weights as floats, or pass --meta to see shapes only",
        )
    model, info = kind.from_pretrained(
        str(folder.resolve()),
        config=config,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 2} more" if len(missing) > 2 else ""
        raise ArtifactError(
            asked,
            f"the weights lack {', '.join(missing[:2])}{more}, which {type(model).__name__} needs",
            "Complete the weights, or pass --meta to see shapes only",
        )
    return model


EXAMPLES, LENGTH, WAVE = 2, 16, 8000
"""Examples in a batch, tokens in a text, samples in a wave (half a second at 16 kHz)."""

IMAGE_TOKENS = ("image_token_id", "image_token_index")
STRIDE = 2
"""Frames of a spectrogram per position of Whisper's encoder."""


def example_inputs(model: nn.Module, shape: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Return one batch of keyword arguments for the forward of a transformers model.

    A model of two towers (CLIP) gets text and image, an encoder-decoder also `decoder_input_ids`. A
    language model that reads images between its tokens gets text alone.

    Args:
        model: a `PreTrainedModel`; its configuration and the signature of its forward are read.
        shape: of the main input: (batch, tokens), (batch, channels, height, width),
            (batch, mel bins, frames) or (batch, samples); from the configuration if None.

    Returns:
        Tensors on the CPU by name: `input_ids` int64 with `attention_mask`, `pixel_values`,
        `input_features` or `input_values` float32, the same on every call.

    Raises:
        DataError: the main input is of an unknown kind, or `shape` has the wrong number of dimensions.
    """
    config: Any = model.config
    main = str(getattr(model, "main_input_name", "input_ids"))
    if main not in MAKERS:
        raise DataError(
            f"An example for {type(model).__name__}",
            f"its main input is {main!r}",
            "Write a function that returns (model, example) and name it as package.module:function",
        )
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    inputs = MAKERS[main](config, shape, generator)
    batch = len(inputs[main])
    if main == "input_ids":
        if "attention_mask" in accepted:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "pixel_values" in accepted and _two_towers(config):
            inputs |= _image(config, None, generator, batch)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        text = _text(getattr(config, "decoder", config), None, generator, batch)
        inputs["decoder_input_ids"] = text["input_ids"]
    return inputs


def _text(
    config: Any, shape: Sequence[int] | None, generator: torch.Generator, batch: int = EXAMPLES
) -> dict[str, Tensor]:
    """Tokens without the padding token; the last one ends the text, as some classifiers ask for."""
    text = getattr(config, "text_config", config)
    vocabulary = int(text.vocab_size)
    longest = int(getattr(text, "max_position_embeddings", None) or 2 * LENGTH)
    batch, length = _checked(shape, (batch, min(LENGTH, max(1, longest // 2))))
    tokens = torch.randint(vocabulary, (batch, length), generator=generator)
    padding, end = getattr(text, "pad_token_id", None), getattr(text, "eos_token_id", None)
    if padding is not None:
        tokens[tokens == padding] = (padding + 1) % vocabulary
    if isinstance(end, int) and 0 <= end < vocabulary:
        tokens[tokens == end] = (end + (2 if padding == (end + 1) % vocabulary else 1)) % vocabulary
        tokens[:, -1] = end
    return {"input_ids": tokens}


def _image(
    config: Any, shape: Sequence[int] | None, generator: torch.Generator, batch: int = EXAMPLES
) -> dict[str, Tensor]:
    vision = next(
        (getattr(config, name) for name in ("vision_config", "encoder") if hasattr(config, name)), config
    )
    size = getattr(vision, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else (int(side) for side in size)
    channels = int(getattr(vision, "num_channels", 3))
    return {
        "pixel_values": torch.randn(_checked(shape, (batch, channels, height, width)), generator=generator)
    }


def _spectrogram(config: Any, shape: Sequence[int] | None, generator: torch.Generator) -> dict[str, Tensor]:
    bins = int(getattr(config, "num_mel_bins", 80))
    frames = STRIDE * int(getattr(config, "max_source_positions", 50))
    return {"input_features": torch.randn(_checked(shape, (EXAMPLES, bins, frames)), generator=generator)}


def _wave(config: Any, shape: Sequence[int] | None, generator: torch.Generator) -> dict[str, Tensor]:
    """A wave, or for an audio spectrogram transformer, which calls it the same, a spectrogram."""
    usual = (EXAMPLES, WAVE)
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        usual = (EXAMPLES, int(config.max_length), int(config.num_mel_bins))  # type: ignore[assignment]
    return {"input_values": torch.randn(_checked(shape, usual), generator=generator)}


def _two_towers(config: Any) -> bool:
    """True where text and image have an encoder each; a token that stands for an image says otherwise."""
    parts = all(hasattr(config, name) for name in ("text_config", "vision_config"))
    return parts and not any(getattr(config, name, None) is not None for name in IMAGE_TOKENS)


def _checked(shape: Sequence[int] | None, usual: tuple[int, ...]) -> tuple[int, ...]:
    if shape is None:
        return usual
    if len(shape) != len(usual):
        raise DataError(
            f"An example of shape {tuple(shape)}",
            f"this model takes {len(usual)} dimensions",
            f"Give a shape like {','.join(map(str, usual))}",
        )
    return tuple(shape)


MAKERS: dict[str, Callable[[Any, Sequence[int] | None, torch.Generator], dict[str, Tensor]]] = {
    "input_ids": _text,
    "pixel_values": _image,
    "input_features": _spectrogram,
    "input_values": _wave,
}
