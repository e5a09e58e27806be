"""Compare the speed and memory of replay, gradient checkpointing and full BPTT on the same rollout.

Speed: the methods alternate in one process, and ratios compare a method with BPTT in the same round, because the
machine may be shared. Memory: each method runs in a separate process; growth is the peak of the resident set minus its
size before the rollout. Setting: byte vocabulary, d 256, 4 heads, FFN 1024, 32 slots, float32, forward and backward
without optimizer.

    python benchmarks/replay.py                       # table; JSON to benchmarks/results/replay.json
    python benchmarks/replay.py --batch_size 1 --num_timesteps 16
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from machine import describe_machine, positive
from sizes import half_and_half
from turns import spread

from memformer.reproduction.measure import MethodSpec, Setting, measure_growth, measure_seconds
from memformer.utils.files import write_json

# Plain sequential BPTT reads out one timestep at a time, and so does the first row of each method.
METHODS = [
    MethodSpec("bptt", 1),
    MethodSpec("bptt", 8),
    MethodSpec("checkpoint", 1),
    *(MethodSpec("replay", together) for together in (1, 2, 4, 8)),
]


def main() -> None:
    """Measure, print the table and write JSON."""
    options = parse_arguments()
    setting = setting_of(options, num_timesteps=options.num_timesteps)
    seconds = measure_seconds(setting, METHODS, rounds=options.rounds)
    growth = {method: measure_growth(setting, method) / 2**20 for method in METHODS}
    tokens = options.num_timesteps * options.batch_size * options.segment_length
    rows = []
    for method in METHODS:
        ratios = spread([base / own for base, own in zip(seconds[METHODS[0]], seconds[method], strict=True)])
        rows.append(
            {
                **method._asdict(),
                "tokens_per_second": tokens / statistics.median(seconds[method]),
                "speed_ratio": ratios["median"],
                "speed_ratio_low": ratios["low"],
                "speed_ratio_high": ratios["high"],
                "memory_growth_mib": growth[method],
                "memory_ratio": growth[method] / growth[METHODS[0]],
            }
        )
    print(format_table(rows))
    horizons = [measure_horizon(options, num_timesteps) for num_timesteps in options.horizons]
    print(format_horizons(horizons))
    result = {
        "setting": {key: value for key, value in vars(options).items() if key != "output"},
        "machine": describe_machine(options.threads),
        "rows": rows,
        "horizons": horizons,
    }
    write_json(Path(options.output), result)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_timesteps", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--segment_length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4, help="Number of encoder layers and of decoder layers.")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument(
        "--horizons", type=int, nargs="*", default=[4, 16, 64], help="Rollout lengths for replay's memory growth."
    )
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", default="benchmarks/results/replay.json")
    return parser.parse_args()


def setting_of(options: argparse.Namespace, *, num_timesteps: int) -> Setting:
    """Return the model and the rollout (random bytes) to measure."""
    config = half_and_half(width=options.width, layers=2 * options.layers, segment_length=options.segment_length)
    return Setting(
        model_type=config.model_type,
        model=config.to_dict(),
        batch_size=options.batch_size,
        num_timesteps=num_timesteps,
        device="cpu",
        threads=options.threads,
    )


def measure_horizon(options: argparse.Namespace, num_timesteps: int) -> dict[str, float]:
    """Return replay's memory growth over `num_timesteps`, and the part for memories and hidden states."""
    setting = setting_of(options, num_timesteps=num_timesteps)
    vectors = options.batch_size * (options.segment_length + setting.model["num_slots"])
    return {
        "num_timesteps": num_timesteps,
        "memory_growth_mib": measure_growth(setting, MethodSpec("replay")) / 2**20,
        "memories_and_hiddens_mib": num_timesteps * vectors * options.width * 4 / 2**20,  # float32
    }


def format_horizons(rows: list[dict[str, float]]) -> str:
    """Return a Markdown table."""
    lines = [
        "",
        "| timesteps of replay | memory growth, MiB | memories and hidden states, MiB |",
        "|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['num_timesteps']} | {row['memory_growth_mib']:,.0f} | {row['memories_and_hiddens_mib']:,.1f} |"
        )
    return "\n".join(lines)


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table."""
    lines = [
        "| method | timesteps read out together | tokens/s | speed relative to BPTT (range) | memory growth, MiB "
        "| memory growth relative to BPTT |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['readout_timesteps']} | {row['tokens_per_second']:,.0f} "
            f"| x{row['speed_ratio']:.2f} ({row['speed_ratio_low']:.2f}-{row['speed_ratio_high']:.2f}) "
            f"| {row['memory_growth_mib']:,.0f} | x{row['memory_ratio']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
