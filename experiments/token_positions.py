"""Measure bits per token by the position of the token in its segment.

    python experiments/token_positions.py runs/demo runs/classics --tokens 20000

The best weights of every run read the first held-out documents of that run, with the memory carried along. The output
shows how much the first tokens of a segment cost.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from memformer.cli.run_config import parse_run_config
from memformer.data import LaneStream
from memformer.evaluation.likelihood import encode_rollout, rollout_nll
from memformer.training.run_data import DocumentData, first_documents, prepare_data
from memformer.training.run_folder import load_run


def main() -> None:
    """Print a row of bits per token for every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="Run folders.")
    parser.add_argument("--tokens", type=int, default=40_000, help="Number of held-out tokens, in whole documents.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object to stdout.")
    options = parser.parse_args()
    found = {str(run.name): bits_by_position(run, options.tokens) for run in options.runs}
    if options.json:
        print(json.dumps(found))
        return
    for run, bits in found.items():
        print(f"{run:32} mean {sum(bits) / len(bits):.3f}: " + " ".join(f"{each:.2f}" for each in bits))


@torch.no_grad()
def bits_by_position(folder: Path, num_tokens: int) -> list[float]:
    """Return the mean bits per token at each position in a segment.

    Raises:
        SystemExit: The run is of a recall task, which has no documents.
    """
    run = load_run(folder)
    config, _ = parse_run_config([str(folder)])
    data, model = prepare_data(config.data, tokenizer=run.tokenizer), run.model
    if not isinstance(data, DocumentData):
        raise SystemExit(f"{folder} was trained on a recall task, but this script needs documents")
    corpus = first_documents(data.validation, num_tokens)
    stream = LaneStream(
        corpus,
        num_lanes=min(8, corpus.num_documents),
        segment_length=model.segment_length,
        rollout_length=16,
        bos_token_id=model.bos_token_id,
        num_epochs=1,
    )
    nll, counts = torch.zeros(2, model.segment_length, dtype=torch.float64)
    memory: Tensor | None = None
    for read in stream:
        rollout = model.align_inputs(read)
        memory = model.initial_memory(rollout.batch_size) if memory is None else memory
        hidden, memory = encode_rollout(model, rollout, memory)
        found = rollout_nll(model, rollout, hidden)
        nll += found.double().sum(dim=0)
        counts += len(found) if rollout.target_padding is None else (~rollout.target_padding).sum(dim=(0, 1))
    return (nll / counts / math.log(2)).tolist()


if __name__ == "__main__":
    main()
