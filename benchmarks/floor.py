"""Measure the time of each operation in training and evaluation, and its lower bound (the floor).

    python benchmarks/floor.py          # table; JSON to benchmarks/results/floor.json

The floor of matrix products is their operations at the rate of this processor's fastest matrix product, measured here.
The floor of everything else is the bytes read and written at the rate of a memory copy; it is only a guide, because
data that fit into the caches can be faster. All operations count, including those that are computed twice.
"""

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import MatrixProduct, Memformer
from machine import describe_machine, positive
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from memformer.utils.files import write_json

LINEAR, ATTENTION = "linear layers", "attention"
PARTS = {
    LINEAR: ("_linear_pointwise", "mm", "addmm"),
    ATTENTION: ("_scaled_dot_product_flash_attention_for_cpu", "bmm", "softmax"),
    "layer norm": ("layer_norm",),
    "GELU": ("gelu",),
    "rotary positions": ("roll", "addcmul"),
    "copies": ("copy_", "clone"),
}
REST = "other"


def main() -> None:
    """Measure, print the tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--readout_timesteps", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--output", default="benchmarks/results/floor.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = {
        "batch_size": options.batch_size,
        "segment_length": 128,
        "num_segments": 8,
        "width": 256,
        "heads": 4,
        "layers": 8,
        "num_slots": 32,
        "precision": "float32",
        "threads": options.threads,
        "readout_timesteps": options.readout_timesteps,
        "method": "replay",
    }
    ours = Memformer(setting)
    rates = {"flops_per_second": MatrixProduct(setting).peak(), "bytes_per_second": copy_rate()}

    def train() -> None:
        ours.model.zero_grad(set_to_none=True)
        ours.train()

    works = {"train": train, "evaluate": torch.no_grad()(ours.evaluate)}
    results = {what: measure(work, rates, options.rounds) for what, work in works.items()}
    for what, result in results.items():
        print(f"{what}: {1e3 * result['seconds']:.0f} ms, floor {1e3 * result['floor_seconds']:.0f} ms")
        print(format_table(result) + "\n")
    gflops, gigabytes = (rate / 1e9 for rate in rates.values())
    print(f"matrix products {gflops:.0f} GFLOP/s, copy {gigabytes:.1f} GB/s")
    record = {"setting": setting, "machine": describe_machine(options.threads), "rates": rates, "results": results}
    write_json(Path(options.output), record)


def copy_rate() -> float:
    """Return the bytes read and written per second by a copy too large for the caches."""
    source = torch.zeros(1 << 26)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(seconds)


def measure(work: Callable[[], Any], rates: dict[str, float], rounds: int) -> dict[str, Any]:
    """Return the time, operations, bytes and floor of each part of the work."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        for _ in range(rounds):
            work()
        total = (time.perf_counter() - started) / rounds
    seconds: Counter[str] = Counter()
    for event in profiler.key_averages():
        seconds[part_of(event.key)] += event.self_cpu_time_total / 1e6 / rounds
    with _ByteCounter() as byte_counter:
        work()
    flops = count_flops(work)
    parts = []
    for name in (*PARTS, REST):
        moved = byte_counter.bytes[name]
        floor = flops[name] / rates["flops_per_second"] if name in flops else moved / rates["bytes_per_second"]
        parts.append(
            {
                "name": name,
                "seconds": seconds[name],
                "flops": flops.get(name, 0),
                "bytes": moved,
                "floor_seconds": floor,
            }
        )
    return {"seconds": total, "floor_seconds": sum(part["floor_seconds"] for part in parts), "parts": parts}


def part_of(operator: str) -> str:
    """Return the part to which an operator (such as aten::mm) belongs."""
    name = operator.rpartition("::")[2]
    for part, names in PARTS.items():
        if name in names or any(len(each) > 5 and each in name for each in names):
            return part
    return REST


def count_flops(work: Callable[[], Any]) -> dict[str, int]:
    """Return the operations of linear layers and attention, counted through torch's own matrix products."""
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work()
    finally:
        torch.backends.mkldnn.enabled = enabled
    by_part: dict[str, int] = defaultdict(int)
    for operator, flops in counter.get_flop_counts()["Global"].items():
        by_part[part_of(str(operator).removeprefix("aten."))] += flops
    return dict(by_part)


class _ByteCounter(TorchDispatchMode):
    """Sums the bytes that operators read and write, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.bytes[part_of(func._schema.name)] += sum(tensor.nbytes for tensor in tensors)
        return result


def format_table(result: dict[str, Any]) -> str:
    """Return a Markdown table."""
    lines = [
        "| operation | time, ms | share of time | GFLOP | GB moved | floor, ms | floor / time |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in result["parts"]:
        ratio = part["floor_seconds"] / part["seconds"] if part["seconds"] else 0.0
        lines.append(
            f"| {part['name']} | {1e3 * part['seconds']:.0f} | {part['seconds'] / result['seconds']:.0%} "
            f"| {part['flops'] / 1e9:.1f} | {part['bytes'] / 1e9:.2f} | {1e3 * part['floor_seconds']:.0f} "
            f"| {ratio:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
