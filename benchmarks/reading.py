"""Compare reading a stream with a session, uncompiled and compiled, with a small model and short segments.

    python benchmarks/reading.py          # table; JSON to benchmarks/results/reading.json

The two alternate in one process, and the ratio compares the same round.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from machine import describe_machine
from turns import spread

from memformer import Memformer, MemformerConfig, Session


def main() -> None:
    """Measure, print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16_000, help="tokens read in one round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="benchmarks/results/reading.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = MemformerConfig(
        d_model=48, d_ff=128, num_encoder_layers=2, num_decoder_layers=2, segment_length=16, num_slots=16
    )
    model = Memformer(config).eval()
    stream = torch.randint(0, 256, (options.tokens,))
    sessions = {name: Session(model, compiled=name == "compiled") for name in ("uncompiled", "compiled")}
    speeds: dict[str, list[float]] = {name: [] for name in sessions}
    for count in range(options.rounds + 1):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.feed(stream)
            if count:  # the first round warms up, and compiles
                speeds[name].append(options.tokens / (time.perf_counter() - started))
    ratio = spread([own / base for own, base in zip(speeds["compiled"], speeds["uncompiled"], strict=True)])
    rows = {name: spread(values) for name, values in speeds.items()}
    print("| session | tokens/s |\n|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['median']:,.0f} ({row['low']:,.0f}-{row['high']:,.0f}) |")
    print(f"\ncompiled / uncompiled: x{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})")
    result = {
        "machine": describe_machine(options.threads),
        "parameters": model.num_parameters,
        "config": config.to_dict(),
        "tokens_per_second": rows,
        "ratio": ratio,
    }
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
