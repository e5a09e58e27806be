"""Measure bits per token by the position of the token in its segment.

    python experiments/token_positions.py runs/demo runs/classics --tokens 20000

The best weights of every run read the first held-out documents of that run, with the memory carried along. The output
shows how much the first tokens of a segment cost.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from memformer import Session
from memformer.cli.run_config import parse_run_config
from memformer.errors import InputError
from memformer.training.run_data import DocumentData, first_documents, prepare_data
from memformer.training.run_folder import load_run


def main() -> None:
    """Print a row of bits per token for every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="Run folders.")
    parser.add_argument("--tokens", type=int, default=40_000, help="Number of held-out tokens, in whole documents.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object to stdout.")
    options = parser.parse_args()
    try:
        found = {str(run): bits_by_position(run, options.tokens) for run in options.runs}
    except InputError as error:
        sys.exit(f"token_positions.py: error: {error}")
    if options.json:
        print(json.dumps(found))
        return
    for run, bits in found.items():
        print(f"{run:32} mean {sum(bits) / len(bits):.3f}: " + " ".join(f"{each:.2f}" for each in bits))


def bits_by_position(folder: Path, num_tokens: int) -> list[float]:
    """Return the mean bits per token at each position in a segment.

    Raises:
        SystemExit: The run is of a recall task, which has no documents, or its documents are shorter than a segment.
    """
    run = load_run(folder)
    config, _ = parse_run_config([str(folder)])
    data, model = prepare_data(config.data, tokenizer=run.tokenizer), run.model
    if not isinstance(data, DocumentData):
        raise SystemExit(f"{folder} was trained on a recall task, but this script needs documents")
    corpus = first_documents(data.test, num_tokens)
    nll, counts = torch.zeros(2, model.segment_length, dtype=torch.float64)
    for index in range(corpus.num_documents):
        found = Session(model).score(corpus.document(index)).double()
        positions = torch.arange(len(found)) % model.segment_length
        nll.index_add_(0, positions, found)
        counts += positions.bincount(minlength=model.segment_length)
    if not counts.all():
        raise SystemExit(f"{folder} was trained on documents shorter than a segment; no token has the last positions")
    return (nll / counts / math.log(2)).tolist()


if __name__ == "__main__":
    main()
