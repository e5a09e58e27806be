"""Speed and memory of replay, gradient checkpointing and full BPTT on the same rollout.

Speed: the methods take turns in one process, round after round; the ratio of a round to BPTT in the same round is
what counts (the machine may be shared). Memory: each method has a process of its own; growth is the peak of the
resident set over what the process held before the rollout. Setting: byte vocabulary, d 256, 4 heads, FFN 1024,
32 slots, float32, forward and backward without optimizer.

    python benchmarks/replay.py                       # table; JSON to benchmarks/results/replay.json
    python benchmarks/replay.py --batch_size 1 --num_timesteps 16
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, memory_mib
from sizes import half_and_half

from memformer import Memformer, Rollout, backpropagate

# Plain sequential BPTT reads out one timestep at a time; so does the first row of each method.
VARIANTS = [("bptt", 1), ("bptt", 8), ("checkpoint", 1), ("replay", 1), ("replay", 2), ("replay", 4), ("replay", 8)]


def main() -> None:
    """Measure, print the table and write JSON."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    if options.measure_memory is not None:
        method, readout_timesteps = options.measure_memory.split(":")
        print(json.dumps(measure_memory(options, method, int(readout_timesteps))))
        return
    seconds = measure_seconds(options)
    rows = []
    for variant in VARIANTS:
        ratios = [base / own for base, own in zip(seconds[VARIANTS[0]], seconds[variant], strict=True)]
        tokens = options.num_timesteps * options.batch_size * options.segment_length
        rows.append(
            {
                "method": variant[0],
                "readout_timesteps": variant[1],
                "tokens_per_second": tokens / statistics.median(seconds[variant]),
                "speed_ratio": statistics.median(ratios),
                "speed_ratio_low": min(ratios),
                "speed_ratio_high": max(ratios),
                "memory_growth_mib": run_memory_child(variant),
            }
        )
    for row in rows:
        row["memory_ratio"] = row["memory_growth_mib"] / rows[0]["memory_growth_mib"]
    print(format_table(rows))
    horizons = [measure_horizon(options, num_timesteps) for num_timesteps in options.horizons]
    print(format_horizons(horizons))
    result = {
        "setting": {key: value for key, value in vars(options).items() if key not in {"output", "measure_memory"}},
        "machine": describe_machine(options.threads),
        "rows": rows,
        "horizons": horizons,
    }
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Return the setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_timesteps", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--segment_length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4, help="Encoder layers, and decoder layers.")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--horizons", type=int, nargs="*", default=[4, 16, 64], help="Timesteps of replay, for memory.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="benchmarks/results/replay.json")
    parser.add_argument("--measure_memory", default=None, help="Internal: METHOD:READOUT_TIMESTEPS in this process.")
    return parser.parse_args()


def build(options: argparse.Namespace) -> tuple[Memformer, Rollout]:
    """Return the model and a rollout of random bytes."""
    torch.manual_seed(0)
    config = half_and_half(width=options.width, layers=2 * options.layers, segment_length=options.segment_length)
    model = Memformer(config).train()
    shape = (options.num_timesteps, options.batch_size, options.segment_length)
    return model, Rollout(inputs=torch.randint(0, 256, shape), targets=torch.randint(0, 256, shape))


def measure_seconds(options: argparse.Namespace) -> dict[tuple[str, int], list[float]]:
    """Return the seconds of every round for every variant; a first round warms up and is not counted."""
    model, rollout = build(options)
    seconds: dict[tuple[str, int], list[float]] = {variant: [] for variant in VARIANTS}
    for count in range(options.rounds + 1):
        for method, readout_timesteps in VARIANTS:
            model.zero_grad()
            started = time.perf_counter()
            backpropagate(model, rollout, method=method, readout_timesteps=readout_timesteps)
            if count:
                seconds[method, readout_timesteps].append(time.perf_counter() - started)
    return seconds


def measure_memory(options: argparse.Namespace, method: str, readout_timesteps: int) -> float:
    """Return by how many MiB the resident set grew at its peak."""
    model, rollout = build(options)
    first = Rollout(inputs=rollout.inputs[:1, :1, :8], targets=rollout.targets[:1, :1, :8])
    backpropagate(model, first, method=method)  # loads kernels and makes the gradients
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    before = memory_mib("VmRSS")
    backpropagate(model, rollout, method=method, readout_timesteps=readout_timesteps)
    return memory_mib("VmHWM") - before


def run_memory_child(variant: tuple[str, int], *further: str) -> float:
    """Measure a variant's memory in a process of its own, with this process's arguments and further ones."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure_memory", f"{variant[0]}:{variant[1]}", *further]
    # Freed tensors go back to the system at once: what is counted is what is held, not what the allocator keeps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(json.loads(done.stdout))


def measure_horizon(options: argparse.Namespace, num_timesteps: int) -> dict[str, float]:
    """Return what replay of so many timesteps holds, and what its memories and hidden states alone take."""
    model, _ = build(options)
    memory = model.initial_memory(options.batch_size)
    hidden_bytes = options.batch_size * options.segment_length * options.width * memory.element_size()
    return {
        "num_timesteps": num_timesteps,
        "memory_growth_mib": run_memory_child(("replay", 1), "--num_timesteps", str(num_timesteps)),
        "memories_and_hiddens_mib": num_timesteps * (memory.nbytes + hidden_bytes) / 2**20,
    }


def format_horizons(rows: list[dict[str, float]]) -> str:
    """Return a Markdown table."""
    lines = [
        "",
        "| replay over timesteps | memory growth MiB | memories and hidden states of them MiB |",
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
        "| method | timesteps read out together | tokens/s | speed (range) | memory growth MiB | memory |",
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
