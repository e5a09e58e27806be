"""Measure the state and peak memory of a session fed a million bytes, and the effect of random splits.

python benchmarks/session.py                 # table; JSON to benchmarks/results/session.json
"""

import argparse
import random
import time
from pathlib import Path

import torch
from machine import describe_machine, memory_mib, positive
from sizes import PAPER_DECODER

from memformer import Memformer, MemformerConfig, Session
from memformer.utils.files import write_json

MARKS = (10_000, 100_000, 250_000, 500_000, 1_000_000)


def main() -> None:
    """Measure, print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", default="benchmarks/results/session.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = MemformerConfig(
        d_model=128,
        d_ff=512,
        num_encoder_layers=2,
        num_decoder_layers=3,
        segment_length=64,
        num_slots=32,
        **PAPER_DECODER,
    )
    session = Session(Memformer(config))
    stream = torch.randint(0, 256, (MARKS[-1],))
    rows = []
    done, started = 0, time.perf_counter()
    for mark in MARKS:
        for start in range(done, mark, MARKS[0]):
            # Feed parts of equal size, because each part is held in memory as a whole.
            session.feed(stream[start : start + MARKS[0]])
        session.next_token_logits()
        done = mark
        rows.append(
            {
                "bytes_fed": mark,
                "state_bytes": session.state_bytes,
                "peak_memory_mib": memory_mib("VmHWM"),
                "seconds": time.perf_counter() - started,
            }
        )
    print("| bytes fed | state, bytes | peak memory, MiB | seconds |\n|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['bytes_fed']:,} | {row['state_bytes']:,} | {row['peak_memory_mib']:.1f} | {row['seconds']:.1f} |"
        )
    growth = rows[-1]["peak_memory_mib"] / rows[0]["peak_memory_mib"] - 1
    difference = split_difference(config)
    print(f"peak memory from {MARKS[0]:,} to {MARKS[-1]:,} bytes: {growth:+.2%}")
    print(f"float64, 100,000 bytes in random splits compared with one feed: largest difference {difference:.1e}")
    result = {"machine": describe_machine(options.threads), "rows": rows, "split_difference_float64": difference}
    write_json(Path(options.output), result)


def split_difference(config: MemformerConfig) -> float:
    """Return the largest difference in memory or next-token logits between one feed and random splits."""
    model = Memformer(config).double()
    stream = torch.randint(0, 256, (100_000,))
    whole, split = Session(model), Session(model)
    whole.feed(stream)
    chooser, start = random.Random(0), 0
    while start < len(stream):
        size = chooser.randint(0, 1000)
        split.feed(stream[start : start + size])
        start += size
    differences = [whole.memory - split.memory, whole.next_token_logits() - split.next_token_logits()]
    return max(float(difference.abs().max()) for difference in differences)


if __name__ == "__main__":
    main()
