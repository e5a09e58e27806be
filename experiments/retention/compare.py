"""Train variants of one recall task over seeds, and tabulate accuracy against distance.

    python experiments/retention/compare.py experiments/retention/fact.yaml --variants paper spread --seeds 0 1 2

Runs land in runs/retention/NAME-VARIANT-seed-N; one that is there already is resumed or, if finished, taken as it is.
The table goes to stdout, JSON to experiments/results/retention-NAME.json, beside the variants that are there already.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from machine import describe_machine

ROOT = Path(__file__).parents[2]
LOG_SPEEDS = ["--model.log_forgetting_speeds", "true"]
VARIANTS = {
    # One scale for all forgetting vectors: the paper's norm of 1.15 at d 512 is 0.05 of the radius, 3.2 is 0.14.
    "paper": ["--model.forgetting_speeds", "[0.1, 0.1]"],
    "spread": [],
    "log": LOG_SPEEDS,
    "entmax": ["--model.write_normalizer", "entmax15"],
    "log+entmax": [*LOG_SPEEDS, "--model.write_normalizer", "entmax15"],
    "log+sparsemax": [*LOG_SPEEDS, "--model.write_normalizer", "sparsemax"],
    "no forgetting": ["--model.forgetting", "false"],
    "no forgetting+entmax": ["--model.forgetting", "false", "--model.write_normalizer", "entmax15"],
    "log+temperature 1": [*LOG_SPEEDS, "--model.write_temperature", "1"],
    "log+decoder reads": [*LOG_SPEEDS, "--model.decoder_reads_memory", "true"],
    "log+horizon 8": [*LOG_SPEEDS, "--training.rollout_length", "8"],
}


def main() -> None:
    """Train, measure, print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--variants", nargs="+", default=["paper", "spread", "log", "log+entmax"], choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--distances", nargs="+", default=["1", "4", "16", "32", "100", "1000", "10000"])
    parser.add_argument("--num_facts", default=None, help="Facts of an episode; the most of training if not given.")
    parser.add_argument("--name", default=None, help="Name of the result; the config's if not given.")
    options, further = parser.parse_known_args()
    name = options.name or options.config.stem
    output = ROOT / "experiments" / "results" / f"retention-{name}.json"
    known = json.loads(output.read_text(encoding="utf-8"))["variants"] if output.exists() else {}
    for variant in options.variants:
        runs = [
            measure(options, ROOT / "runs" / "retention" / f"{name}-{variant}-seed-{seed}", seed, variant, further)
            for seed in options.seeds
        ]
        known[variant] = {"options": [*VARIANTS[variant], *further], "seeds": options.seeds, "runs": runs}
        summary = {"config": str(options.config), "machine": describe_machine(1), "variants": known}
        output.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        print(format_row(variant, runs), flush=True)


def measure(options: argparse.Namespace, folder: Path, seed: int, variant: str, further: list[str]) -> dict[str, Any]:
    """Train one run to its end if it is not there, and return its accuracy at every distance."""
    memformer = [sys.executable, "-m", "memformer"]
    if not (folder / "evaluation.json").exists():
        command = [*memformer, "train", str(options.config), "--folder", str(folder), "--seed", str(seed)]
        command += [*VARIANTS[variant], *further]
        if any(folder.glob("checkpoints/update-*")):
            command.append("--resume")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    command = [*memformer, "retention", str(folder), "--json", "--distances", *options.distances]
    if options.num_facts is not None:
        command += ["--num_facts", options.num_facts]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def format_row(variant: str, runs: list[dict[str, Any]]) -> str:
    """Return a row of a Markdown table: the mean over seeds at each distance, and the range where it is wide."""
    cells = []
    for points in zip(*(run["points"] for run in runs), strict=True):
        accuracies = [point["accuracy"] for point in points]
        cell = f"{points[0]['distance']}: {statistics.mean(accuracies):.2f}"
        if max(accuracies) - min(accuracies) >= 0.01:
            cell += f" ({min(accuracies):.2f}-{max(accuracies):.2f})"
        cells.append(cell)
    return f"| {variant} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
