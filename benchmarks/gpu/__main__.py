"""Everything that needs a GPU, in one command for a machine with one GPU and no network (`make cuda`).

Each part writes `gpu-PART.json` (`gpu-PART-smoke.json`) after every measurement and goes on from it when the command is
run again on the same machine, so a part may be interrupted at any time. Parts:

    laws      the engine's gradients equal back-propagation through time in float64; resuming is exact
    speed     training: tokens/s, share of the fastest matrix product, device memory; eager, engine, compiled, BPTT
    figure5   Figure 5 of the paper at its size: operations by length, device memory by memory size
    decoding  milliseconds per token generated and tokens/s read, by the length of what was read before
    attention the backends of scaled_dot_product_attention at the sizes of a timestep
    kernels   time of each recorded piece by kind of kernel
    peers     training speed of Transformer-XL and, if `transformers` is installed, of GPT-2 on the same tokens
    floor     operations, bytes, kernels and launches that one update needs at least; computed, not measured
    table1    the next slice of Table 1's runs at the paper's scale, with the time that is left

The exit status is 1 if a law does not hold or a measurement failed.

    python -m benchmarks.gpu --output runs/gpu --data FOLDER_OF_DATA_SETS --minutes 8
    python -m benchmarks.gpu --smoke --output FOLDER       # tiny sizes; runs on a CPU too
"""

import argparse
import gc
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.attention import attention
from benchmarks.gpu.decoding import decoding
from benchmarks.gpu.device import synchronize
from benchmarks.gpu.figure5 import figure5
from benchmarks.gpu.floor import floor
from benchmarks.gpu.kernels import kernels
from benchmarks.gpu.laws import laws
from benchmarks.gpu.speed import peers, speed
from benchmarks.gpu.table1 import table1
from memformer.utils.files import write_json

Row = dict[str, Any]
PARTS: dict[str, Callable[["Options"], Iterator[tuple[str, Callable[[], Row]]]]] = {
    "laws": laws,
    "speed": speed,
    "figure5": figure5,
    "decoding": decoding,
    "attention": attention,
    "kernels": kernels,
    "peers": peers,
    "floor": floor,
    "table1": table1,
}
# A row with one of these keys is measured again by the next call.
AGAIN = ("missing", "unfinished")


class Options(argparse.Namespace):
    """The command's options."""

    output: Path
    data: Path
    minutes: float
    parts: list[str]
    only: str
    again: bool
    smoke: bool
    deadline: float  # set by `main`, in seconds of the monotonic clock


def main() -> int:
    """Run the parts and write their results; return the exit status."""
    options = parse_arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    options.deadline = time.monotonic() + 60 * options.minutes
    are_sound = [run_part(part, options) for part in options.parts]
    return 0 if all(are_sound) else 1


def run_part(part: str, options: Options) -> bool:
    """Run the measurements of a part that its file does not have yet, until the deadline.

    Returns:
        Whether none of its measurements has failed and every law that was checked holds.

    Raises:
        RuntimeError: The device can no longer be used by this process.
        SystemExit: The file has measurements of another card or another torch.
    """
    file = options.output / f"gpu-{part}{'-smoke' if options.smoke else ''}.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"machine": describe(), "rows": {}}
    if result["machine"] != describe():
        sys.exit(f"{file} was measured with {result['machine']}; this is {describe()}: give another --output")
    for name, measure in PARTS[part](options):
        known = result["rows"].get(name)
        is_done = known is not None and not any(key in known for key in AGAIN)
        if is_done and options.again:
            is_done = is_sound(known)
        if is_done or not re.search(options.only, name):
            continue
        if time.monotonic() > options.deadline:
            print(f"{part}: no time is left for {name}", flush=True)
            break
        started = time.monotonic()
        torch.set_float32_matmul_precision("highest")  # measurements that use TF32 say so themselves
        try:
            row = measure()
        except torch.cuda.OutOfMemoryError as error:
            row = {"failed": str(error).splitlines()[0]}
        except Exception as error:  # one failure must not cost the other measurements
            row = {"failed": f"{type(error).__name__}: {error}"[:500], "traceback": traceback.format_exc()[-3000:]}
        row["seconds_taken"] = round(time.monotonic() - started, 1)
        result["rows"][name] = row
        print(f"{part}: {name}: {json.dumps(row)}", flush=True)
        write_json(file, result)
        gc.collect()  # an engine and its pieces refer to each other
        if torch.cuda.is_available():
            synchronize()  # after some errors a process cannot use the device any more, and another one must go on
            torch.cuda.empty_cache()
    return all(is_sound(row) for row in result["rows"].values())


def is_sound(row: Row) -> bool:
    """Return whether a measurement has not failed, and a law holds."""
    return row.get("holds", True) and "failed" not in row


def describe() -> dict[str, str]:
    """Return the card, driver and versions."""
    found = {"torch": torch.__version__, "device": "cpu"}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    return found


def parse_arguments() -> Options:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with mnist/, for table1")
    parser.add_argument("--minutes", type=float, default=8, help="no measurement is begun after this time")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--only", default="", help="run only measurements whose name matches this pattern")
    parser.add_argument("--again", action="store_true", help="also repeat what failed and laws that did not hold")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try the script itself")
    return parser.parse_args(namespace=Options())


if __name__ == "__main__":
    sys.exit(main())
