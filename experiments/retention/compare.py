"""Train variants of one recall task over seeds, and print accuracy by distance.

    python experiments/retention/compare.py experiments/retention/fact.yaml --variants config paper --seeds 0 1 2
    python experiments/retention/compare.py experiments/retention/associative.yaml --num_facts 4 20 --num_slots 32 64
        --facts_per_segment 1 --distances 1 1000

Runs are written to runs/retention/NAME-VARIANT-seed-N, what they print to train.log in their folders. An unfinished run
is resumed; a finished one is not repeated. Options not listed here are passed to `memformer train`. The table goes to
stdout; JSON is added to experiments/results/retention-NAME.json, and retention-NAME.png shows what was measured, a line
for each seed.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from memformer.cli.run_config import parse_run_config
from memformer.errors import InputError, SaveError
from memformer.evaluation.plots import make_panels, put_legend_below, write_figure
from memformer.reproduction.reuse import check_runs
from memformer.reproduction.runs import Run, check_train_options, finish_runs
from memformer.utils.files import write_json
from memformer.utils.signals import Interrupted
from memformer.utils.yaml_files import read_yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from machine import commit, describe_machine, positive

ROOT = Path(__file__).parents[2]
MEMFORMER = [sys.executable, "-m", "memformer"]
# The paper's writer, which undoes the changes of the configs.
PAPER = {
    "write_normalizer": "softmax",
    "write_competition": False,
    "write_sharing": False,
    "num_writer_heads": None,
    "forgetting_when_written": False,
    "log_forgetting_speeds": False,
    "exchangeable_slots": False,
    "forgetting_speeds": [0.3, 1e-5],
    "free_slot_bias": 0.0,
    "content_addressing": False,
}
# Options of an evaluation: the layout of the facts, and the number of slots.
LAYOUT = {
    "num_facts": "Facts per episode",
    "facts_per_segment": "Facts inserted in one segment",
    "num_slots": "Number of memory slots",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "config": {},
    # One scale for all forgetting vectors: the paper's norm of 1.15 at d 512 is 0.05 of the radius, 3.2 is 0.14.
    "paper": {**PAPER, "forgetting_speeds": [0.1, 0.1]},
    "spread": PAPER,
    "spread to 1e-3": {**PAPER, "forgetting_speeds": [0.3, 1e-3]},
    "spread to 1e-7": {**PAPER, "forgetting_speeds": [0.3, 1e-7]},
    "spread, temperature 1": {**PAPER, "write_temperature": 1.0},
    "spread, entmax": {**PAPER, "write_normalizer": "entmax15"},
    "log": {**PAPER, "log_forgetting_speeds": True},
    "when written": {**PAPER, "forgetting_when_written": True},
    "when written+log": {**PAPER, "forgetting_when_written": True, "log_forgetting_speeds": True},
    "log+entmax": {**PAPER, "log_forgetting_speeds": True, "write_normalizer": "entmax15"},
    "no forgetting": {**PAPER, "forgetting": False},
    "no forgetting+entmax": {**PAPER, "forgetting": False, "write_normalizer": "entmax15"},
    # The config without one of its options.
    "softmax": {"write_normalizer": "softmax"},
    "temperature 1": {"write_temperature": 1.0},
    "no competition": {"write_competition": False, "write_sharing": False, "exchangeable_slots": False},
    "heads": {"num_writer_heads": None},
    "always forgetting": {"forgetting_when_written": False},
    "a vector per slot": {"exchangeable_slots": False},
    "no free-slot bias": {"free_slot_bias": 0.0},
}


def main() -> None:
    """Train and measure all variants, print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--variants", nargs="+", default=["config", "paper", "spread"], choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--distances", nargs="+", default=["1", "4", "16", "32", "100", "1000", "10000"])
    for name, text in LAYOUT.items():
        parser.add_argument(f"--{name}", nargs="+", default=[None], help=f"{text}; by default as in training.")
    parser.add_argument("--checkpoint", default="best", choices=["best", "last"], help="Weights to evaluate.")
    parser.add_argument("--num_episodes", default=None, help="Episodes to read; by default as `memformer retention`.")
    parser.add_argument("--name", default=None, help="Name of the result; by default that of the config.")
    parser.add_argument("--jobs", type=positive, default=1, help="Number of runs trained in parallel, one core each.")
    options, further = parser.parse_known_args()
    name = options.name or options.config.stem
    output = ROOT / "experiments" / "results" / f"retention-{name}.json"
    known = json.loads(output.read_text(encoding="utf-8"))["variants"] if output.exists() else {}
    how = ["--checkpoint", options.checkpoint, "--distances", *options.distances]
    if options.num_episodes:
        how += ["--num_episodes", options.num_episodes]
    measured: dict[str, list[dict[str, Any]]] = {}
    given = {variant: [*options_of(variant), *further] for variant in options.variants}
    plans = {variant: plan(options.config, f"{name}-{variant}", options.seeds, given[variant]) for variant in given}
    for variant, trained in plans.items():
        train(trained, given[variant], jobs=options.jobs)
        for layout in itertools.product(*(getattr(options, name) for name in LAYOUT)):
            asked = [word for name, value in zip(LAYOUT, layout, strict=True) if value for word in (f"--{name}", value)]
            runs = [
                {
                    "seed": run.seed,
                    "checkpoint": options.checkpoint,
                    "options": given[variant],
                    "measured_at_commit": commit(),
                    **measure(run.folder, [*how, *asked]),
                }
                for run in trained
            ]
            earlier = known.get(variant, {}).get("runs", [])
            kept = [run for run in earlier if identity(run) not in {identity(run) for run in runs}]
            known[variant] = {"options": given[variant], "runs": [*kept, *runs]}
            summary = {"config": str(options.config), "machine": describe_machine(1), "variants": known}
            write_json(output, summary)
            title = f"{variant}, " + ", ".join(f"{name} {runs[0][name]}" for name in LAYOUT)
            print(format_row(title, runs), flush=True)
            measured[title] = runs
            write_figure(output.with_suffix(".png"), draw(measured))


def identity(run: dict[str, Any]) -> tuple[Any, ...]:
    """Return the key by which a new measurement replaces an earlier one."""
    return run["seed"], run.get("checkpoint", "best"), *(run.get(name) for name in LAYOUT)


def as_option(value: Any) -> str:
    """Return a value in the form of a command-line argument."""
    return value if isinstance(value, str) else json.dumps(value)


def options_of(variant: str) -> list[str]:
    """Return the options of `memformer train` that make a variant of a config."""
    options = [word for key, value in VARIANTS[variant].items() for word in (f"--model.{key}", as_option(value))]
    if VARIANTS[variant].get("write_normalizer") == "softmax":
        options += ["--training.write_penalty", "0"]  # softmax writes every token: nothing to penalize
    return options


def plan(config: Path, name: str, seeds: Sequence[int], options: list[str]) -> list[Run]:
    """Return the runs of all seeds; end the script if one was trained otherwise, or an option is invalid."""
    folder = ROOT / "runs" / "retention"
    try:
        fields = read_yaml(config)
        runs = [Run(name=name, seed=seed, folder=folder / f"{name}-seed-{seed}", config=fields) for seed in seeds]
        check_train_options(options)
        check_runs(runs, options=options, parse=lambda arguments: parse_run_config(arguments)[0])
    except InputError as error:
        sys.exit(f"compare.py: error: {error}")
    return runs


def train(runs: list[Run], options: list[str], *, jobs: int) -> None:
    """Train runs to their end; end the script if one fails."""
    try:
        finish_runs(runs, jobs=jobs, options=options)
    except (InputError, SaveError) as error:
        sys.exit(f"compare.py: error: {error}")
    except Interrupted as error:
        print(f"compare.py: {error}", file=sys.stderr)
        sys.exit(128 + error.signal_number)


def measure(folder: Path, options: list[str]) -> dict[str, Any]:
    """Return a run's accuracy at every distance."""
    command = [*MEMFORMER, "retention", str(folder), "--json", *options]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"compare.py: error: memformer retention {folder} failed")
    result: dict[str, Any] = json.loads(done.stdout)
    # The path of the weights is of no use on another machine.
    del result["weights"]
    return result


def draw(measured: dict[str, list[dict[str, Any]]]) -> Figure:
    """Return a panel for each title: accuracy against the tokens that were read, a line for each run."""
    figure = Figure(figsize=(7 * len(measured), 4.2), layout="constrained")
    for (panel, axes), (title, runs) in zip(make_panels(figure, len(measured)), measured.items(), strict=True):
        for run in runs:
            points = run["points"]
            tokens = [point["num_tokens"] for point in points]
            axes.plot(tokens, [point["accuracy"] for point in points], "o-", ms=4, label=f"seed {run['seed']}")
        axes.set_xscale("log")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("tokens read before the question")
        axes.set_ylabel("accuracy")
        axes.set_title(f"{runs[0]['task']}: {title}")
        axes.grid(alpha=0.3)
        put_legend_below(panel)
    return figure


def format_row(title: str, runs: list[dict[str, Any]]) -> str:
    """Return a row of a Markdown table: the mean over seeds at each distance, with the range if it is wide."""
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
