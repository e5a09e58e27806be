"""Compare reading filler ahead with reading it one segment after another, with the models of recall runs.

    python benchmarks/reading_ahead.py runs/retention/fact runs/retention/babi    # table and JSON

The two ways read the same facts and the same filler in turn in one process, and a ratio compares the same round.
"""

import argparse
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from machine import describe_machine, positive
from turns import in_words, spread

from memformer.cli.loading import prepare_data_of, run_config_of
from memformer.evaluation.recall import measure_recall
from memformer.models.memory_encoder import MemoryEncoder
from memformer.training.run_data import RecallData
from memformer.training.run_folder import load_run
from memformer.utils.files import write_json


def main() -> None:
    """Measure, print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of recall runs")
    parser.add_argument("--num_slots", type=int, nargs="+", default=[None], help="default: as in training")
    parser.add_argument("--rows", type=int, default=16, help="episodes read side by side")
    parser.add_argument("--distance", type=int, default=500, help="segments read in one round")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", default="benchmarks/results/reading-ahead.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    print("| run | slots | one after another, tokens/s | ahead / one after another |\n|---|---|---|---|")
    for folder in options.runs:
        for num_slots in options.num_slots:
            row = measure(folder, num_slots, options)
            rows.append(row)
            print(
                f"| {folder} | {row['num_slots']} | {in_words(row['one_after_another'], ',.0f')} "
                f"| x{in_words(row['ratio'], '.1f')} |"
            )
    result = {"machine": describe_machine(options.threads), "options": vars(options), "rows": rows}
    write_json(Path(options.output), result)


def measure(folder: str, num_slots: int | None, options: argparse.Namespace) -> dict[str, Any]:
    """Return the tokens per second of both ways, and the ratio.

    Raises:
        RuntimeError: The two ways do not give the same answers.
    """
    run = load_run(folder, which="last", num_slots=num_slots)
    data = prepare_data_of(run, run_config_of(run).data)
    assert isinstance(data, RecallData)
    speeds: dict[bool, list[float]] = {False: [], True: []}
    for count in range(options.rounds + 1):
        found = {}
        for is_ahead, values in speeds.items():
            started = time.perf_counter()
            with patch.object(MemoryEncoder, "keeps_unwritten_segments", is_ahead):
                found[is_ahead] = measure_recall(
                    run.model,
                    data.validation,
                    data.config,
                    distances=[options.distance],
                    num_facts=data.config.num_facts[1],
                    num_episodes=options.rows,
                    questions_per_episode=1,
                    seed=count,
                )
            if count:  # the first round warms up
                (point,) = found[is_ahead].points
                values.append(options.rows * point.num_tokens / (time.perf_counter() - started))
        if found[False] != found[True]:
            raise RuntimeError(f"the answers differ: {found}")
    return {
        "run": folder,
        "num_slots": run.model.memory_shape[0],
        "config": run.model.config.to_dict(),
        "one_after_another": spread(speeds[False]),
        "ahead": spread(speeds[True]),
        "ratio": spread([ahead / other for ahead, other in zip(speeds[True], speeds[False], strict=True)]),
    }


if __name__ == "__main__":
    main()
