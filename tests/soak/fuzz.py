"""Damage saved files and configs at random; each case must give the documented error or exactly what was saved.

    python -m tests.soak.fuzz --cases 1000000

A case takes a session, a model's weights, a model's config or a training checkpoint, damages it (a flipped bit, bytes
overwritten, cut off, doubled or put in, the length of a safetensors header set to anything, a number replaced) and
reads it. What is read in spite of the damage must be what was written, or a config that says so itself. Anything
else is a failure: another exception, another content, a crash of the interpreter, more than a few seconds.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from memformer import Memformer, Session
from memformer.errors import InputError
from memformer.files import read_json
from memformer.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from memformer.training.config import TrainingConfig
from memformer.training.optimizer import make_optimizer
from tests.conftest import tiny_config

Damage = Callable[[bytes, random.Random], bytes]
SLOW_SECONDS = 5.0
NUMBERS = [
    b"-1",
    b"0",
    b"1",
    b"7",
    b"1e999",
    b"NaN",
    b"9223372036854775808",
    b"99999999",
    b'"x"',
    b"null",
    b"[]",
    b"{}",
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
    """Return how the cases ended, by target, and what failed."""
    targets = [SessionFile(base), WeightsFile(base), ConfigFile(base), CheckpointFolder(base)]
    chooser, counts, failures = random.Random(seed), Counter[str](), []
    for number in range(num_cases):
        target = chooser.choice(targets)
        file = chooser.choice(target.files)
        damage = chooser.choice(DAMAGES)
        original = file.read_bytes()
        file.write_bytes(damage(original, chooser))
        started = time.monotonic()
        try:
            ending = "read as written" if target.is_as_written() else "OTHER CONTENT"
        except InputError:
            ending = "refused"
        except Exception as error:
            ending = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - started
        file.write_bytes(original)
        known = ending in {"read as written", "refused"}
        counts[f"{target.name}: {ending if known else 'FAILED'}"] += 1
        if not known or seconds > SLOW_SECONDS:
            failures.append(f"case {number} (seed {seed}): {target.name}, {file.name}, {damage.__name__}: {ending}")
    return counts, failures


def flip_a_bit(content: bytes, chooser: random.Random) -> bytes:
    """Flip one bit anywhere."""
    where = chooser.randrange(len(content))
    return content[:where] + bytes([content[where] ^ 1 << chooser.randrange(8)]) + content[where + 1 :]


def flip_an_early_bit(content: bytes, chooser: random.Random) -> bytes:
    """Flip one bit where headers are."""
    return flip_a_bit(content[:400], chooser) + content[400:]


def overwrite(content: bytes, chooser: random.Random) -> bytes:
    """Put random bytes over some."""
    where, length = chooser.randrange(len(content)), chooser.randrange(1, 64)
    return content[:where] + chooser.randbytes(length) + content[where + length :]


def cut_off(content: bytes, chooser: random.Random) -> bytes:
    """Keep the beginning alone."""
    return content[: chooser.randrange(len(content))]


def double(content: bytes, chooser: random.Random) -> bytes:
    """Append a part of it to itself."""
    return content + content[chooser.randrange(len(content)) :]


def put_in(content: bytes, chooser: random.Random) -> bytes:
    """Put random bytes in."""
    where = chooser.randrange(len(content) + 1)
    return content[:where] + chooser.randbytes(chooser.randrange(1, 16)) + content[where:]


def set_header_length(content: bytes, chooser: random.Random) -> bytes:
    """Set the first eight bytes, the length of a safetensors header, to anything."""
    return (
        chooser.choice([0, 1, 8, 2**31, 2**62, 2**64 - 1, len(content), len(content) * 2]).to_bytes(8, "little")
        + content[8:]
    )


def replace_a_number(content: bytes, chooser: random.Random) -> bytes:
    """Replace a number in a text by something else; binary files have some in their header."""
    numbers = list(re.finditer(rb"\d+(\.\d+)?", content[:4000]))
    if not numbers:
        return b""
    number = chooser.choice(numbers)
    return content[: number.start()] + chooser.choice(NUMBERS) + content[number.end() :]


DAMAGES: list[Damage] = [
    flip_a_bit,
    flip_an_early_bit,
    overwrite,
    cut_off,
    double,
    put_in,
    set_header_length,
    replace_a_number,
]


def small_model() -> Memformer:
    """Return a model that is saved and read in a millisecond."""
    return Memformer(tiny_config(num_encoder_layers=1, num_decoder_layers=1))


class SessionFile:
    """A saved session."""

    name = "session"

    def __init__(self, base: Path) -> None:
        self.model = small_model()
        self.session = Session(self.model)
        self.session.feed([1, 2, 3, 4, 5, 6, 7, 8])
        self.files = [base / "session"]
        self.session.save(self.files[0])

    def is_as_written(self) -> bool:
        """Read it and compare."""
        found = Session.load(self.files[0], model=self.model)._state()
        return all(torch.equal(found[name], tensor) for name, tensor in self.session._state().items())


class WeightsFile:
    """The weights of a saved model."""

    name = "weights"

    def __init__(self, base: Path) -> None:
        self.model, self.folder = small_model(), base / "model"
        self.model.save_pretrained(self.folder)
        self.files = [self.folder / "model.safetensors"]

    def is_as_written(self) -> bool:
        """Read it and compare."""
        return same_weights(Memformer.from_pretrained(self.folder), self.model)


class ConfigFile(WeightsFile):
    """The config of a saved model: a text that people may edit, so what it says counts, if it can be."""

    name = "config"

    def __init__(self, base: Path) -> None:
        super().__init__(base / "configured")
        self.files = [self.folder / "config.json"]

    def is_as_written(self) -> bool:
        """Read it and compare with what it says."""
        model = Memformer.from_pretrained(self.folder)
        said = {key: value for key, value in read_json(self.files[0]).items() if key != "model_type"}
        has = json.loads(json.dumps(model.config.to_dict()))
        return all(has[key] == value for key, value in said.items()) and same_weights(model, self.model)


class CheckpointFolder:
    """A checkpoint of a training run."""

    name = "checkpoint"

    def __init__(self, base: Path) -> None:
        self.folder = base / "checkpoints" / "update-000000001"
        self.folder.parent.mkdir()
        self.state = self.fresh_state()
        save_checkpoint(self.folder, self.state)
        self.files = sorted(self.folder.iterdir())

    def fresh_state(self) -> TrainingState:
        """Return a state to save, or to load into."""
        model = small_model()
        memory = model.initial_memory(2).detach().clone()
        return TrainingState(model, make_optimizer(model, TrainingConfig()), memory, {"num_updates": 1})

    def is_as_written(self) -> bool:
        """Read it and compare."""
        found = self.fresh_state()
        load_checkpoint(self.folder, found)
        same_memory = torch.equal(found.memory, self.state.memory)
        return same_weights(found.model, self.state.model) and same_memory and found.progress == self.state.progress


def same_weights(model: Memformer, other: Memformer) -> bool:
    """Whether two models have the same weights."""
    expected = other.state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


if __name__ == "__main__":
    sys.exit(main())
