"""Bits per token by the token's place in its segment: what a model loses where a segment begins.

    python experiments/places.py runs/table2-small/08-memformer-seed-0 runs/table2-small/06-transformer-xl-32-seed-0

Every run's best weights read the first of the run's held-out documents with their memory; JSON goes to stdout with
--json.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from memformer.cli.run_config import parse_run_config
from memformer.data import LaneStream
from memformer.evaluation.likelihood import encode_rollout, rollout_nats
from memformer.training.run_data import DocumentData, first_documents, prepare_data
from memformer.training.run_folder import load_run


def main() -> None:
    """Print a row of bits for every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=40_000, help="Held-out tokens, in whole documents.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {str(run.name): bits_by_place(run, options.tokens) for run in options.runs}
    if options.json:
        print(json.dumps(found))
        return
    for run, bits in found.items():
        print(f"{run:32} mean {sum(bits) / len(bits):.3f}: " + " ".join(f"{each:.2f}" for each in bits))


@torch.no_grad()
def bits_by_place(folder: Path, num_tokens: int) -> list[float]:
    """Return the mean bits of the tokens at each place of a segment.

    Raises:
        SystemExit: The run is of a recall task, and predicts no documents.
    """
    run = load_run(folder)
    config, _ = parse_run_config([str(folder)])
    data, model = prepare_data(config.data, tokenizer=run.tokenizer), run.model
    if not isinstance(data, DocumentData):
        raise SystemExit(f"{folder} was trained on a recall task; documents are needed")
    corpus = first_documents(data.validation, num_tokens)
    stream = LaneStream(
        corpus,
        num_lanes=min(8, corpus.num_documents),
        segment_length=model.segment_length,
        rollout_length=16,
        bos_token_id=model.bos_token_id,
        num_epochs=1,
    )
    nats, counts = torch.zeros(2, model.segment_length, dtype=torch.float64)
    memory: Tensor | None = None
    for read in stream:
        rollout = model.arrange(read)
        memory = model.initial_memory(rollout.batch_size) if memory is None else memory
        hidden, memory = encode_rollout(model, rollout, memory)
        found = rollout_nats(model, rollout, hidden)
        nats += found.double().sum(dim=0)
        counts += len(found) if rollout.target_padding is None else (~rollout.target_padding).sum(dim=(0, 1))
    return (nats / counts / math.log(2)).tolist()


if __name__ == "__main__":
    main()
