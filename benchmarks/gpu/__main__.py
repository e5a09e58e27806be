"""Everything that needs a GPU, in one command for a machine with one GPU and no network (`make cuda`).

Each part writes `gpu-PART.json` after every measurement and goes on from it when the command is run again, so a part
may be interrupted at any time. Parts:

    laws      the engine's gradients equal back-propagation through time in float64; resuming is exact
    speed     training: tokens/s, share of the fastest matrix product, device memory; eager, engine, compiled, BPTT
    decoding  milliseconds per token generated and tokens/s read, by the length of what was read before
    attention the backends of scaled_dot_product_attention at the sizes of a timestep
    kernels   time of each recorded piece by kind of kernel

    python -m benchmarks.gpu --output benchmarks/results --minutes 9
    python -m benchmarks.gpu --smoke --output FOLDER       # tiny sizes; runs on a CPU too
"""

import argparse
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.attention import attention
from benchmarks.gpu.decoding import decoding
from benchmarks.gpu.kernels import kernels
from benchmarks.gpu.laws import laws
from benchmarks.gpu.speed import speed

Row = dict[str, Any]
PARTS: dict[str, Callable[["Options"], Iterator[tuple[str, Callable[[], Row]]]]] = {
    "laws": laws,
    "speed": speed,
    "decoding": decoding,
    "attention": attention,
    "kernels": kernels,
}


class Options(argparse.Namespace):
    """The command's options."""

    output: Path
    minutes: float
    parts: list[str]
    only: str
    smoke: bool


def main() -> None:
    """Run the parts and write their results."""
    options = parse_arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    for part in options.parts:
        run_part(part, options, deadline)


def run_part(part: str, options: Options, deadline: float) -> None:
    """Run the measurements of a part that its file does not have yet, until the deadline."""
    file = options.output / f"gpu-{part}.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": {}}
    result["machine"] = describe()
    for name, measure in PARTS[part](options):
        if name in result["rows"] or not re.search(options.only, name):
            continue
        if time.monotonic() > deadline:
            print(f"{part}: no time is left for {name}", flush=True)
            return
        started = time.monotonic()
        try:
            row = measure()
        except torch.cuda.OutOfMemoryError as error:
            row = {"failed": str(error).splitlines()[0]}
        except Exception as error:  # one failure must not cost the other measurements
            row = {"failed": f"{type(error).__name__}: {error}"[:500], "traceback": traceback.format_exc()[-3000:]}
        row["seconds_taken"] = round(time.monotonic() - started, 1)
        result["rows"][name] = row
        print(f"{part}: {name}: {json.dumps(row)}", flush=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent.parent / "results", help="folder of the results"
    )
    parser.add_argument("--minutes", type=float, default=9, help="no measurement is begun after this time")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--only", default="", help="run only measurements whose name matches this pattern")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try the script itself")
    return parser.parse_args(namespace=Options())


if __name__ == "__main__":
    main()
