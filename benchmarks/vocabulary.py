"""Compare output layers for a word-level vocabulary: one softmax, one softmax in parts, and adaptive softmax.

    python benchmarks/vocabulary.py          # table; JSON to benchmarks/results/vocabulary.json

The vocabulary has the size of WikiText-103's, and the words are drawn by Zipf's law. The work is forward and backward
by replay, without optimizer. The variants alternate in one process; memory is measured in a separate process for each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, memory_mib, positive
from sizes import half_and_half
from turns import in_words, spread

from memformer import Memformer, Rollout, backpropagate
from memformer.nn import vocabulary
from memformer.utils.files import write_json

ADAPTIVE_CUTOFFS = (20_000, 60_000)
# Largest number of logits that each variant holds at once.
VARIANTS = {"one softmax": 1 << 62, "one softmax, in parts": 1 << 26, "adaptive": 1 << 62}


def main() -> None:
    """Measure, print the table and write JSON."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    if options.measure_memory is not None:
        print(json.dumps(measure_memory(options)))
        return
    work = {name: build(options, name) for name in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for count in range(options.rounds + 1):
        for name, (model, rollout) in work.items():
            model.zero_grad()
            started = time.perf_counter()
            run(name, model, rollout)
            if count:
                seconds[name].append(time.perf_counter() - started)
    tokens = options.num_timesteps * options.batch_size * options.segment_length
    rows = [
        {
            "name": name,
            "cutoffs": list(work[name][0].config.adaptive_cutoffs),
            "parameters": work[name][0].num_parameters,
            "tokens_per_second": tokens / statistics.median(seconds[name]),
            "ratio": spread([full / own for full, own in zip(seconds["one softmax"], seconds[name], strict=True)]),
            "peak_memory_mib": run_memory_child(name),
        }
        for name in VARIANTS
    ]
    print(format_table(rows))
    setting = {key: value for key, value in vars(options).items() if key not in {"output", "measure_memory"}}
    result = {"setting": setting, "machine": describe_machine(options.threads), "rows": rows}
    write_json(Path(options.output), result)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=267_735)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4, help="Number of encoder layers and of decoder layers.")
    parser.add_argument("--num_timesteps", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--segment_length", type=int, default=64)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", default="benchmarks/results/vocabulary.json")
    parser.add_argument("--measure_memory", default=None, help="Internal: the variant to measure in this process.")
    return parser.parse_args()


def build(options: argparse.Namespace, name: str) -> tuple[Memformer, Rollout]:
    """Return a model, and a rollout of words drawn by Zipf's law."""
    torch.manual_seed(0)
    config = half_and_half(
        width=options.width,
        layers=2 * options.layers,
        segment_length=options.segment_length,
        vocab_size=options.vocab_size,
        adaptive_cutoffs=ADAPTIVE_CUTOFFS if name == "adaptive" else (),
    )
    frequency = 1 / torch.arange(1, options.vocab_size + 1)
    shape = options.num_timesteps, options.batch_size, options.segment_length
    words = torch.multinomial(frequency, 2 * shape[0] * shape[1] * shape[2], replacement=True).view(2, *shape)
    return Memformer(config).train(), Rollout(inputs=words[0], targets=words[1])


def run(name: str, model: Memformer, rollout: Rollout) -> None:
    """Back-propagate through the rollout, with all timesteps read out together."""
    vocabulary._MOST_LOGITS = VARIANTS[name]
    backpropagate(model, rollout, readout_timesteps=rollout.num_timesteps)


def measure_memory(options: argparse.Namespace) -> float:
    """Return the peak of the resident set in MiB: weights, gradients and activations of a rollout."""
    model, rollout = build(options, options.measure_memory)
    run(options.measure_memory, model, rollout)
    return memory_mib("VmHWM")


def run_memory_child(name: str) -> float:
    """Measure a variant's memory in a separate process, with this process's arguments."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure_memory", name]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(json.loads(done.stdout))


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table."""
    lines = [
        "| softmax | parameters, M | tokens/s | speed ratio to one softmax | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['parameters'] / 1e6:.1f} | {row['tokens_per_second']:,.0f} "
            f"| x{in_words(row['ratio'], '.1f')} | {row['peak_memory_mib']:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
