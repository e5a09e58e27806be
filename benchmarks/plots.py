"""Plot the benchmark results in benchmarks/results as speed.png, generation.png and replay.png.

python benchmarks/plots.py
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Draw every result file that exists."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    mpl.use("agg")
    for name, draw in (("speed", draw_speed), ("generation", draw_generation), ("replay", draw_replay)):
        file = RESULTS / f"{name}.json"
        if file.exists():
            figure = plt.figure(figsize=(9, 4), layout="constrained")
            draw(json.loads(file.read_text(encoding="utf-8")), *figure.subplots(1, 2))
            figure.savefig(file.with_suffix(".png"), dpi=110)
            plt.close(figure)


def draw_speed(result: dict[str, Any], training: Axes, evaluation: Axes) -> None:
    """Draw tokens per second of every model, with the range over the rounds."""
    rows = [row for row in result["rows"] if "train" in row][::-1]
    for axes, what, title in ((training, "train", "training"), (evaluation, "evaluate", "evaluation")):
        speeds = [row[what]["tokens_per_second"] for row in rows]
        medians = [speed["median"] for speed in speeds]
        below = [speed["median"] - speed["low"] for speed in speeds]
        above = [speed["high"] - speed["median"] for speed in speeds]
        colors = ["tab:blue" if row["name"].startswith("memformer") else "tab:gray" for row in rows]
        axes.barh([row["name"] for row in rows], medians, xerr=[below, above], color=colors)
        axes.set_xlabel(f"{title}, tokens per second")
    evaluation.set_yticklabels([])


def draw_generation(result: dict[str, Any], time: Axes, state: Axes) -> None:
    """Draw milliseconds per token and the size of the state over the context."""
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["name"] == name]
        contexts = [row["context"] for row in rows]
        style = "o-" if name.startswith("memformer") else "s--"
        time.plot(contexts, [row["ms_per_token"]["median"] for row in rows], style, label=name)
        state.plot(contexts, [row["state_bytes"] / 1024 for row in rows], style)
    for axes, title in ((time, "milliseconds per token"), (state, "state, KiB")):
        axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel=title)
    time.legend(fontsize="small")


def draw_replay(result: dict[str, Any], memory: Axes, horizon: Axes) -> None:
    """Draw the speed of every method over its memory growth, and replay's memory growth over the horizon."""
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["method"] == method]
        growth = [row["memory_growth_mib"] for row in rows]
        memory.plot(growth, [row["tokens_per_second"] for row in rows], "o-", label=method)
        for row in rows:
            memory.annotate(row["readout_timesteps"], (row["memory_growth_mib"], row["tokens_per_second"]))
    memory.set(xlabel="memory growth, MiB", ylabel="training, tokens per second", xlim=(0, None))
    memory.set_ylim(0, 1.1 * memory.get_ylim()[1])
    memory.legend(title="number: timesteps read out together", fontsize="small")
    rows = result["horizons"]
    horizon.plot([row["num_timesteps"] for row in rows], [row["memory_growth_mib"] for row in rows], "o-")
    horizon.set(xlabel="timesteps per rollout", ylabel="replay's memory growth, MiB", ylim=(0, None))


if __name__ == "__main__":
    main()
