"""Compare decoding with other models: milliseconds per token and bytes of state, by the length of the context.

    python -m venv .venv-peers && .venv-peers/bin/pip install -r benchmarks/peers-requirements.txt
    python benchmarks/generation.py --peers_python .venv-peers/bin/python   # JSON: benchmarks/results/generation.json

Each model runs in a separate process (`generators.py`). The models alternate, and ratios compare the same round.
Decoding is greedy. Models with a state of fixed size are measured after 1,024 tokens, and this project's also after a
million; models that keep every token are measured at growing contexts.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from machine import describe_machine, positive
from turns import Contender, in_words, ratios, spread, take_turns

from memformer.utils.files import write_json

SCRIPT = "generators.py"
OURS = {"memformer": "memformer", "memformer, compiled": "memformer-compiled"}
PEERS = {
    "GPT-2, transformers' cache": "gpt2",
    "GPT-2, preallocated cache": "gpt2-preallocated",
    "Mamba": "mamba",
    "RWKV-4": "rwkv",
}
GROWING = ("GPT-2, transformers' cache", "GPT-2, preallocated cache")


def main() -> None:
    """Measure, print the table and write JSON."""
    options = parse_arguments()
    setting = {key: value for key, value in vars(options).items() if key not in {"output", "peers_python", "rounds"}}
    contenders = {name: Contender(sys.executable, SCRIPT, kind, setting) for name, kind in OURS.items()}
    if options.peers_python:
        for name, kind in PEERS.items():
            contenders[name] = Contender(options.peers_python, SCRIPT, kind, setting)
    rows = []
    for context in [128, 1024, options.longest_context, options.million]:
        here = {
            name: contender
            for name, contender in contenders.items()
            if name in OURS or context == 1024 or (name in GROWING and context <= options.longest_context)
        }
        measured = take_turns(here, str(context), rounds=options.rounds)
        rows += [describe(name, context, measured) for name in here]
    flat = {name: growth(contenders[name], options.million, options.rounds) for name in OURS}
    for contender in contenders.values():
        contender.close()
    print(format_table(rows))
    for name, values in flat.items():
        print(f"\n{name}: time per token after {options.million:,} tokens, relative to 1,024: {in_words(values)}")
    result = {
        "setting": {**setting, "rounds": options.rounds},
        "machine": describe_machine(options.threads),
        "rows": rows,
        "growth": flat,
    }
    write_json(Path(options.output), result)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--segment_length", type=int, default=128)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument(
        "--layers", type=int, default=8, help="Total layers; in an encoder-decoder half of them encode."
    )
    parser.add_argument("--num_slots", type=int, default=32)
    parser.add_argument("--num_tokens", type=int, default=128, help="Tokens decoded in each turn.")
    parser.add_argument(
        "--longest_context", type=int, default=8192, help="Longest context, in tokens, of models that keep every token."
    )
    parser.add_argument(
        "--million", type=int, default=1_000_000, help="Longest context, in tokens, of this project's model."
    )
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument(
        "--peers_python", default=None, help="Python interpreter of the environment with the other models."
    )
    parser.add_argument("--output", default="benchmarks/results/generation.json")
    return parser.parse_args()


def growth(contender: Contender, context: int, rounds: int) -> dict[str, float]:
    """Return the time of a token after `context` tokens divided by its time after 1,024 tokens."""
    pairs = [(contender.work("1024"), contender.work(str(context))) for _ in range(rounds)]
    return spread([far["seconds"] / near["seconds"] for near, far in pairs])


def describe(name: str, context: int, measured: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return a row of the result; its ratios are this project's speed divided by the model's."""
    rounds = measured[name]
    return {
        "name": name,
        "context": context,
        "ms_per_token": spread([1000 * turn["seconds"] / turn["tokens"] for turn in rounds]),
        "state_bytes": rounds[-1]["state_bytes"],
        "ours_faster_by": {ours: ratios(measured[ours], rounds) for ours in OURS},
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table."""
    lines = [
        "| model | context, tokens | ms/token | "
        + " | ".join(f"speed ratio of {ours}" for ours in OURS)
        + " | state, KiB |",
        "|---|---|---|" + "---|" * len(OURS) + "---|",
    ]
    for row in rows:
        faster = " | ".join("" if row["name"] in OURS else f"x{in_words(row['ours_faster_by'][o])}" for o in OURS)
        lines.append(
            f"| {row['name']} | {row['context']:,} | {row['ms_per_token']['median']:.2f} | {faster} "
            f"| {row['state_bytes'] / 1024:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
