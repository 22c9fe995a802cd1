"""After surgery, one network of each kind: export, ONNX, generation, a checkpoint, a second pruning.

    python benchmarks/deployed.py
    python benchmarks/deployed.py own/lstm-tagger --again

One file per network under benchmarks/results/deployed; a network that has one is not run again.
`python benchmarks/tables.py` turns the files into a table of docs/coverage.md.
"""

from __future__ import annotations

import argparse
import sys

import zoo
from cria_prune.artifact.rebuild import provenance
from result_files import RESULTS, write
from staged import collect

LIMIT = 600.0
KINDS = {
    "convolutions with skips": "own/super-resolution",
    "mixture of experts": "transformers/mixtral",
    "recurrent": "own/lstm-tagger",
    "recurrent, by hand": "own/rnn-by-hand",
    "state space": "transformers/mamba",
    "receptance": "own/rwkv-by-hand",
    "splines": "own/kan",
    "weight norm": "own/wavenet-weight-norm",
    "spectral norm": "own/spectral-discriminator",
    "weight standardisation": "own/weight-standardised",
    "widths from the input": "own/nanogpt",
    "windows": "transformers/swinv2",
    "cross attention": "own/transformer-decoder",
    "parallel branches": "own/repvgg-train",
    "U-Net": "own/unet",
    "graph": "own/graph-index-add",
    "convolutions and recurrence": "own/crnn",
    "grouped queries": "transformers/llama",
    "one key for all queries": "transformers/falcon",
    "text to text": "transformers/t5",
    "text and image": "transformers/llava",
    "speech": "transformers/hubert",
    "segmentation": "transformers/segformer-segmentation",
    "detector": "own/users-yolo-detect",
}
"""Kind -> the network that stands for it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks of the list; all by default")
    parser.add_argument("--again", action="store_true", help="measure again where there is a result")
    options = parser.parse_args()
    for kind, network in KINDS.items():
        path = RESULTS / "deployed" / f"{network}.json"
        if (options.names and network not in options.names) or (path.exists() and not options.again):
            continue
        values = {
            "network": network,
            "kind": kind,
            "stages": collect("deployed_cell.py", [network], LIMIT),
            "provenance": provenance(seed=zoo.SEED, command=["benchmarks/deployed.py", *sys.argv[1:]]),
        }
        write(path, values)
        errors = [f"{stage}: {item['error']}" for stage, item in values["stages"].items() if "error" in item]
        print(f"{network}: {'; '.join(errors) or 'done'}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
