"""Compare reading a stream with a session, compiled reading, and scoring every token, with two small models.

    python benchmarks/reading.py          # table; JSON to benchmarks/results/reading.json

The three alternate in one process, and a ratio compares the same round.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, positive
from sizes import PAPER_DECODER
from turns import in_words, spread, time_in_turns

from memformer import Memformer, MemformerConfig, Session
from memformer.utils.files import write_json

SIZES = {
    "segments of 16, width 48": {
        "d_model": 48,
        "d_ff": 128,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "segment_length": 16,
        "num_slots": 16,
    },
    # As experiments/text.yaml.
    "segments of 16, width 192": {
        "d_model": 192,
        "d_ff": 768,
        "num_heads": 4,
        "num_encoder_layers": 3,
        "num_decoder_layers": 4,
        "segment_length": 16,
        "num_slots": 16,
    },
    "segments of 64, width 128": {
        "d_model": 128,
        "d_ff": 512,
        "num_encoder_layers": 2,
        "num_decoder_layers": 3,
        "segment_length": 64,
        "num_slots": 32,
    },
}


def main() -> None:
    """Measure, print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--tokens", type=int, default=16_000, help="tokens read in one round")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", default="benchmarks/results/reading.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        "| model | reading, tokens/s | compiled reading / reading | time of scoring / of reading |\n|---|---|---|---|"
    )
    result = {"machine": describe_machine(options.threads), "tokens": options.tokens, "models": {}}
    for name, size in SIZES.items():
        result["models"][name] = row = measure(size, options.tokens, options.rounds)
        print(
            f"| {name} | {in_words(row['tokens_per_second']['reading'], ',.0f')} "
            f"| x{in_words(row['compiled'], '.2f')} | x{in_words(row['scoring'], '.2f')} |"
        )
    write_json(Path(options.output), result)


def measure(size: dict[str, int], num_tokens: int, rounds: int) -> dict[str, Any]:
    """Return the tokens per second of each way to go over a stream, and the ratios."""
    torch.manual_seed(0)
    model = Memformer(MemformerConfig(**size, **PAPER_DECODER)).eval()
    stream = torch.randint(0, 256, (num_tokens,))
    ways = {
        "reading": partial(Session(model).feed, stream),
        "compiled": partial(Session(model, compiled=True).feed, stream),
        "scoring": partial(Session(model).score, stream),
    }
    seconds = time_in_turns(ways, rounds=rounds)
    speeds = {name: [num_tokens / value for value in values] for name, values in seconds.items()}
    base = speeds["reading"]
    return {
        "parameters": model.num_parameters,
        "config": model.config.to_dict(),
        "tokens_per_second": {name: spread(values) for name, values in speeds.items()},
        "compiled": spread([own / other for own, other in zip(speeds["compiled"], base, strict=True)]),
        "scoring": spread([other / own for own, other in zip(speeds["scoring"], base, strict=True)]),
    }


if __name__ == "__main__":
    main()
