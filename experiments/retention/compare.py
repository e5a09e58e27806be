"""Train variants of one recall task over seeds, and tabulate accuracy against distance.

    python experiments/retention/compare.py experiments/retention/fact.yaml --variants config paper --seeds 0 1 2
    python experiments/retention/compare.py experiments/retention/associative.yaml --num_facts 4 8 20 --distances 1

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
MEMFORMER = [sys.executable, "-m", "memformer"]
# The paper's writer; the configs name what departs from it.
PAPER = {
    "write_normalizer": "softmax",
    "write_competition": False,
    "num_writer_heads": None,
    "forgetting_when_written": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "config": {},
    # One scale for all forgetting vectors: the paper's norm of 1.15 at d 512 is 0.05 of the radius, 3.2 is 0.14.
    "paper": {**PAPER, "forgetting_speeds": [0.1, 0.1]},
    "spread": PAPER,
    "log": {**PAPER, "log_forgetting_speeds": True},
    "log+entmax": {**PAPER, "log_forgetting_speeds": True, "write_normalizer": "entmax15"},
    "no forgetting": {**PAPER, "forgetting": False},
    "no forgetting+entmax": {**PAPER, "forgetting": False, "write_normalizer": "entmax15"},
    # The config less one of its parts.
    "softmax": {"write_normalizer": "softmax"},
    "temperature 1": {"write_temperature": 1.0},
    "no competition": {"write_competition": False},
    "heads": {"num_writer_heads": None},
    "always forgetting": {"forgetting_when_written": False},
    "dissimilar slots": {"slot_similarity": 0.0},
    # Capacity.
    "half the slots": {"num_slots": 32},
    "double the slots": {"num_slots": 128},
}


def main() -> None:
    """Train, measure, print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--variants", nargs="+", default=["config", "paper", "spread"], choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--distances", nargs="+", default=["1", "4", "16", "32", "100", "1000", "10000"])
    parser.add_argument("--num_facts", nargs="+", default=[None], help="Facts of an episode; else as trained.")
    parser.add_argument("--name", default=None, help="Name of the result; the config's if not given.")
    options, further = parser.parse_known_args()
    name = options.name or options.config.stem
    output = ROOT / "experiments" / "results" / f"retention-{name}.json"
    known = json.loads(output.read_text(encoding="utf-8"))["variants"] if output.exists() else {}
    for variant in options.variants:
        folders = {seed: ROOT / "runs" / "retention" / f"{name}-{variant}-seed-{seed}" for seed in options.seeds}
        for seed, folder in folders.items():
            train(options.config, folder, seed, [*model_options(variant), *further])
        runs = [
            {"seed": seed, **measure(folder, options.distances, num_facts)}
            for num_facts in options.num_facts
            for seed, folder in folders.items()
        ]
        known[variant] = {"options": [*model_options(variant), *further], "runs": runs}
        summary = {"config": str(options.config), "machine": describe_machine(1), "variants": known}
        output.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        for num_facts in sorted({run["num_facts"] for run in runs}):
            same = [run for run in runs if run["num_facts"] == num_facts]
            print(format_row(f"{variant}, {num_facts} facts", same), flush=True)


def train(config: Path, folder: Path, seed: int, further: list[str]) -> None:
    """Train one run to its end, if it is not there."""
    if (folder / "evaluation.json").exists():
        return
    command = [*MEMFORMER, "train", str(config), "--folder", str(folder), "--seed", str(seed), *further]
    if any(folder.glob("checkpoints/update-*")):
        command.append("--resume")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measure(folder: Path, distances: list[str], num_facts: str | None) -> dict[str, Any]:
    """Return a run's accuracy at every distance."""
    command = [*MEMFORMER, "retention", str(folder), "--json", "--distances", *distances]
    if num_facts is not None:
        command += ["--num_facts", num_facts]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    # Where the weights lay on this machine is nobody's business.
    del result["weights"]
    return result


def model_options(variant: str) -> list[str]:
    """Return a variant as options of `memformer train`."""
    return [word for key, value in VARIANTS[variant].items() for word in (f"--model.{key}", json.dumps(value))]


def format_row(title: str, runs: list[dict[str, Any]]) -> str:
    """Return a row of a Markdown table: the mean over seeds at each distance, and the range where it is wide."""
    cells = []
    for points in zip(*(run["points"] for run in runs), strict=True):
        accuracies = [point["accuracy"] for point in points]
        cell = f"{points[0]['distance']}: {statistics.mean(accuracies):.2f}"
        if max(accuracies) - min(accuracies) >= 0.01:
            cell += f" ({min(accuracies):.2f}-{max(accuracies):.2f})"
        cells.append(cell)
    return f"| {title} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
