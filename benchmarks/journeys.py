"""Walk with a tiny network of every kind of task through the command line: what is done, and why not.

For each: cria prune, which saves the folder and certifies it in a fresh process; its Auto class and
`pipeline(...)` of transformers in another one, which knows nothing of Cria; cria eval with the metric of the
task, and against the dense folder without labels; cria recover. The networks and data are those of `tiny.py`.

python benchmarks/journeys.py [NAME ...] [--again]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from typer.testing import CliRunner

from cria_prune.artifact import certificate as certificate_of
from cria_prune.artifact import reload
from cria_prune.artifact.checkpoint import load
from cria_prune.base.metrics import SHARES
from cria_prune.cli.main import app
from cria_prune.repair.fidelity import Fidelity
from result_files import RESULTS, Rows
from tiny import KINDS, Tiny

PATH = RESULTS / "journeys" / "kinds.json"
ASKED = ("--reduce", "0.25", "--of", "prunable", "--device", "cpu", "--examples", "32")
STEPS = ("prune", "certificate", "pipeline", "eval", "against", "recover", "export", "int8")
"""Columns of the table; the last two are filled by another benchmark."""

PIPELINE = """
import json, sys
task, auto, folder = sys.argv[1:]
sys.modules["cria_prune"] = None  # the folder must do without it
import numpy, transformers
options, random = {}, numpy.random.default_rng(0)
given = "the good [MASK] sea" if task == "fill-mask" else "the good sea and its people"
if "image" in task or task == "object-detection":
    from PIL import Image
    given = Image.fromarray(random.integers(0, 255, (40, 36, 3), dtype=numpy.uint8))
elif "audio" in task or "speech" in task:
    given = random.normal(0, 0.1, 8000).astype("float32")
if task == "zero-shot-image-classification":
    options["candidate_labels"] = ["cat", "dog"]
elif task == "image-text-to-text":
    given, options = {"images": given, "text": "<image> the good sea"}, {"max_new_tokens": 4}
elif task == "text-generation":
    options["max_new_tokens"] = 4
if task not in ("text2text-generation", "question-answering"):  # gone in transformers 5
    pipe = transformers.pipeline(task, model=folder, device="cpu")
    pipe(**given, **options) if isinstance(given, dict) else pipe(given, **options)
    print(f"{type(pipe).__name__} of {type(pipe.model).__name__}")
else:
    model = getattr(transformers, auto).from_pretrained(folder)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    if auto.endswith("Seq2SeqLM"):
        model.generate(tokens(given, return_tensors="pt")["input_ids"], max_new_tokens=4)
    else:
        model(**tokens("the good sea", given, return_tensors="pt"))
    print(f"{auto} of {type(model).__name__}, for there is no such pipeline any more")
"""


def cria(*words: str) -> dict[str, Any]:
    """Return the JSON answer of a command, or {"error": its line}."""
    result = CliRunner().invoke(app, list(words))
    if result.exit_code:
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        return {"error": (lines or [repr(result.exception)])[-1].removeprefix("error: ")}
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def in_this_process(_scratch: Path, job: dict[str, Any], inputs: dict[str, Any]) -> Any:
    """Load a folder for its certificate here: the second one of a journey has no process of its own."""
    import transformers

    loader = getattr(transformers, job["loader"], None)
    model: Any = load(job["folder"]).model if loader is None else loader.from_pretrained(job["folder"]).eval()
    found = reload.outputs(model, inputs)
    if job["tokens"]:
        found["generated"] = reload.generated(model, inputs, job["prompt"], job["tokens"])
    versions = dict.fromkeys(("python", "torch", "transformers", "safetensors"), "here")
    return {"class": type(model).__name__, "wrong": {}, "seconds": 0.0, "versions": versions}, found


def piped(task: str, auto: str, folder: Path) -> dict[str, Any]:
    """Load a folder in a fresh process by `pipeline`, and run it once."""
    words = [sys.executable, "-c", PIPELINE, task, auto, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return {"error": (lines or ["nothing said"])[-1][:200]}
    return {"by": done.stdout.strip().splitlines()[-1]}


def journey(kind: Tiny, place: Path) -> dict[str, Any]:
    """Return step -> what came of it."""
    folder, small = place / "dense", place / "small"
    folder.mkdir()
    kind.make(folder)
    given = ["--calibration", str(kind.data(place))]
    row: dict[str, Any] = {"task": kind.task}
    said = cria("prune", str(folder), *given, *ASKED, *kind.options, "--output", str(small))
    row["prune"] = {key: said[key] for key in ("error", "reduction", "policy", "pruned") if key in said}
    if "error" in said:
        return row
    certificate = json.loads((small / "certificate.json").read_text())
    row["certificate"] = {key: certificate[key] for key in ("loader", "equal", "relative")}
    if certificate["loader"] != "cria_prune.load":
        row["pipeline"] = piped(kind.task, certificate["loader"], small)
    found = cria("eval", str(small), *given, "--against", str(folder))
    row["against"] = {"loss": fidelity_of(found)} if "error" not in found else {"error": found["error"]}
    if kind.labelled:
        row["eval"] = {key: value for key, value in found.items() if key in NAMES}
        with patch.object(certificate_of, "_there", in_this_process):
            tuned = cria("recover", str(small), *given, "--epochs", "1", "--output", str(place / "tuned"))
        row["recover"] = {key: tuned[key] for key in ("error", "pruned", "recovered") if key in tuned}
    return row


NAMES = (*SHARES, "perplexity", "perplexity-128", "spearman", "pearson")


def fidelity_of(found: dict[str, Any]) -> str:
    """Return how far a model is from the dense one, as it is printed."""
    return str(Fidelity.from_dict(found["fidelity"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="kinds; all by default")
    parser.add_argument("--again", action="store_true", help="walk again where there is a result")
    options = parser.parse_args()
    known = [kind.name for kind in KINDS]
    unknown = [name for name in options.names if name not in known]
    if unknown:
        raise SystemExit(f"No kind is named {', '.join(unknown)}. Known: {'; '.join(known)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = Rows(PATH, {"asked": list(ASKED)})
    for kind in KINDS:
        if (options.names and kind.name not in options.names) or (kind.name in rows and not options.again):
            continue
        with TemporaryDirectory(prefix="cria-") as place:
            row = journey(kind, Path(place))
        rows.add(kind.name, row)
        wrong = {step: found["error"] for step, found in row.items() if "error" in found}
        print(f"{kind.name}: {wrong or 'done'}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
