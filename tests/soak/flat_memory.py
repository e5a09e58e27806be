"""Peak memory of training, evaluation and generation through the command, over documents of growing length.

    python -m tests.soak.flat_memory --lengths 10000 100000 1000000 10000000

For each length in bytes, one document is read, and each peak is measured in a separate process. Resident pages of a
memory-mapped file count towards the peak, so the size of the token ids on disk is printed as well. Linux and macOS.
"""

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

import yaml

SEGMENT_LENGTH, ROLLOUT_LENGTH = 64, 8


def main() -> int:
    """Print the table; return 1 if a peak grew by more than the token ids on disk plus a tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--tolerance_mib", type=float, default=16.0)
    options = parser.parse_args()
    peaks: dict[str, list[float]] = {"train": [], "evaluate": [], "generate": []}
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        (base / "held_out.txt").write_text(text_of(2_000), encoding="ascii")
        print("| bytes | " + " | ".join(f"{name}, MiB" for name in peaks) + " |")
        print("|---|" + "---|" * len(peaks))
        for length in options.lengths:
            document, run = base / f"{length}.txt", base / f"run-{length}"
            document.write_text(text_of(length), encoding="ascii")
            config = base / "config.yaml"
            config.write_text(yaml.safe_dump(run_once_through(document, base, length)), encoding="utf-8")
            commands = {
                "train": ["train", str(config), "--folder", str(run)],
                "evaluate": ["evaluate", str(run), "--data.kind", "text", "--data.path", str(document)],
                "generate": ["generate", str(run), "--prompt_file", str(document), "--max_new_tokens", "100"],
            }
            for command, arguments in commands.items():
                peaks[command].append(peak_mib(arguments))
            print(f"| {length:,} | " + " | ".join(f"{values[-1]:.0f}" for values in peaks.values()) + " |", flush=True)
    # Token ids on disk take at most two bytes each.
    mapped = 2 * (options.lengths[-1] - options.lengths[0]) / 2**20
    grown = {name: values[-1] - values[0] for name, values in peaks.items()}
    print(
        f"growth: {', '.join(f'{name} {mib:.1f} MiB' for name, mib in grown.items())}; "
        f"token ids on disk {mapped:.1f} MiB"
    )
    return int(any(mib > mapped + options.tolerance_mib for mib in grown.values()))


def text_of(length: int) -> str:
    """Return a text of random words with `length` characters."""
    words = random.Random(0)
    parts: list[str] = []
    size = 0
    while size < length:
        parts.append(words.choice(["the", "cat", "sat", "on", "a", "mat"]))
        size += len(parts[-1]) + 1
    return " ".join(parts)[:length]


def run_once_through(document: Path, base: Path, length: int) -> dict[str, object]:
    """Return the config of a run that reads the document once."""
    tokens = SEGMENT_LENGTH * ROLLOUT_LENGTH
    return {
        "threads": 1,
        "device": "cpu",
        "model": {
            "d_model": 32,
            "num_heads": 2,
            "d_ff": 64,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "segment_length": SEGMENT_LENGTH,
            "num_slots": 4,
        },
        "data": {
            "train": {"kind": "text", "path": str(document)},
            "validation": {"kind": "text", "path": str(base / "held_out.txt")},
            "cache": str(base / "cache"),
        },
        "training": {
            "num_updates": max(1, length // tokens),
            "num_lanes": 1,
            "rollout_length": ROLLOUT_LENGTH,
            "evaluate_every": 1_000_000,
            "save_every": 1_000_000,
            "log_every": 1_000,
            "sample_tokens": 0,
        },
    }


def peak_mib(arguments: list[str]) -> float:
    """Return the peak resident memory of a command, in MiB."""
    child = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "memformer", *arguments],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, each, os.devnull, os.O_WRONLY, 0) for each in (1, 2)],
    )
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"memformer {' '.join(arguments)} ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss / 2**20 if sys.platform == "darwin" else usage.ru_maxrss / 2**10


if __name__ == "__main__":
    sys.exit(main())
