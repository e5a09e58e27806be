"""Train one config with several seeds, and report the memory gain with its spread over the seeds.

    python experiments/seeds.py experiments/demo.yaml --seeds 0 1 2

Options not listed here are passed to `memformer train`. Runs are written to runs/NAME-seed-N, what they print to
train.log in their folders. An unfinished run is resumed, and a finished one is not repeated; if it has another config,
the script ends: give options another --name. The table goes to stdout, JSON to experiments/results/NAME.json.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memformer.cli.run_config import parse_run_config
from memformer.errors import InputError, SaveError
from memformer.reproduction.results import deviation
from memformer.reproduction.reuse import check_runs, parse_run
from memformer.reproduction.runs import Run, check_train_options, finish_runs
from memformer.training.config import RunConfig
from memformer.training.logs import read_log
from memformer.utils.files import write_json
from memformer.utils.signals import Interrupted
from memformer.utils.yaml_files import read_yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import describe_machine, positive


def main() -> None:
    """Train all seeds, print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default=None, help="Name of the result; by default that of the config.")
    parser.add_argument("--jobs", type=positive, default=1, help="Number of seeds trained in parallel, one core each.")
    options, further = parser.parse_known_args()
    name = options.name or options.config.stem
    try:
        runs = train(options.config, name, options.seeds, further, jobs=options.jobs)
        results = {run.seed: result_of(run) for run in runs}
    except (InputError, SaveError) as error:
        sys.exit(f"seeds.py: error: {error}")
    except Interrupted as error:
        print(f"seeds.py: {error}", file=sys.stderr)
        sys.exit(128 + error.signal_number)
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


def train(config: Path, name: str, seeds: Sequence[int], options: Sequence[str], *, jobs: int) -> list[Run]:
    """Train all seeds to the end, and return their runs.

    Raises:
        InputError: A run was trained otherwise, an option is invalid, a run failed, or the task has no bits per byte.
        SaveError: A config cannot be written.
        Interrupted: SIGINT or SIGTERM arrived; the runs were saved.
    """

    def parse(arguments: Sequence[str]) -> RunConfig:
        return parse_run_config(arguments)[0]

    fields = read_yaml(config)
    runs = [Run(name=name, seed=seed, folder=Path(f"runs/{name}-seed-{seed}"), config=fields) for seed in seeds]
    check_train_options(options)
    if parse_run(runs[0], options, parse).data.recall is not None:
        raise InputError(f"{config} is of a recall task; experiments/retention/compare.py measures these")
    check_runs(runs, options=options, parse=parse)
    finish_runs(runs, jobs=jobs, options=options)
    return runs


def result_of(run: Run) -> dict[str, Any]:
    """Return the evaluation on held-out documents, with the evaluations while training."""
    curve = [line for line in read_log(run.folder) if line["kind"] == "evaluation"]
    return {**run.result("bits_per_byte"), "evaluations": curve}


def spread(values: list[float]) -> dict[str, float]:
    """Return the mean, the standard deviation (0 for one value), the lowest and the highest value."""
    low, high = min(values), max(values)
    return {"mean": statistics.mean(values), "deviation": deviation(values), "low": low, "high": high}


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
