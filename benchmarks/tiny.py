"""Tiny folders of every kind of task, with data for each: what the journeys and the tests walk through.

Each network is drawn at random, two layers of width 32; what it says means nothing, but every file of its
folder, every column of its data and every command is that of a real one.
"""

from __future__ import annotations

import json
import random
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

WORDS = ("the", "sea", "and", "its", "people", "with", "long", "shadows", "good", "bad", "fine", "dull")
ROWS, VOCABULARY = 48, 120
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """A folder of a kind.

    Attributes:
        name: of the kind, as in the table.
        task: as `pipeline` calls it.
        make: (folder) -> writes the model and what it needs.
        data: (folder) -> writes the data; returns their path.
        labelled: they have labels, so that a metric is measured and a recovery can be made.
        options: of cria prune, besides.
    """

    name: str
    task: str
    make: Callable[[Path], Any]
    data: Callable[[Path], Path]
    labelled: bool = True
    options: tuple[str, ...] = ()


# Data.


def sentences(count: int = ROWS, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) for _ in range(count)]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def plain(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("".join(f"{line}.\n" for line in sentences(700)))
    return path


def labelled(folder: Path, **labels: Callable[[str], Any]) -> Path:
    return jsonl(folder / "rows.jsonl", [
        {"sentence": text, **{name: label(text) for name, label in labels.items()}} for text in sentences()
    ])  # fmt: skip


def pairs(folder: Path, label: Callable[[str], Any] = lambda text: "good" in text) -> Path:
    rows = [
        {"query": one, "passage": two, "label": label(two)}
        for one, two in zip(sentences(seed=1), sentences(seed=2), strict=True)
    ]
    return jsonl(folder / "pairs.jsonl", rows)


def tagged(folder: Path) -> Path:
    rows = [text.split() for text in sentences()]
    tags = [["B-GOOD" if word == "good" else "O" for word in words] for words in rows]
    return jsonl(folder / "tags.jsonl", [
        {"tokens": words, "ner_tags": tag} for words, tag in zip(rows, tags, strict=True)
    ])  # fmt: skip


def questions(folder: Path) -> Path:
    return jsonl(folder / "questions.jsonl", [
        {"question": "the good sea", "context": text, "answer": text.split()[1]} for text in sentences()
    ])  # fmt: skip


def translated(folder: Path) -> Path:
    return jsonl(folder / "targets.jsonl", [
        {"text": text, "target": " ".join(text.split()[:3])} for text in sentences()
    ])  # fmt: skip


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (40, 36, 3), dtype=np.uint8)


def pictures(folder: Path) -> Path:
    from PIL import Image

    for number in range(ROWS):
        place = folder / "pictures" / ("cat", "dog")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(number)).save(place / f"{number}.png")
    return folder / "pictures"


def maps(folder: Path) -> Path:
    from PIL import Image

    for name in ("images", "masks"):
        (folder / "maps" / name).mkdir(parents=True)
    for number in range(16):
        picture = pixels(number)
        Image.fromarray(picture).save(folder / "maps" / "images" / f"{number}.png")
        Image.fromarray(picture[:, :, 0] // 86).save(folder / "maps" / "masks" / f"{number}.png")
    return folder / "maps"


def captions(folder: Path) -> Path:
    from PIL import Image

    place = folder / "captions"
    place.mkdir()
    texts = sentences(16)
    for number in range(16):
        Image.fromarray(pixels(number)).save(place / f"{number}.png")
    jsonl(place / "metadata.jsonl", [{"file_name": f"{n}.png", "text": text} for n, text in enumerate(texts)])
    return place


def sounds(folder: Path, texts: bool = True) -> Path:
    place, draw = folder / "sounds", np.random.default_rng(0)
    for number, text in enumerate(sentences(16)):
        inside = place if texts else place / ("no", "yes")[number % 2]
        inside.mkdir(parents=True, exist_ok=True)
        with wave.open(str(inside / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes((draw.normal(0, 4000, 4000 + 200 * number)).astype("<i2").tobytes())
        if texts:
            with (place / "metadata.jsonl").open("a") as lines:
                lines.write(json.dumps({"file_name": f"{number}.wav", "text": text.split()[0]}) + "\n")
    return place


# Folders.


def tokenizer(kind: str = "PreTrainedTokenizerFast") -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<image>"]
    letters = [*"abcdefghijklmnopqrstuvwxyz", "."]
    vocabulary = {
        word: at for at, word in enumerate([*marks, *WORDS, *letters, *("##" + x for x in letters)])
    }
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "token_type_ids", "attention_mask"], model_max_length=64,
    )  # fmt: skip


def model(folder: Path, name: str, config: str, **settings: Any) -> Any:
    """Write a network of a class of transformers, drawn at random; return it."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, name)(getattr(transformers, config)(**settings))
    made.save_pretrained(folder)
    return made


def text(name: str, config: str, **settings: Any) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        model(
            folder, name, config, **{**SIZES, "max_position_embeddings": 160, "pad_token_id": 0, **settings}
        )
        tokenizer().save_pretrained(folder)

    return make


def image(
    name: str, config: str, processor: str = "ViTImageProcessor", **settings: Any
) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        model(folder, name, config, **settings)
        image_processor(folder, processor)

    return make


def image_processor(folder: Path, name: str = "ViTImageProcessor", **settings: Any) -> Any:
    import transformers

    size = {"shortest_edge": 32} if name in ("ConvNextImageProcessor", "CLIPImageProcessor") else {
        "height": 32, "width": 32
    }  # fmt: skip
    crop = {"crop_size": {"height": 32, "width": 32}} if name == "CLIPImageProcessor" else {}
    made = getattr(transformers, f"{name}Pil")(size=size, **crop, **settings)
    made.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "image_processor_type": name}))
    return made


def t5(folder: Path) -> None:
    model(
        folder, "T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=32, d_ff=64, d_kv=8,
        num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0, eos_token_id=3,
    )  # fmt: skip
    tokenizer().save_pretrained(folder)


def bart(folder: Path) -> None:
    model(
        folder, "BartForConditionalGeneration", "BartConfig", vocab_size=VOCABULARY, d_model=32,
        encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=160, pad_token_id=0,
        bos_token_id=2, eos_token_id=3, decoder_start_token_id=2, forced_eos_token_id=3,
    )  # fmt: skip
    tokenizer().save_pretrained(folder)


def whisper(folder: Path) -> None:
    import transformers

    made = model(
        folder, "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=VOCABULARY, d_model=32,
        encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4,
        decoder_attention_heads=4, num_mel_bins=16, max_source_positions=50, max_target_positions=448,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=2, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    made.generation_config.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def wav2vec(folder: Path, name: str = "Wav2Vec2ForCTC") -> None:
    import transformers

    model(
        folder, name, "Wav2Vec2Config", vocab_size=40, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64, conv_dim=(16, 16), conv_stride=(5, 4),
        conv_kernel=(10, 3),         num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, pad_token_id=0,
        mask_time_prob=0.0, layerdrop=0.0, classifier_proj_size=16, ctc_zero_infinity=True,
        ctc_loss_reduction="mean",
    )  # fmt: skip
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    if name.endswith("CTC"):
        letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
        (folder / "vocab.json").write_text(json.dumps({letter: at for at, letter in enumerate(letters)}))
        transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)


def clip(folder: Path) -> None:
    words = {**SIZES, "max_position_embeddings": 32, "eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 2}
    model(folder, "CLIPModel", "CLIPConfig", text_config=words, vision_config=VISION, projection_dim=16)
    tokenizer().save_pretrained(folder)
    image_processor(folder, "CLIPImageProcessor")


def llava(folder: Path) -> None:
    model(
        folder, "LlavaForConditionalGeneration", "LlavaConfig",
        text_config={"model_type": "llama", **SIZES, "max_position_embeddings": 160, "pad_token_id": 0},
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
        image_token_index=5, vision_feature_layer=-1,
    )  # fmt: skip
    tokenizer().save_pretrained(folder)
    image_processor(folder, "CLIPImageProcessor")
    (folder / "processor_config.json").write_text(json.dumps({
        "processor_class": "LlavaProcessor", "patch_size": 8, "vision_feature_select_strategy": "default",
        "image_token": "<image>", "num_additional_image_tokens": 1,
    }))  # fmt: skip


CATS = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
BERT, PER_LAYER = "BertConfig", ("--policy", "per-layer")
LAYERS = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}

KINDS: tuple[Tiny, ...] = (
    Tiny("llama", "text-generation", text("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2), plain),
    Tiny("gpt2", "text-generation", text("GPT2LMHeadModel", "GPT2Config"), plain),
    Tiny("bert, masked", "fill-mask", text("BertForMaskedLM", BERT), plain),
    Tiny("distilbert, masked", "fill-mask", text("DistilBertForMaskedLM", "DistilBertConfig", dim=32,
         hidden_dim=64, n_layers=2, n_heads=4), plain),
    Tiny("t5", "text2text-generation", t5, translated),
    Tiny("bart", "text2text-generation", bart, translated),
    Tiny("bert, classes", "text-classification", text("BertForSequenceClassification", BERT),
         lambda folder: labelled(folder, label=lambda row: int("good" in row))),
    Tiny("roberta, several labels", "text-classification",
         text("RobertaForSequenceClassification", "RobertaConfig", num_labels=3,
              problem_type="multi_label_classification"),
         lambda folder: labelled(folder, labels=lambda row: [n for n in range(3) if WORDS[n] in row])),
    Tiny("bert, regression", "text-classification", text("BertForSequenceClassification", BERT, num_labels=1),
         lambda folder: labelled(folder, score=lambda row: len(row) / 10)),
    Tiny("bert, reranker", "text-classification", text("BertForSequenceClassification", BERT, num_labels=1),
         lambda folder: pairs(folder, lambda row: float("good" in row))),
    Tiny("qwen2, classes", "text-classification",
         text("Qwen2ForSequenceClassification", "Qwen2Config", num_key_value_heads=2),
         lambda folder: labelled(folder, label=lambda row: int("good" in row))),
    Tiny("bert, pairs", "text-classification", text("BertForSequenceClassification", BERT),
         lambda folder: pairs(folder, lambda row: int("good" in row))),
    Tiny("bert, tags", "token-classification",
         text("BertForTokenClassification", BERT, id2label={0: "O", 1: "B-GOOD", 2: "I-GOOD"},
              label2id={"O": 0, "B-GOOD": 1, "I-GOOD": 2}), tagged),
    Tiny("bert, answers", "question-answering", text("BertForQuestionAnswering", BERT), questions),
    Tiny("bert, encoder", "feature-extraction", text("BertModel", BERT), plain, labelled=False),
    Tiny("vit, classes", "image-classification",
         image("ViTForImageClassification", "ViTConfig", **VISION, **CATS), pictures),
    Tiny("deit, classes", "image-classification",
         image("DeiTForImageClassification", "DeiTConfig", **VISION, **CATS), pictures),
    Tiny("dinov2, features", "image-feature-extraction",
         image("Dinov2Model", "Dinov2Config", **{**VISION, "mlp_ratio": 2}), pictures, labelled=False,
         options=PER_LAYER),
    Tiny("vit, features", "image-feature-extraction",
         image("ViTModel", "ViTConfig", **VISION), pictures, labelled=False),
    Tiny("swin, classes", "image-classification",
         image("SwinForImageClassification", "SwinConfig", image_size=32, patch_size=4, embed_dim=16,
               depths=[1, 1], num_heads=[2, 2], window_size=4, **CATS), pictures, options=PER_LAYER),
    Tiny("convnext, classes", "image-classification",
         image("ConvNextForImageClassification", "ConvNextConfig", "ConvNextImageProcessor",
               hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, **CATS), pictures, options=PER_LAYER),
    Tiny("resnet, classes", "image-classification",
         image("ResNetForImageClassification", "ResNetConfig", "ConvNextImageProcessor", **LAYERS, **CATS),
         pictures, options=PER_LAYER),
    Tiny("segformer, maps", "image-segmentation",
         image("SegformerForSemanticSegmentation", "SegformerConfig", "SegformerImageProcessor",
               num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32],
               patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
               decoder_hidden_size=32,
               num_labels=3), maps, options=PER_LAYER),
    Tiny("whisper", "automatic-speech-recognition", whisper, sounds),
    Tiny("wav2vec 2.0, letters", "automatic-speech-recognition", wav2vec, sounds),
    Tiny("wav2vec 2.0, classes", "audio-classification",
         lambda folder: wav2vec(folder, "Wav2Vec2ForSequenceClassification"),
         lambda folder: sounds(folder, texts=False)),
    Tiny("clip, captions", "zero-shot-image-classification", clip, captions),
    Tiny("clip, classes", "zero-shot-image-classification", clip, pictures),
    Tiny("llava", "image-text-to-text", llava, captions),
    Tiny("detr-like: yolos", "object-detection",
         image("YolosForObjectDetection", "YolosConfig", **{**VISION, "image_size": [32, 32],
               "num_detection_tokens": 4}), pictures, labelled=False),
)  # fmt: skip
