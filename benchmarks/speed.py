"""Compare training and evaluation speed with other models and with the processor's peak matmul throughput.

    python -m venv .venv-peers && .venv-peers/bin/pip install -r benchmarks/peers-requirements.txt
    python benchmarks/speed.py --peers_python .venv-peers/bin/python   # JSON: benchmarks/results/speed.json

Each model runs in a separate process (`contenders.py`). The models alternate, and ratios compare the same round.
Useful operations exclude recomputation. The peak is the fastest of several float32 matrix products in the same round.
Without `--peers_python` only this project is measured.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from machine import describe_machine, positive
from turns import Contender, in_words, ratios, speed, spread, take_turns

from memformer.utils.files import write_json

REPLAY = {"method": "replay", "readout_timesteps": 2}
OURS: dict[str, dict[str, Any]] = {
    "memformer, replay": REPLAY,
    "memformer, bptt": {"method": "bptt", "readout_timesteps": 8},
    "memformer, replay, bfloat16": {**REPLAY, "precision": "bfloat16"},
}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lucidrains/memformer, replay": ("lucidrains", {}),
    "lucidrains/memformer, replay, bfloat16": ("lucidrains", {"precision": "bfloat16"}),
    "Transformer-XL, memory 128": ("transformer-xl", {"memory_length": 128}),
    "Transformer-XL, memory 512": ("transformer-xl", {"memory_length": 512}),
    "Transformer-XL, memory 1600": ("transformer-xl", {"memory_length": 1600}),
    "GPT-2, nothing beyond the segment": ("gpt2", {}),
    "GPT-2, nothing beyond the segment, bfloat16": ("gpt2", {"precision": "bfloat16"}),
}
SCRIPT = "contenders.py"
BASE, PEAK = "lucidrains/memformer, replay", "matrix product"


def main() -> None:
    """Measure, print the table and write JSON."""
    options = parse_arguments()
    setting = {key: value for key, value in vars(options).items() if key not in {"output", "peers_python", "rounds"}}
    setting["precision"] = "float32"
    contenders = {PEAK: Contender(sys.executable, SCRIPT, "matrix-product", setting)}
    for name, own in OURS.items():
        contenders[name] = Contender(sys.executable, SCRIPT, "memformer", {**setting, **own})
    if options.peers_python:
        for name, (kind, own) in PEERS.items():
            contenders[name] = Contender(options.peers_python, SCRIPT, kind, {**setting, **own})
    measured = {what: take_turns(contenders, what, rounds=options.rounds) for what in ("train", "evaluate")}
    for contender in contenders.values():
        contender.close()
    rows = [describe(name, contenders[name], measured, has_peers=bool(options.peers_python)) for name in contenders]
    print(format_table(rows))
    result = {
        "setting": {**setting, "rounds": options.rounds},
        "machine": describe_machine(options.threads),
        "rows": rows,
    }
    write_json(Path(options.output), result)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--segment_length", type=int, default=128)
    parser.add_argument("--num_segments", type=int, default=8, help="Segments per unit of work (the rollout).")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument(
        "--layers", type=int, default=8, help="Total layers; in an encoder-decoder half of them encode."
    )
    parser.add_argument("--num_slots", type=int, default=32)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument(
        "--peers_python", default=None, help="Python interpreter of the environment with the other models."
    )
    parser.add_argument("--output", default="benchmarks/results/speed.json")
    return parser.parse_args()


def describe(
    name: str, contender: Contender, measured: dict[str, dict[str, list[dict[str, Any]]]], *, has_peers: bool
) -> dict[str, Any]:
    """Return a row of the result."""
    row: dict[str, Any] = {"name": name, **contender.facts}
    if name == PEAK:
        peaks = [turn["peak"] for rounds in measured.values() for turn in rounds[PEAK]]
        return {**row, "flops_per_second": spread(peaks)}
    for what, rounds in measured.items():
        own = rounds[name]
        row[what] = {"tokens_per_second": spread(speed(own))}
        if has_peers:
            row[what]["ratio"] = ratios(own, rounds[BASE])
    if contender.facts["useful_flops"]:
        row["train"]["fraction_of_peak"] = spread(
            [
                contender.facts["useful_flops"] / turn["seconds"] / peak["peak"]
                for turn, peak in zip(measured["train"][name], measured["train"][PEAK], strict=True)
            ]
        )
    return row


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table; ratios are relative to lucidrains/memformer in float32, with the range over rounds."""
    peak, *models = rows
    lines = [
        "| model | training, tokens/s | training speed ratio | fraction of peak | evaluation, tokens/s "
        "| evaluation speed ratio | state per row, KiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in models:
        train, evaluate = row["train"], row["evaluate"]
        fraction = f"{train['fraction_of_peak']['median']:.2f}" if "fraction_of_peak" in train else ""
        lines.append(
            f"| {row['name']} | {train['tokens_per_second']['median']:,.0f} | {format_ratio(train)} | {fraction} "
            f"| {evaluate['tokens_per_second']['median']:,.0f} | {format_ratio(evaluate)} "
            f"| {row['state_bytes'] / 1024:,.0f} |"
        )
    return "\n".join([*lines, "", f"peak: {peak['flops_per_second']['median'] / 1e9:,.0f} GFLOP/s in float32"])


def format_ratio(measured: dict[str, Any]) -> str:
    """Return a ratio and its range."""
    return f"x{in_words(measured['ratio'])}" if "ratio" in measured else ""


if __name__ == "__main__":
    main()
