"""Fuzz test: damage saved files, configs and input at random; reading must succeed correctly or raise InputError.

    python -m tests.soak.fuzz --cases 1000000

A case picks a target from tests/soak/fuzz_saved.py or tests/soak/fuzz_inputs.py (a session, a checkpoint, a run config,
a training text, ...), damages one of its files (a flipped bit, bytes overwritten, truncated, repeated or inserted, a
random length of the safetensors header, a number or a word replaced, a line deleted) and reads it. If reading succeeds,
the result must equal what was written or, for files that people write or edit, the current content of the file.
Anything else is a failure: another exception, another result, a crash of the interpreter, more than a few seconds.
"""

import argparse
import contextlib
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from memformer.errors import InputError
from memformer.utils.progress import ProgressBar
from tests.soak.fuzz_inputs import Images, JsonLines, RunConfigFile, Stories, TextFiles
from tests.soak.fuzz_saved import (
    CheckpointFolder,
    ConfigFile,
    EditedRunFolder,
    RunFolder,
    SessionFile,
    TokenCache,
    TokenizerFolder,
    WeightsFile,
    small_tokenizers,
)

Damage = Callable[[bytes, random.Random], bytes]
SLOW_SECONDS = 5.0
# Replacements for a number or a word in JSON and YAML: out of range, of another type, or malformed.
VALUES = [
    *b"-1 0 1 7 0.5 1e999 NaN .nan .inf 9223372036854775808 99999999 0x_ 1:30 2020-01-01 2020-99-99".split(),
    *b'x text "x" "" null true [] [1] [[1,2]] {} {"x":1} *a \\ud800 \xff'.split(),
    *(b"&a [*a]", b"!!int x", b"!!bool x", b"!!timestamp x", b"!!set {}", b"<<: 1", b"? {}", b"7" * 5000, b"[" * 5000),
]


def main() -> int:
    """Run the cases; return 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        counts, failures = fuzz(Path(name), num_cases=options.cases, seed=options.seed)
    for failure in failures[:20]:
        print(f"FAILED: {failure}")
    print(f"{options.cases:,} cases in {time.monotonic() - started:.0f} s, {len(failures)} failures; {dict(counts)}")
    return int(bool(failures))


def fuzz(base: Path, *, num_cases: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Return the number of cases by target and outcome, and descriptions of the failures.

    The same seed gives the same cases, except for the order of a session's metadata, which safetensors does not fix.
    """
    torch.manual_seed(seed)
    chooser, counts, failures = random.Random(seed), Counter[str](), []
    # Some of the files contain their own paths. Relative to the working directory, these do not depend on `base`.
    with contextlib.chdir(base), ProgressBar("fuzzing", num_cases, unit="case") as progress:
        targets = make_targets(Path())
        weights = [target.weight for target in targets]
        for target in targets:
            assert target.is_as_written(), f"{target.name}: not read as written although undamaged"
        for number in range(num_cases):
            progress.advance_to(number, f"{len(failures)} failures")
            (target,) = chooser.choices(targets, weights)
            file = chooser.choice(target.files)
            damage = chooser.choice(DAMAGES)
            original = file.read_bytes()
            replace_file(file, damage(original, chooser))
            # CPU time, because wall time depends on the load of the machine.
            started = time.process_time()
            outcome = outcome_of(target)
            seconds = time.process_time() - started
            replace_file(file, original)
            known = outcome in {"read as written", "refused"}
            counts[f"{target.name}: {outcome if known else 'FAILED'}"] += 1
            if not known or seconds > SLOW_SECONDS:
                failures.append(
                    f"case {number} (seed {seed}): {target.name}, {file.name}, {damage.__name__}: {outcome}"
                )
    return counts, failures


def outcome_of(target: "Target") -> str:
    """Read a target and return the outcome."""
    try:
        return "read as written" if target.is_as_written() else "OTHER CONTENT"
    except InputError:
        return "refused"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        return f"{type(error).__name__}: {error}"[:200]


def replace_file(file: Path, content: bytes) -> None:
    """Delete a file and write a new one: on some file systems, overwriting a file waits for the disk."""
    file.unlink()
    file.write_bytes(content)


class Target(Protocol):
    """Files that were written, and a method that reads them.

    Attributes:
        name: Name of the target.
        weight: Frequency of this target relative to the others.
        files: Files to damage, one at a time.
    """

    name: str
    weight: float
    files: list[Path]

    def is_as_written(self) -> bool:
        """Read the files and compare."""


def make_targets(base: Path) -> list[Target]:
    """Return all targets, written into `base`; slow ones have a smaller weight."""
    return [
        SessionFile(base),
        WeightsFile(base),
        ConfigFile(base),
        CheckpointFolder(base),
        RunFolder(base),
        EditedRunFolder(base),
        TokenCache(base),
        *(TokenizerFolder(base, tokenizer) for tokenizer in small_tokenizers()),
        RunConfigFile(base),
        TextFiles(base),
        JsonLines(base),
        Images(base),
        Stories(base),
    ]


def flip_a_bit(content: bytes, chooser: random.Random) -> bytes:
    """Flip a random bit."""
    where = chooser.randrange(len(content))
    return content[:where] + bytes([content[where] ^ 1 << chooser.randrange(8)]) + content[where + 1 :]


def flip_an_early_bit(content: bytes, chooser: random.Random) -> bytes:
    """Flip a random bit in the first 400 bytes, which contain the headers."""
    return flip_a_bit(content[:400], chooser) + content[400:]


def overwrite(content: bytes, chooser: random.Random) -> bytes:
    """Overwrite some bytes with random bytes."""
    where, length = chooser.randrange(len(content)), chooser.randrange(1, 64)
    return content[:where] + chooser.randbytes(length) + content[where + length :]


def cut_off(content: bytes, chooser: random.Random) -> bytes:
    """Truncate the content."""
    return content[: chooser.randrange(len(content))]


def double(content: bytes, chooser: random.Random) -> bytes:
    """Append the end of the content once more."""
    return content + content[chooser.randrange(len(content)) :]


def put_in(content: bytes, chooser: random.Random) -> bytes:
    """Insert random bytes."""
    where = chooser.randrange(len(content) + 1)
    return content[:where] + chooser.randbytes(chooser.randrange(1, 16)) + content[where:]


def set_header_length(content: bytes, chooser: random.Random) -> bytes:
    """Set the first eight bytes, the length of a safetensors header, to a random value."""
    return (
        chooser.choice([0, 1, 8, 2**31, 2**62, 2**64 - 1, len(content), len(content) * 2]).to_bytes(8, "little")
        + content[8:]
    )


def replace_a_number(content: bytes, chooser: random.Random) -> bytes:
    """Replace a number; binary files have some in their header."""
    return replace_a_match(rb"\d+(\.\d+)?", content, chooser)


def replace_a_word(content: bytes, chooser: random.Random) -> bytes:
    """Replace a word, with or without its quotes."""
    return replace_a_match(rb"\w+" if chooser.randrange(2) else rb'"\w+"', content, chooser)


def replace_a_match(pattern: bytes, content: bytes, chooser: random.Random) -> bytes:
    """Replace one of the matches in the first 4000 bytes by a value of VALUES; without a match, return no bytes."""
    matches = list(re.finditer(pattern, content[:4000]))
    if not matches:
        return b""
    match = chooser.choice(matches)
    return content[: match.start()] + chooser.choice(VALUES) + content[match.end() :]


def leave_out_a_line(content: bytes, chooser: random.Random) -> bytes:
    """Delete a line."""
    lines = content.splitlines(keepends=True)
    del lines[chooser.randrange(len(lines))]
    return b"".join(lines)


DAMAGES: list[Damage] = [
    flip_a_bit,
    flip_an_early_bit,
    overwrite,
    cut_off,
    double,
    put_in,
    set_header_length,
    replace_a_number,
    replace_a_word,
    leave_out_a_line,
]


if __name__ == "__main__":
    sys.exit(main())
