"""Train one config with several seeds, and report the memory gain with its spread over the seeds.

    python experiments/seeds.py experiments/demo.yaml --seeds 0 1 2

Options not listed here are passed to `memformer train`. Runs are written to runs/NAME-seed-N. An unfinished run is
resumed, and a finished one is not repeated; if it has another config, the script ends: give options another --name. The
table goes to stdout, JSON to experiments/results/NAME.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from memformer.cli.run_config import parse_run_config
from memformer.errors import InputError
from memformer.reproduction.reuse import check_run
from memformer.training.checkpoint import checkpoints_newest_first
from memformer.training.run_folder import CHECKPOINTS, RESULT_FILE
from memformer.utils.files import write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import describe_machine


def main() -> None:
    """Train all seeds, print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default=None, help="Name of the result; by default that of the config.")
    parser.add_argument("--jobs", type=int, default=1, help="Number of seeds trained in parallel, one core each.")
    options, further = parser.parse_known_args()
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; it must be at least 1")
    name = options.name or options.config.stem
    try:
        for seed in options.seeds:
            check(options.config, name, seed, further)
    except InputError as error:
        sys.exit(f"seeds.py: error: {error}")
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = pool.map(lambda seed: train(options.config, name, seed, further), options.seeds)
        results = dict(zip(options.seeds, runs, strict=True))
    print(format_table(results))
    summary = {
        "config": str(options.config),
        "options": further,
        "machine": describe_machine(1),
        "runs": results,
        "memory_gain_bits_per_byte": spread([run["memory_gain_bits_per_byte"] for run in results.values()]),
        "bits_per_byte": spread([run["with_memory"]["bits_per_byte"] for run in results.values()]),
        "bits_per_byte_memory_erased": spread([run["memory_erased"]["bits_per_byte"] for run in results.values()]),
    }
    output = Path(__file__).parent / "results" / f"{name}.json"
    write_json(output, summary)


def check(config: Path, name: str, seed: int, further: list[str]) -> None:
    """Check that a run can be trained, or was trained with this config.

    Raises:
        InputError: It was trained otherwise, an option is invalid, or the task has no bits per byte.
    """
    planned, _ = parse_run_config([str(config), "--seed", str(seed), *further])
    if planned.data.recall is not None:
        raise InputError(f"{config} is of a recall task; experiments/retention/compare.py measures these")
    check_run(Path("runs") / f"{name}-seed-{seed}", planned)


def train(config: Path, name: str, seed: int, further: list[str]) -> dict[str, Any]:
    """Train one seed to the end, and return its evaluation on held-out documents with figures of the training."""
    folder = Path("runs") / f"{name}-seed-{seed}"
    if not (folder / RESULT_FILE).exists():
        run(config, folder, seed, further)
    result: dict[str, Any] = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in log if line["kind"] == "training"][-1]
    curve = [line for line in log if line["kind"] == "evaluation"]
    return {**result, "tokens_trained": last["num_tokens"], "training_seconds": last["seconds"], "evaluations": curve}


def run(config: Path, folder: Path, seed: int, further: list[str]) -> None:
    """Run `memformer train` to its end, resuming from the last checkpoint if there is one."""
    command = [sys.executable, "-m", "memformer", "train", str(config), "--folder", str(folder), "--seed", str(seed)]
    if any(checkpoints_newest_first(folder / CHECKPOINTS)):
        command.append("--resume")
    if status := subprocess.run([*command, *further], check=False, stdout=subprocess.DEVNULL).returncode:
        sys.exit(status)  # the command has said why


def spread(values: list[float]) -> dict[str, float]:
    """Return the mean, the standard deviation (0 for one value), the lowest and the highest value."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "deviation": deviation, "low": min(values), "high": max(values)}


def format_table(results: dict[int, dict[str, Any]]) -> str:
    """Return a Markdown table."""
    lines = [
        "| seed | bits/byte with memory | bits/byte, memory erased | memory gain, bits/byte |",
        "|---|---|---|---|",
    ]
    for seed, run in results.items():
        lines.append(
            f"| {seed} | {run['with_memory']['bits_per_byte']:.4f} | {run['memory_erased']['bits_per_byte']:.4f} "
            f"| {run['memory_gain_bits_per_byte']:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
