"""Compare the speed of replay, BPTT and sessions in this checkout with that in another checkout, on one CPU.

    git worktree add ../before COMMIT
    python benchmarks/checkouts.py ../before/src                # table; JSON only with --output
    git worktree remove ../before

Each checkout's package runs in processes of its own. They take turns, and a ratio compares the same round, because the
machine may be shared. The order changes from round to round: whatever disturbs one turn disturbs both checkouts alike.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from machine import describe_machine, positive
from turns import Contender, in_words, ratios, speed, spread

from memformer.utils.files import write_json

HERE = Path(__file__).resolve().parents[1] / "src"
METHODS: dict[str, dict[str, Any]] = {
    "replay": {"method": "replay", "readout_timesteps": 2},
    "replay, bfloat16": {"method": "replay", "readout_timesteps": 2, "precision": "bfloat16"},
    "bptt": {"method": "bptt", "readout_timesteps": 8},
}
# Sessions of one row; the rest is not used.
_SESSION = {"batch_size": 1, "readout_timesteps": 1}
SESSIONS: dict[str, dict[str, Any]] = {
    f"{work}{', compiled' if compiled else ''}": {**_SESSION, **options, "compiled": compiled}
    for work, options in {"decoding": {}, "reading 100 tokens a call": {"tokens_per_call": 100}}.items()
    for compiled in (False, True)
}
Turns = list[dict[str, Any]]


def main() -> None:
    """Measure, print the table and write JSON if a file is given."""
    options = parse_arguments()
    sizes = ("batch_size", "segment_length", "num_segments", "width", "heads", "layers", "num_slots", "threads")
    setting = {name: getattr(options, name) for name in sizes} | {"precision": "float32"}
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for name in options.methods:
        model, works = ("session", {name: "evaluate"}) if name in SESSIONS else ("memformer", {name: "train"})
        if options.evaluation and name == "replay":
            works["evaluation"] = "evaluate"
        changed = {**setting, **(METHODS | SESSIONS)[name]}
        pair = [start(model, changed, source) for source in (HERE, options.other)]
        for label, what in works.items():
            own, other = alternate(pair, what, rounds=options.rounds)
            rows[label] = {
                "here": spread(speed(own)),
                "other": spread(speed(other)),
                "ratio": ratios(own, other),
            }
        for contender in pair:
            contender.close()
    print(format_table(rows))
    if options.output:
        result = {
            "setting": setting | {"rounds": options.rounds},
            "machine": describe_machine(options.threads),
            "rows": rows,
        }
        write_json(Path(options.output), result)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the src folder of the other checkout")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *SESSIONS], default=list(METHODS))
    parser.add_argument("--evaluation", action="store_true", help="compare evaluation too; not for old checkouts")
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--segment_length", type=int, default=128)
    parser.add_argument("--num_segments", type=int, default=8, help="timesteps of a rollout")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8, help="half of them encode")
    parser.add_argument("--num_slots", type=int, default=32)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    if not (options.other / "memformer" / "__init__.py").is_file():
        parser.error(f"{options.other} has no package memformer; name the src folder of a checkout")
    return options


def start(model: str, setting: dict[str, Any], source: Path) -> Contender:
    """Return a process with the model of the package in `source`.

    Raises:
        RuntimeError: The process has imported another package.
    """
    contender = Contender(sys.executable, "contenders.py", model, setting, source=source)
    found = Path(contender.facts["memformer"])
    if not found.is_relative_to(source.resolve()):
        raise RuntimeError(f"the process imported {found}, which is not in {source}")
    return contender


def alternate(pair: list[Contender], what: str, *, rounds: int) -> list[Turns]:
    """Return the measurements of both, one per round, after a round that does not count."""
    measured: list[Turns] = [[], []]
    for count in range(rounds + 1):
        for index in (0, 1) if count % 2 else (1, 0):
            turn = pair[index].work(what)
            if count:
                measured[index].append(turn)
    return measured


def format_table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return a Markdown table."""
    lines = ["| work | other, tokens/s | here, tokens/s | speed ratio (range) |", "|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['other']['median']:,.0f} | {row['here']['median']:,.0f} | x{in_words(row['ratio'])} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
