"""Anomalies in sensors by surprisal: make a synthetic series, and compare the scores of its rows with its anomalies.

    python experiments/recipes/sensors.py make sensors
    python experiments/recipes/sensors.py report sensors --figure sensors.png

The series is synthetic, because the project has no measurements of real sensors. A machine has two sensors, read
7,000 times:
`temperature` is the sum of waves of 24 and 168 rows, a level that changes at random (on average every 200 rows), and
noise; `power` follows the temperature of 6 rows before, with noise of its own. `make` writes train.csv (5,000 rows),
validation.csv (1,000) and test.csv (1,000). The test alone has anomalies, listed in labels.txt: single spikes, a sensor
that stays at one value for 12 rows, and a power that no longer follows the temperature for 12 rows.

`report` reads validation.jsonl and test.jsonl, which `memformer score --json` wrote.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 5000, 1000, 1000
LAG = 6
NORMAL = "-"
# Kinds of anomalies in the test: first row, number of rows.
ANOMALIES = {"spike": [(90, 1), (350, 1), (610, 1), (880, 1)], "frozen": [(200, 12), (720, 12)],
             "decoupled": [(460, 12), (940, 12)]}  # fmt: skip


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("make", help="Write the series.")
    making.add_argument("folder", type=Path)
    making.add_argument("--seed", type=int, default=0)
    making.set_defaults(run=lambda options: make(options.folder, options.seed))
    reporting = commands.add_parser("report", help="Print which anomalies were found.")
    reporting.add_argument("folder", type=Path)
    reporting.add_argument("--quantile", type=float, default=0.99, help="Quantile of the validation rows.")
    reporting.add_argument("--figure", type=Path, default=None, help="PNG file for the test rows and their scores.")
    reporting.set_defaults(run=lambda options: report(options.folder, options.quantile, figure=options.figure))
    options = parser.parse_args()
    options.run(options)


def make(folder: Path, seed: int) -> None:
    """Write the three parts of the series, and the labels of the test rows."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    values = series(NUM_TRAIN + NUM_VALIDATION + NUM_TEST, generator)
    train, validation, test = np.split(values, [NUM_TRAIN, NUM_TRAIN + NUM_VALIDATION])
    labels = inject(test, generator)
    for name, rows in (("train", train), ("validation", validation), ("test", test)):
        np.savetxt(folder / f"{name}.csv", rows, fmt="%.3f", delimiter=",", header="temperature,power", comments="")
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")


def series(num_rows: int, generator: np.random.Generator) -> np.ndarray:
    """Return temperature and power, (rows, 2)."""
    time = np.arange(num_rows + LAG)
    changes = np.where(generator.random(time.size) < 1 / 200, generator.normal(0, 4, time.size), 0)
    waves = 8 * np.sin(2 * np.pi * time / 24) + 3 * np.sin(2 * np.pi * time / 168)
    temperature = 40 + waves + levels(changes) + generator.normal(0, 0.3, time.size)
    power = 100 - 1.5 * (temperature[:-LAG] - 40) + generator.normal(0, 0.5, num_rows)
    return np.stack([temperature[LAG:], power], axis=1)


def levels(changes: np.ndarray) -> np.ndarray:
    """Return a level for each row: the sum of the changes so far, which slowly returns to 0."""
    level, found = 0.0, np.empty_like(changes)
    for row, change in enumerate(changes):
        level = 0.998 * level + change
        found[row] = level
    return found


def inject(test: np.ndarray, generator: np.random.Generator) -> list[str]:
    """Change the anomalous rows in place; return the label of each row."""
    labels = [NORMAL] * len(test)
    for kind, places in ANOMALIES.items():
        for start, count in places:
            rows = slice(start, start + count)
            if kind == "spike":
                test[rows, 0] += generator.choice([-1, 1]) * 6
            elif kind == "frozen":
                test[rows] = test[start]
            else:
                test[rows, 1] = test[rows, 1][::-1] + 8
            labels[rows] = [kind] * count
    return labels


def report(folder: Path, quantile: float, *, figure: Path | None) -> None:
    """Print precision, recall of rows, and how many anomalies have a row above the threshold."""
    labels = np.array((folder / "labels.txt").read_text(encoding="utf-8").splitlines())
    scores = row_scores(folder / "test.jsonl")
    threshold = float(np.quantile(row_scores(folder / "validation.jsonl"), quantile))
    is_alert, is_anomalous = scores > threshold, labels != NORMAL
    hits = int((is_alert & is_anomalous).sum())
    print(f"threshold {threshold:.3f} bits/value, the {quantile:.2f} quantile of the validation rows")
    print(f"{is_alert.sum()} alerts in {len(labels)} rows, {is_anomalous.sum()} of them anomalous")
    print(f"precision {hits / max(is_alert.sum(), 1):.3f}, recall {hits / is_anomalous.sum():.3f} of rows")
    for kind, places in ANOMALIES.items():
        found = sum(is_alert[start : start + count].any() for start, count in places)
        means = scores[labels == kind].mean()
        print(f"{kind}: {found} of {len(places)} found; mean {means:.3f} bits/value")
    print(f"normal rows: mean {scores[~is_anomalous].mean():.3f} bits/value")
    if figure is not None:
        draw(np.loadtxt(folder / "test.csv", delimiter=",", skiprows=1), scores, is_anomalous, threshold, figure)


def row_scores(file: Path) -> np.ndarray:
    """Return the bits per value of every row that `memformer score --json` printed; the line of names has none."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return np.array([record["bits_per_value"] for record in records if record["kind"] == "line" and record["values"]])


def draw(values: np.ndarray, scores: np.ndarray, is_anomalous: np.ndarray, threshold: float, file: Path) -> None:
    """Draw the two sensors of the test and the score of each row; anomalous rows are red."""
    canvas = Figure(figsize=(8, 5), layout="constrained")
    panels = canvas.subplots(3, 1, sharex=True)
    rows = np.arange(len(scores))
    for axes, line, name in zip(panels, (*values.T, scores), ("temperature", "power", "bits/value"), strict=True):
        axes.plot(rows, line, linewidth=0.7, color="C0")
        axes.plot(rows[is_anomalous], line[is_anomalous], "C3.", markersize=3)
        axes.set_ylabel(name)
    panels[2].axhline(threshold, color="0.5", linewidth=0.8)
    panels[2].set_xlabel("row of the test")
    canvas.savefig(file, dpi=80)


if __name__ == "__main__":
    main()
