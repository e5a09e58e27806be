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

from memformer.commands import parse_run_config
from memformer.data import LaneStream
from memformer.training.run import load_run
from memformer.training.run_data import first_documents, open_corpus


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
    """Return the mean bits of the tokens at each place of a segment."""
    run = load_run(folder)
    config, _ = parse_run_config([str(folder)])
    assert config.data.validation is not None
    corpus = first_documents(open_corpus(config.data, config.data.validation, tokenizer=run.tokenizer), num_tokens)
    model = run.model
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
        for step in range(rollout.num_timesteps):
            assert rollout.reset is not None
            memory = model.reset_memory(memory, rollout.reset[step])
            padding = None if rollout.input_padding is None else rollout.input_padding[step]
            missing = None if rollout.target_padding is None else rollout.target_padding[step]
            hidden, memory = model.encode(rollout.inputs[step], memory=memory, padding_mask=padding)
            found = model.token_nats(
                rollout.targets[step], hidden=hidden, hidden_padding_mask=padding, target_padding_mask=missing
            )
            nats += found.sum(dim=0)
            counts += len(found) if missing is None else (~missing).sum(dim=0)
    return (nats / counts / math.log(2)).tolist()


if __name__ == "__main__":
    main()
