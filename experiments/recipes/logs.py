"""Anomalies in logs by surprisal: prepare logs of four systems, and compare the scores of lines with their labels.

    python experiments/recipes/logs.py prepare data/logs logs
    python experiments/recipes/logs.py report logs/bgl logs/zookeeper logs/hdfs --figure logs.png

`prepare` writes a folder for each system with train.log, validation.log, test.log and labels.txt, which has one label
for each line of test.log. The first 40 % of the lines are for training, the next 10 % for validation, the rest for the
test, in their order. BGL has labels of its own, a column that is removed before anything reads the lines. In the tests
of Zookeeper and HDFS, lines of other systems are injected.

`report` reads validation.jsonl and test.jsonl, which `memformer score --json` wrote. A line is an alert if its bits per
byte exceed a quantile of those of the validation lines, which need no labels.
"""

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from memformer.data.content import open_text

NORMAL = "-"
INJECTED = "injected"
SYSTEMS = {"bgl": (), "zookeeper": ("BGL", "Spark"), "hdfs": ("BGL", "Spark")}
NUM_INJECTED = 50


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    preparing = commands.add_parser("prepare", help="Write the lines of every system, and their labels.")
    preparing.add_argument("data", type=Path, help="Folder of a file for each of BGL, HDFS, Spark, Zookeeper.")
    preparing.add_argument("output", type=Path, help="Folder to write to.")
    preparing.add_argument("--seed", type=int, default=0, help="Seed of the injected lines and of their positions.")
    preparing.set_defaults(run=lambda options: prepare(options.data, options.output, seed=options.seed))
    reporting = commands.add_parser("report", help="Print precision and recall.")
    reporting.add_argument("folders", type=Path, nargs="+", help="Folders that `prepare` wrote.")
    reporting.add_argument("--quantile", type=float, default=0.99, help="Quantile of the validation lines.")
    reporting.add_argument("--figure", type=Path, default=None, help="PNG file for the scores of the test lines.")
    reporting.set_defaults(run=lambda options: report(options.folders, options.quantile, figure=options.figure))
    options = parser.parse_args()
    options.run(options)


def prepare(data: Path, output: Path, *, seed: int) -> None:
    """Write the lines and labels of every system."""
    for system, others in SYSTEMS.items():
        labels, lines = read(data, system)
        train, validation = len(lines) * 4 // 10, len(lines) * 5 // 10
        tested = list(zip(lines[validation:], labels[validation:], strict=True))
        if others:
            tested = inject(tested, [line for other in others for line in read(data, other)[1]], seed)
        folder = output / system
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "train.log", lines[:train])
        write(folder / "validation.log", lines[train:validation])
        write(folder / "test.log", [line for line, _ in tested])
        write(folder / "labels.txt", [label for _, label in tested])
        wrong = Counter(label for _, label in tested if label != NORMAL)
        print(f"{folder}: {train} lines, {len(tested)} to test, {wrong.total()} of them anomalous")


def read(data: Path, system: str) -> tuple[list[str], list[str]]:
    """Return labels and lines of the log of a system, possibly compressed, whose name begins with the system's.

    BGL's first column is the label; the other systems have none.
    """
    files = [file for file in data.iterdir() if file.name.lower().startswith(system.lower())]
    if len(files) != 1:
        sys.exit(f"logs.py: error: {len(files)} files in {data} begin with {system}; there must be one")
    with open_text(files[0]) as stream:
        lines = [line.decode().rstrip("\r\n") for line in stream]
    if system.lower() != "bgl":
        return [NORMAL] * len(lines), lines
    columns = [line.partition(" ") for line in lines]
    return [label for label, _, _ in columns], [line for _, _, line in columns]


def inject(lines: list[tuple[str, str]], foreign: list[str], seed: int) -> list[tuple[str, str]]:
    """Return the lines with lines of other systems at random positions."""
    generator = random.Random(seed)
    result = list(lines)
    if len(foreign) < NUM_INJECTED:
        sys.exit(f"logs.py: error: the other systems have {len(foreign)} lines; {NUM_INJECTED} are injected")
    for line in generator.sample(foreign, NUM_INJECTED):
        result.insert(generator.randrange(len(result) + 1), (line, INJECTED))
    return result


def write(file: Path, lines: list[str]) -> None:
    """Write lines to a file."""
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def report(folders: list[Path], quantile: float, *, figure: Path | None) -> None:
    """Print how well the alerts agree with the labels, as a table with one row for each system."""
    results = {folder.name: measure(folder, quantile) for folder in folders}
    columns = ("threshold", "lines", "anomalous", "alerts", "precision", "recall", "average precision", "by chance")
    print("| system | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, found in results.items():
        cells = [found[column] for column in columns]
        print(
            f"| {name} | "
            + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells)
            + " |"
        )
    for name, found in results.items():
        kinds = ", ".join(f"{kind} {hits} of {total}" for kind, (hits, total) in found["kinds"].items())
        print(f"{name}: found {kinds}")
    if figure is not None:
        draw(results, figure)


def measure(folder: Path, quantile: float) -> dict[str, Any]:
    """Return the threshold, and precision, recall and average precision on the test lines."""
    labels = np.array((folder / "labels.txt").read_text(encoding="utf-8").splitlines())
    scores = line_scores(folder / "test.jsonl")
    threshold = float(np.quantile(line_scores(folder / "validation.jsonl"), quantile))
    is_anomalous, is_alert = labels != NORMAL, scores > threshold
    hits = int((is_alert & is_anomalous).sum())
    totals = Counter(labels[is_anomalous].tolist())
    found = Counter(labels[is_anomalous & is_alert].tolist())
    return {
        "threshold": threshold,
        "lines": len(labels),
        "anomalous": int(is_anomalous.sum()),
        "alerts": int(is_alert.sum()),
        "precision": hits / max(int(is_alert.sum()), 1),
        "recall": hits / max(int(is_anomalous.sum()), 1),
        "average precision": average_precision(scores, is_anomalous),
        "by chance": float(is_anomalous.mean()),
        "kinds": {kind: (found[kind], total) for kind, total in totals.most_common()},
        "scores": scores,
        "is_anomalous": is_anomalous,
    }


def line_scores(file: Path) -> np.ndarray:
    """Return the bits per byte of every line that `memformer score --json` printed."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return np.array([record["bits_per_byte"] for record in records if record["kind"] == "line"])


def average_precision(scores: np.ndarray, is_anomalous: np.ndarray) -> float:
    """Return the area under the precision-recall curve as a sum over its steps; equal scores are one step."""
    order = np.argsort(-scores, kind="stable")
    hits = is_anomalous[order].cumsum()
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # the last of each group of equal scores
    precision, recall = hits[ends] / (ends + 1), hits[ends] / max(hits[-1], 1)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def draw(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Draw the score of every test line, one panel for each system."""
    canvas = Figure(figsize=(8, 2.2 * len(results)), layout="constrained")
    for axes, (name, found) in zip(canvas.subplots(len(results), 1, squeeze=False)[:, 0], results.items(), strict=True):
        numbers = np.arange(1, len(found["scores"]) + 1)
        for chosen, label, style in ((False, "normal", "C0."), (True, "anomalous", "C3x")):
            mask = found["is_anomalous"] == chosen
            axes.plot(numbers[mask], found["scores"][mask], style, markersize=3, label=label)
        axes.axhline(found["threshold"], color="0.5", linewidth=0.8, label="threshold")
        axes.set(title=name, ylabel="bits/byte")
    axes.set_xlabel("line of the test")
    axes.legend(loc="upper right", fontsize=8)
    canvas.savefig(file, dpi=80)


if __name__ == "__main__":
    main()
