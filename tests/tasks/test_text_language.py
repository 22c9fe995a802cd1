"""Perplexity against closed forms and a slow twin; tokens, blocks and batches of text."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cria_prune.base.errors import DataError
from cria_prune.base.metrics import metric
from cria_prune.tasks import text as encoding
from cria_prune.tasks.text import (
    BlockBatches,
    SentenceBatches,
    Sentences,
    blocks,
    by_length,
    conventions,
    encode,
    perplexities,
    perplexity,
    sample_text,
    train_tokenizer,
)

transformers = pytest.importorskip("transformers")
TEXT = "".join(f"the {a} sees the {b}.\n" for a in ("cat", "dog", "llama") for b in ("sun", "moon")) * 30


class Uniform(nn.Module):
    """Every token equally likely."""

    def __init__(self, vocabulary: int = 50, longest: int = 512) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.config = SimpleNamespace(max_position_embeddings=longest)

    def forward(self, input_ids: Tensor) -> Tensor:
        assert not self.training
        return self.bias.expand(*input_ids.shape, -1)


def llama(longest: int = 64, vocabulary: int = 300) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=longest,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)


def tokens(count: int, vocabulary: int = 50) -> Tensor:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0))


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    model = Uniform()
    found = perplexities(model, tokens(1200))
    assert list(found) == ["perplexity-128", "perplexity-512"]
    assert all(value == pytest.approx(50, rel=1e-6) for value in found.values())
    assert model.training


@pytest.mark.parametrize("length", [2, 7, 64])
def test_perplexity_is_that_of_a_loop_over_single_tokens(length: int) -> None:
    model, text = llama().eval(), tokens(150, 300)
    losses = []
    for start in range(0, len(text) - length + 1, length):
        for place in range(1, length):
            with torch.no_grad():
                logits = model(text[None, start : start + place]).logits[0, -1].double()
            losses.append(-logits.log_softmax(0)[text[start + place]].item())
    expected = math.exp(sum(losses) / len(losses))
    assert perplexities(model, text, [length])[f"perplexity-{length}"] == pytest.approx(expected, rel=1e-5)


def test_batches_of_different_sizes_weigh_by_their_tokens() -> None:
    model, text = llama(), tokens(130, 300)
    whole = perplexity(model, BlockBatches(text, 10, 13))
    assert perplexity(model, BlockBatches(text, 10, 3)) == pytest.approx(whole, rel=1e-6)
    rows = blocks(text, 10)
    masked = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    masked["attention_mask"][:, 6:] = 0
    assert perplexity(model, [masked]) == pytest.approx(perplexity(model, [rows_of(rows[:, :6])]), rel=1e-6)
    ignored = {"input_ids": rows, "labels": rows.clone()}
    ignored["labels"][:, 6:] = -100
    assert perplexity(model, [ignored]) == pytest.approx(perplexity(model, [rows_of(rows[:, :6])]), rel=1e-6)


def rows_of(rows: Tensor) -> dict[str, Tensor]:
    return {"input_ids": rows}


def test_both_conventions_follow_the_model_and_say_their_length() -> None:
    assert conventions(Uniform(longest=8192)) == (128, 2048)
    assert conventions(Uniform(longest=100)) == (100,)
    assert conventions(nn.Linear(1, 1)) == (128, 2048)
    assert list(perplexities(llama(), tokens(130, 300))) == ["perplexity-64"]


def test_short_texts_and_wrong_batches_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"Sequences of 512 tokens.*has 400 tokens, too few for one.*longer text"
    ):
        perplexities(Uniform(), tokens(400))
    with pytest.raises(DataError, match="nothing to predict"):
        perplexity(Uniform(), [rows_of(tokens(1)[None])])
    with pytest.raises(DataError, match="Pass mappings with input_ids"):
        perplexity(Uniform(), [tokens(4)[None]])


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    model = Uniform(2)
    with torch.no_grad():
        model.bias[0] = 2000.0
    assert perplexity(model, [rows_of(torch.ones(1, 4, dtype=torch.long))]) == math.inf


def test_a_tokenizer_repeats_and_gives_every_text_back() -> None:
    one, two = train_tokenizer(TEXT, 300), train_tokenizer(TEXT, 300)
    assert one.get_vocab() == two.get_vocab() and 256 < len(one) <= 300
    strange = "the llama's \N{SNOWMAN} née\n\n  sun"
    assert one.decode(encode(one, strange)) == strange
    assert len(encode(one, TEXT)) < len(TEXT) / 2
    assert one.pad_token_id == one.eos_token_id == 0


def tokenizers_of_all_kinds() -> dict[str, Any]:
    """Bytes; WordPiece with tokens at both ends; Unigram with a token in front of a space that is put there;
    pairs of a letter, where the first of all decides which go together."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    bert = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    bert.normalizer, bert.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    bert.train_from_iterator([TEXT], trainers.WordPieceTrainer(special_tokens=["[UNK]", "[CLS]", "[SEP]"]))
    bert.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    spaces = Tokenizer(models.Unigram())
    spaces.pre_tokenizer, spaces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    spaces.train_from_iterator(
        [TEXT], trainers.UnigramTrainer(special_tokens=["<s>", "<u>"], unk_token="<u>")
    )
    spaces.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    pairs = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "aa": 2}, merges=[("a", "a")]))
    fast = {"bert": bert, "spaces": spaces, "pairs": pairs}
    wrapped = {name: transformers.PreTrainedTokenizerFast(tokenizer_object=it) for name, it in fast.items()}
    return {"bytes": train_tokenizer(TEXT, 300), **wrapped}


@pytest.mark.parametrize("kind", ["bytes", "bert", "spaces", "pairs"])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizers_of_all_kinds()[kind]
    text = (TEXT + "\N{SNOWMAN} née \N{GRINNING FACE}\n\n   so\tun<s>\r\n" * 9 + TEXT) * 2
    if kind == "pairs":
        text = "b" + "a" * (len(text) // 2) + "ba" * 999
    whole, lengths = tokenizer(text)["input_ids"], list[int]()

    class Counting:
        is_fast = True

        def __call__(self, text: str, **options: Any) -> Any:
            lengths.append(len(text))
            return tokenizer(text, **options)

    for piece, overlap, compared in ((1000, 201, 16), (317, 101, 8), (3001, 65, 4)):
        for name, value in (("PIECE", piece), ("OVERLAP", overlap), ("COMPARED", compared)):
            monkeypatch.setattr(encoding, name, value)
        lengths.clear()
        assert encode(Counting(), text).tolist() == whole
        assert (max(lengths) == len(text)) is (kind == "pairs") and len(lengths) > 1
    Counting.is_fast = False
    lengths.clear()
    assert encode(Counting(), text).tolist() == whole and lengths == [len(text)]


def test_a_sample_repeats_by_its_seed_and_leaves_no_trace() -> None:
    tokenizer, model = train_tokenizer(TEXT, 300), llama()
    before = torch.get_rng_state()
    first = sample_text(model, tokenizer, "the cat", tokens=8)
    assert first.startswith("the cat") and first == sample_text(model, tokenizer, "the cat", tokens=8)
    assert first != sample_text(model, tokenizer, "the cat", tokens=8, seed=1)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    with pytest.raises(DataError, match="the prompt is empty"):
        sample_text(model, tokenizer, "")


def test_blocks_do_not_overlap_and_the_rest_is_dropped() -> None:
    text = torch.arange(11)
    assert blocks(text, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    batches = BlockBatches(text, 4, 1, order=torch.tensor([1, 0]), start=1)
    assert len(batches) == 2
    assert [batch["input_ids"].tolist() for batch in batches] == [[[5, 6, 7, 8]], [[1, 2, 3, 4]]]
    assert all(batch["labels"] is batch["input_ids"] for batch in batches)


def test_sentences_are_padded_to_their_batch_and_sorted_by_length() -> None:
    lengths = torch.randint(1, 30, (211,), generator=torch.Generator().manual_seed(0))
    sentences = Sentences([list(range(1, n + 1)) for n in lengths.tolist()], torch.arange(211), padding=99)
    for seed in (None, 3):
        batches = SentenceBatches(sentences, by_length(sentences.lengths(), 8, seed))
        found = list(batches)
        assert len(found) == len(batches) == 27
        assert sorted(torch.cat([batch["labels"] for batch in found]).tolist()) == list(range(211))
        for batch in found:
            mask = batch["attention_mask"].bool()
            assert mask.any(0).all() and (batch["input_ids"][~mask] == 99).all()
            assert torch.equal(mask.sum(1), lengths[batch["labels"]])
        real = sum(int(batch["attention_mask"].sum()) for batch in found)
        assert real > 0.9 * sum(batch["attention_mask"].numel() for batch in found)


def test_the_seed_shuffles_the_batches() -> None:
    lengths = torch.randint(1, 30, (100,), generator=torch.Generator().manual_seed(0))

    def rows(seed: int | None) -> list[list[int]]:
        return [chunk.tolist() for chunk in by_length(lengths, 8, seed)]

    assert rows(1) == rows(1) != rows(2) and rows(None) == rows(None)
    assert by_length(torch.tensor([], dtype=torch.long), 8) == []


def test_metrics_know_their_direction() -> None:
    assert metric("accuracy").better(0.9, 0.9) and not metric("accuracy").better(0.8, 0.9)
    assert metric("perplexity-128").better(4.0, 5.0) and not metric("perplexity-2048").better(6.0, 5.0)
    assert metric("accuracy").text(0.5) == "50.00 %" and metric("perplexity-128").text(31.234) == "31.23"
    assert metric("f1").higher_is_better and metric("accuracy").text(None) == ""
    assert metric("perplexity-128").change(None, 2.0) == "" and metric("loss").change(2.0, 1.5) == "-0.5"
