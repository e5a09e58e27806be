"""Draw how many key-value pairs a memory holds, by its size.

    python experiments/retention/capacity.py associative-128 associative-128-half --facts_per_segment 6

reads experiments/results/retention-NAME.json for each name, results of `compare.py` with several `--num_facts` and
`--num_slots`, prints a table, and writes experiments/results/retention-capacity.png. A memory holds the most correct
answers that it gives for any number of pairs: their share at the longest distance times the pairs.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

from memformer.evaluation.plots import write_figure

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="Names of the results.")
    parser.add_argument("--facts_per_segment", type=int, default=6, help="Pairs inserted in one segment.")
    options = parser.parse_args()
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    print("| result | slots | state, KiB | pairs held, by seed |\n|---|---|---|---|")
    for name in options.names:
        held = pairs_held(name, options.facts_per_segment)
        if not held:
            sys.exit(f"retention-{name}.json has no result with {options.facts_per_segment} facts per segment")
        sizes = sorted(held)
        for slots, state_bytes in sizes:
            seeds = ", ".join(f"{value:.1f}" for value in held[slots, state_bytes])
            print(f"| {name} | {'-' if slots is None else slots} | {state_bytes / 1024:.1f} | {seeds} |")
        means = [statistics.mean(held[size]) for size in sizes]
        axes.plot([state_bytes / 1024 for _, state_bytes in sizes], means, "o-", label=name)
        for (slots, state_bytes), mean in zip(sizes, means, strict=True):
            axes.annotate(
                "" if slots is None else f"{slots}",
                (state_bytes / 1024, mean),
                xytext=(5, -9),
                textcoords="offset points",
            )
    axes.set_xlabel("state of a stream, KiB")
    axes.set_ylabel("pairs held")
    axes.set_ylim(bottom=0)
    axes.set_title("Key-value pairs held, mean over seeds, by the number of slots", loc="left")
    axes.legend()
    axes.grid(alpha=0.3)
    write_figure(RESULTS / "retention-capacity.png", figure)


def pairs_held(name: str, facts_per_segment: int) -> dict[tuple[int, int], list[float]]:
    """Return the pairs that each seed's memory holds, by its number of slots and the bytes of its state.

    Raises:
        SystemExit: Results are of several kinds of weights or longest distances, which cannot be compared.
    """
    runs = json.loads((RESULTS / f"retention-{name}.json").read_text(encoding="utf-8"))["variants"]["config"]["runs"]
    kinds = {(run["checkpoint"], run["points"][-1]["distance"]) for run in runs}
    if len(kinds) > 1:
        sys.exit(f"retention-{name}.json mixes weights or longest distances: {sorted(kinds)}")
    held: dict[tuple[int, int], dict[int, float]] = {}
    for run in runs:
        if run["facts_per_segment"] == facts_per_segment:
            seeds = held.setdefault((run["num_slots"], run["state_bytes"]), {})
            correct = run["num_facts"] * run["points"][-1]["accuracy"]
            seeds[run["seed"]] = max(correct, seeds.get(run["seed"], 0.0))
    return {size: [seeds[seed] for seed in sorted(seeds)] for size, seeds in held.items()}


if __name__ == "__main__":
    main()
