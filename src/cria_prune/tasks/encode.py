"""Rows become a model's inputs: texts, pairs, words, questions, images, recordings, images between texts.

What is made of a text once (features: lists of numbers) is padded batch by batch; images and recordings are
decoded anew for every batch, for they do not fit into the memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cria_prune.base.batches import Batch
from cria_prune.base.errors import ArtifactError, ConfigError, DataError, said
from cria_prune.base.modules import device_of, modes_kept, random_kept
from cria_prune.tasks.columns import Reading
from cria_prune.tasks.processors import Processors, open_image, read_sound
from cria_prune.tasks.text import IGNORED, LONGEST, places

Row = Mapping[str, Any]
Features = dict[str, Any]

ANSWER, CONTEXT, WRITTEN = 64, 384, 32
"""Tokens of a target, of a question with its context, and that a decoder writes where no target is given."""
MASKED = 0.15
PADS = {"labels": IGNORED, "attention_mask": 0, "token_type_ids": 0}


@dataclass(eq=False)
class Encoder:
    """A model and what turns rows into its inputs.

    Attributes:
        model: of transformers; its configuration, the signature of its forward, and its type are read.
        parts: its tokenizer and processors.
        reading: what the user said of the rows.
        name: of the model, for error texts.
    """

    model: nn.Module = field(repr=False)
    parts: Processors = field(repr=False)
    reading: Reading = field(default_factory=Reading)
    name: str = "the model"

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.parts.tokenizer

    @cached_property
    def takes(self) -> frozenset[str]:
        """Names of the arguments of the model's forward."""
        return frozenset(inspect.signature(self.model.forward).parameters)

    def longest(self, usual: int = LONGEST) -> int:
        """Return tokens of an example at most: what the user said or what is usual, if the model reads it."""
        config = self.config
        most = places(self.model) or getattr(
            getattr(config, "text_config", None), "max_position_embeddings", None
        )
        return min(self.reading.max_length or usual, most or 2**30)

    @property
    def padding(self) -> int:
        """The token that fills up a batch: the model's own, for it may look for the last other one.

        Raises:
            ConfigError: neither configuration nor tokenizer says one.
        """
        found = getattr(self.config, "pad_token_id", None)
        found = self.tokenizer.pad_token_id if found is None else found
        if found is None:
            raise ConfigError(
                f"Batches of texts for {self.name}",
                "neither its configuration nor its tokenizer has a padding token",
                "Set pad_token_id in config.json, to a token that the model was trained with",
            )
        self.config.pad_token_id = int(found)
        return int(found)

    def text(self, row: Row) -> str:
        """Return a row's text, written by the chat template where that was asked for.

        Raises:
            ConfigError: the tokenizer has no template.
        """
        value = row["text"]
        return (
            chat(self.tokenizer, value, row.get("pair"), self.name)
            if self.reading.chat
            else str(value).strip()
        )

    def tokens(
        self, texts: Sequence[Any], *second: Sequence[Any], usual: int = LONGEST, **options: Any
    ) -> Any:
        """Return what the tokenizer makes of texts, cut to `longest`."""
        options.setdefault("truncation", True)
        found = self.tokenizer(list(texts), *map(list, second), max_length=self.longest(usual), **options)
        self.check_vocabulary(max((max(ids, default=0) for ids in found["input_ids"]), default=0))
        return found

    def check_vocabulary(self, largest: int) -> None:
        """Raise an ArtifactError if the tokenizer writes tokens that the model does not know."""
        config = getattr(self.config, "text_config", None) or self.config
        if largest >= int(getattr(config, "vocab_size", 2**62)):
            raise ArtifactError(
                f"The tokenizer in {self.parts.folder}",
                f"it writes token {largest}, and the model knows {config.vocab_size} tokens",
                "Copy the tokenizer of this very model into the folder",
            )

    def images(self, rows: Sequence[Row]) -> list[Any]:
        """Return the images of rows as Pillow has them."""
        vision = getattr(self.config, "vision_config", None) or self.config
        channels = 1 if getattr(vision, "num_channels", 3) == 1 else 3
        return [open_image(row["image"], channels, row["row"]) for row in rows]


def chat(tokenizer: Any, value: Any, answer: Any, name: str) -> str:
    """Return messages, or a text (and its answer), as the tokenizer's chat template writes them."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"Chats for {name}", "its tokenizer has no chat template",
            "Copy chat_template.jinja of the base model into the folder, or leave out --chat",
        )  # fmt: skip
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
        value += [] if answer is None else [{"role": "assistant", "content": str(answer)}]
    names = {"human": "user", "gpt": "assistant"}  # as ShareGPT has them
    messages = [
        item if "role" in item else {"role": names.get(item["from"], item["from"]), "content": item["value"]}
        for item in value
    ]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # the template is a program of its own
        raise DataError(f"Chats for {name}", said(error), "Give messages that its template takes") from error


# Features of texts.


def text_features(encoder: Encoder, rows: Sequence[Row], usual: int = LONGEST) -> list[Features]:
    """Return tokens of texts, or of pairs of them; and labels as they are."""
    texts = [encoder.text(row) for row in rows]
    paired = bool(rows) and "pair" in rows[0] and not encoder.reading.chat
    second = [[str(row["pair"]).strip() for row in rows]] if paired else []
    found = encoder.tokens(texts, *second, usual=usual)
    keys = ["input_ids"]
    if paired and "token_type_ids" in encoder.takes and "token_type_ids" in found:
        keys.append("token_type_ids")
    return [
        {key: list(found[key][place]) for key in keys} | ({"labels": row["label"]} if "label" in row else {})
        for place, row in enumerate(rows)
    ]


def sequence_features(encoder: Encoder, rows: Sequence[Row]) -> list[Features]:
    """Return tokens of texts and of their targets, or of what the model writes where none are given."""
    found = text_features(encoder, [{k: v for k, v in row.items() if k == "text"} for row in rows])
    if rows and "label" in rows[0]:
        labels = encoder.tokenizer(
            text_target=[str(row["label"]) for row in rows],
            truncation=True,
            max_length=encoder.longest(ANSWER),
        )["input_ids"]
        return [{**item, "labels": list(ids)} for item, ids in zip(found, labels, strict=True)]
    for first in range(0, len(found), 32):
        part = found[first : first + 32]
        for item, ids in zip(part, written(encoder, pad(encoder, part)), strict=True):
            item["decoder_input_ids"] = ids.tolist()
    return found


def written(encoder: Encoder, batch: Mapping[str, Tensor]) -> Tensor:
    """Return what a model writes, (batch, tokens) int64, greedily: what its decoder reads in use."""
    model: Any = encoder.model
    place = device_of(model)
    if place.type == "meta":  # shapes alone
        return torch.full((len(next(iter(batch.values()))), WRITTEN), start_token(model), dtype=torch.int64)
    with torch.no_grad(), modes_kept(model), random_kept():
        model.eval()
        inputs = {key: value.to(place) for key, value in batch.items() if key != "labels"}
        found = model.generate(**inputs, max_new_tokens=WRITTEN, do_sample=False, num_beams=1)
    return torch.as_tensor(found).cpu()


def start_token(model: Any) -> int:
    """Return the token that a decoder begins with."""
    settings = (getattr(model, "generation_config", None), model.config)
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    found = [getattr(item, name, None) for name in names for item in settings]
    return int(next((token for token in found if token is not None), 0))


def decoder_inputs(encoder: Encoder, labels: Tensor) -> Tensor:
    """Return what the decoder reads for targets (batch, tokens): the same, one place on."""
    first = torch.full((len(labels), 1), start_token(encoder.model), dtype=torch.int64)
    found = torch.cat([first, labels[:, :-1]], dim=1)
    fill = getattr(encoder.config, "pad_token_id", None)
    return found.masked_fill(found == IGNORED, 0 if fill is None else int(fill))


def tag_features(encoder: Encoder, rows: Sequence[Row]) -> list[Features]:
    """Return tokens of words with a tag each, which the first token of a word bears; or of texts."""
    if rows and "words" not in rows[0]:
        return text_features(encoder, rows)
    if not getattr(encoder.tokenizer, "is_fast", False):
        raise ConfigError(
            f"Words for {encoder.name}", "its tokenizer does not say which word a token is of",
            "Give a folder with tokenizer.json",
        )  # fmt: skip
    found = encoder.tokens([list(row["words"]) for row in rows], is_split_into_words=True)
    features = []
    for place, row in enumerate(rows):
        item: Features = {"input_ids": list(found["input_ids"][place])}
        if "label" in row:
            owners = found.word_ids(place)
            first = [word is not None and word not in owners[:at] for at, word in enumerate(owners)]
            item["labels"] = [
                row["label"][word] if new else IGNORED for word, new in zip(owners, first, strict=True)
            ]
        features.append(item)
    return features


def question_features(encoder: Encoder, rows: Sequence[Row]) -> list[Features]:
    """Return tokens of questions with their contexts, and the first and last token of the answer."""
    texts, pairs = [str(row["text"]).strip() for row in rows], [str(row["pair"]) for row in rows]
    found = encoder.tokens(texts, pairs, usual=CONTEXT, truncation="only_second", return_offsets_mapping=True)
    features = []
    for place, row in enumerate(rows):
        item: Features = {"input_ids": list(found["input_ids"][place])}
        if "token_type_ids" in encoder.takes and "token_type_ids" in found:
            item["token_type_ids"] = list(found["token_type_ids"][place])
        if "label" in row:
            inside = [part == 1 for part in found.sequence_ids(place)]
            item["labels"] = span_of(row["label"], pairs[place], found["offset_mapping"][place], inside)
        features.append(item)
    return features


def span_of(answer: Any, context: str, offsets: Sequence[Sequence[int]], inside: Sequence[bool]) -> list[int]:
    """Return first and last token of an answer; (0, 0) where there is none, or it was cut off.

    Args:
        answer: its text, or {text: [...], answer_start: [...]} as in SQuAD.
        context: in which it is.
        offsets: first and last character of each token; inside: which tokens are of the context.
    """
    if isinstance(answer, Mapping):
        texts, starts = answer.get("text") or [], answer.get("answer_start") or []
        text, start = (str(texts[0]), int(starts[0])) if texts and starts else ("", -1)
    else:
        text = str(answer).strip()
        start = context.find(text) if text else -1
    end = start + len(text)
    tokens = [
        place
        for place, (first, last) in enumerate(offsets)
        if inside[place] and start >= 0 and first < end and last > start
    ]
    whole = tokens and offsets[tokens[0]][0] <= start and offsets[tokens[-1]][1] >= end
    return [tokens[0], tokens[-1]] if whole else [0, 0]


# Batches.


def pad(encoder: Encoder, items: Sequence[Features]) -> dict[str, Any]:
    """Return features as one batch: lists of numbers are filled up on the right, and a mask says where."""
    batch: dict[str, Any] = {}
    for key in items[0]:
        values = [item[key] for item in items]
        if isinstance(values[0], (list, tuple)):
            fill = PADS.get(key, encoder.padding if key.endswith("input_ids") else 0)
            longest = max(len(value) for value in values)
            batch[key] = torch.tensor([[*value, *[fill] * (longest - len(value))] for value in values])
        else:
            batch[key] = torch.tensor(values)
    if "input_ids" in batch and "attention_mask" not in batch:
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return batch


def text_batch(encoder: Encoder, items: Sequence[Features], seed: int) -> dict[str, Any]:
    """Return a padded batch."""
    return pad(encoder, items)


def masked_batch(encoder: Encoder, items: Sequence[Features], seed: int) -> dict[str, Any]:
    """Return a padded batch in which 15 % of the tokens are hidden and to be said; the same for a seed."""
    batch, tokenizer = pad(encoder, items), encoder.tokenizer
    ids, special = batch["input_ids"], torch.tensor(tokenizer.all_special_ids or [-1])
    if tokenizer.mask_token_id is None:
        return batch
    generator = torch.Generator().manual_seed(seed * 1_000_003 + int(ids.sum()))
    open_to = (batch["attention_mask"] == 1) & ~torch.isin(ids, special)
    hidden = (torch.rand(ids.shape, generator=generator) < MASKED) & open_to
    none = open_to.any(1) & ~hidden.any(1)  # every text has one at least
    hidden[none, open_to.long().argmax(1)[none]] = True
    batch["labels"] = ids.masked_fill(~hidden, IGNORED)
    batch["input_ids"] = ids.masked_fill(hidden, int(tokenizer.mask_token_id))
    return batch


def sequence_batch(encoder: Encoder, items: Sequence[Features], seed: int) -> dict[str, Any]:
    """Return a padded batch with what the decoder reads."""
    batch = pad(encoder, items)
    if "labels" in batch:
        batch["decoder_input_ids"] = decoder_inputs(encoder, batch["labels"])
    return batch


def encoder_batch(encoder: Encoder, items: Sequence[Features], seed: int) -> dict[str, Any]:
    """Return a padded batch for a model without a head; a decoder, where it has one, reads the same text."""
    batch = pad(encoder, [{key: item[key] for key in item if key != "labels"} for item in items])
    if getattr(encoder.config, "is_encoder_decoder", False) and "decoder_input_ids" in encoder.takes:
        batch["decoder_input_ids"] = batch["input_ids"].clone()
    return batch


def image_batch(encoder: Encoder, rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Return images as the model's processor makes them, with labels where there are any."""
    found = encoder.parts.images(images=encoder.images(rows), return_tensors="pt")
    batch = {key: value for key, value in found.items() if key in encoder.takes}
    return batch | labels_of(rows)


def map_batch(encoder: Encoder, rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Return images with a map of classes each, of the size that the processor makes."""
    images = encoder.images(rows)
    if "label" not in rows[0]:
        return image_batch(encoder, rows, seed)
    maps = [np.asarray(open_image(row["label"], 0, row["row"])) for row in rows]
    for image, found, row in zip(images, maps, rows, strict=True):
        if found.ndim != 2 or found.shape != (image.height, image.width):
            raise DataError(
                f"The map of classes of row {row['row']}",
                f"it is {found.shape}, the image {(image.height, image.width)}",
                "Give one number for every pixel: a grey or palette image of the same size",
            )
    made = encoder.parts.images(images=images, segmentation_maps=maps, return_tensors="pt")
    labels = made.pop("labels")
    labels = labels if isinstance(labels, Tensor) else torch.stack([torch.as_tensor(item) for item in labels])
    batch = {key: value for key, value in made.items() if key in encoder.takes}
    return batch | {"labels": labels.long()}


def labels_of(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return the labels of rows, numbers or lists of numbers, as the tensor `labels`; nothing without any."""
    return {"labels": torch.tensor([row["label"] for row in rows])} if rows and "label" in rows[0] else {}


def sound_batch(encoder: Encoder, rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Return recordings as the model's feature extractor makes them, with labels where there are any."""
    return _sounds(encoder, rows) | labels_of(rows)


def _sounds(encoder: Encoder, rows: Sequence[Row]) -> dict[str, Any]:
    extractor = encoder.parts.sounds
    rate = int(extractor.sampling_rate)
    waves = [read_sound(row["audio"], rate, row["row"]) for row in rows]
    frames = {} if hasattr(extractor, "chunk_length") else {"padding": True}  # Whisper's are of one length
    found = extractor(waves, sampling_rate=rate, return_tensors="pt", **frames)
    return {key: value for key, value in found.items() if key in encoder.takes}


def spoken_batch(encoder: Encoder, rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Return recordings, their transcripts as labels, and what a decoder reads where the model has one."""
    batch = _sounds(encoder, rows)
    writes = "decoder_input_ids" in encoder.takes
    if "label" in rows[0]:
        texts, tokenizer = [str(row["label"]) for row in rows], encoder.tokenizer
        letters = {token for token in tokenizer.get_vocab() if len(token) == 1 and token.isalpha()}
        if not writes and letters and not any(token.islower() for token in letters):
            texts = [text.upper() for text in texts]
        ids = tokenizer(texts, truncation=True, max_length=encoder.longest(448))["input_ids"]
        batch["labels"] = pad(encoder, [{"labels": list(item)} for item in ids])["labels"]
        if writes:
            batch["decoder_input_ids"] = decoder_inputs(encoder, batch["labels"])
    elif writes:
        batch["decoder_input_ids"] = written(encoder, batch)
    return batch


def pair_batch(encoder: Encoder, rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Return images and the texts that belong to them, for a model of two towers."""
    texts = [str(row["text"]) for row in rows]
    every = str(getattr(encoder.config, "model_type", "")).startswith("siglip")  # trained without a mask
    ids = encoder.tokens(texts, padding="max_length" if every else True, return_tensors="pt")
    batch = {key: ids[key] for key in ("input_ids", "attention_mask") if key in ids and key in encoder.takes}
    images = encoder.parts.images(images=encoder.images(rows), return_tensors="pt")
    return batch | {key: value for key, value in images.items() if key in encoder.takes}


ASKED = "Describe this image."


def told_batch(encoder: Encoder, rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Return images between the tokens of a question and its answer; or texts alone."""
    if "image" not in rows[0]:
        return pad(encoder, text_features(encoder, rows))
    whole = encoder.parts.whole
    texts = [_told(whole, str(row.get("text") or ASKED), row.get("pair")) for row in rows]
    images = [[image] for image in encoder.images(rows)]
    found = whole(text=texts, images=images, padding=True, return_tensors="pt")
    batch = {key: value for key, value in found.items() if key in encoder.takes and isinstance(value, Tensor)}
    token = next(
        (getattr(encoder.config, name, None) for name in ("image_token_id", "image_token_index")
         if getattr(encoder.config, name, None) is not None), -1,
    )  # fmt: skip
    hidden = (batch["attention_mask"] == 0) | (batch["input_ids"] == token)
    return batch | {"labels": batch["input_ids"].masked_fill(hidden, IGNORED)}


def _told(whole: Any, question: str, answer: Any) -> str:
    template = getattr(whole, "chat_template", None) or getattr(whole.tokenizer, "chat_template", None)
    if not template:
        image = str(getattr(whole, "image_token", "<image>"))
        return f"{image}\n{question}" + ("" if answer is None else f"\n{answer}")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": str(answer)}]})
    return str(whole.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None))


Make = Callable[[Encoder, Sequence[Any], int], dict[str, Any]]


def of_type(batch: Mapping[str, Any], model: nn.Module) -> Batch:
    """Return a batch whose floating inputs are of the model's type: its labels stay as they are."""
    kind = next((item.dtype for item in model.parameters() if item.is_floating_point()), torch.float32)
    return {
        key: value.to(kind) if value.is_floating_point() and key != "labels" else value
        for key, value in batch.items()
    }
