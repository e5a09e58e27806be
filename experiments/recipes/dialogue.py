r"""A conversation as a stream of turns: prepare plays as dialogues, measure turns, and answer.

    python experiments/recipes/dialogue.py prepare data/tinyshakespeare/input.txt dialogue
    python experiments/recipes/dialogue.py report runs/recipes/dialogue dialogue --figure dialogue.png
    python experiments/recipes/dialogue.py time runs/recipes/dialogue dialogue/test
    python experiments/recipes/dialogue.py reply runs/recipes/dialogue --session hall.state \
        --turn "ROMEO: Good morrow, cousin." --speaker MERCUTIO

`prepare` reads speeches ("NAME:" and lines of text, with an empty line between two speeches) and writes the folders
train, validation and test: a file is a conversation, and a line is a turn, "NAME: text". The plays have no headings of
scenes, so a conversation begins where none of the last four speakers is among the next four.

`report` compares the surprisal of every turn of test/ given its conversation with that of the same turn with the memory
erased, and with that of the turn alone. `time` feeds turn after turn to one session, and measures a turn and the
state. `reply` adds a turn to a saved conversation, which is new if the file does not exist, and prints the answer of a
speaker, which ends with the line.
"""

import argparse
import copy
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from memformer import Session
from memformer.evaluation.token_surprisal import token_surprisal
from memformer.training.run_folder import LoadedRun, load_run

WINDOW = 4
GROUPS = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 1000))
READINGS = ("conversation", "memory erased", "turn alone")
TIMED = (1, 10, 100, 1000)
REPEATS = 9
NEW_TOKENS = 60


class Turn(NamedTuple):
    """A turn of a conversation."""

    speaker: str
    text: str

    def line(self) -> str:
        """Return the turn as a line."""
        return f"{self.speaker}: {self.text}\n"


def main() -> None:
    """Run one of the four commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    preparing = commands.add_parser("prepare", help="Write conversations, one turn a line.")
    preparing.add_argument("plays", type=Path, help="File of speeches.")
    preparing.add_argument("output", type=Path, help="Folder to write to.")
    preparing.add_argument("--seed", type=int, default=0, help="Seed of the split.")
    preparing.set_defaults(action=lambda options: prepare(options.plays, options.output, seed=options.seed))
    reporting = commands.add_parser("report", help="Print the surprisal of turns with and without their conversation.")
    reporting.add_argument("run", type=Path, help="Run folder.")
    reporting.add_argument("folder", type=Path, help="Folder that `prepare` wrote.")
    reporting.add_argument("--figure", type=Path, default=None, help="PNG file for the surprisal by turn.")
    reporting.set_defaults(action=lambda options: report(options.run, options.folder, figure=options.figure))
    timing = commands.add_parser("time", help="Print the processor time of a turn, and the bytes of the state.")
    timing.add_argument("run", type=Path, help="Run folder.")
    timing.add_argument(
        "conversations", type=Path, help="Folder that `prepare` wrote; all of its turns are one conversation."
    )
    timing.add_argument("--turns", type=int, nargs="+", default=TIMED, help="Numbers of the turns to measure.")
    timing.set_defaults(action=lambda options: measure_time(options.run, options.conversations, options.turns))
    replying = commands.add_parser("reply", help="Add a turn to a conversation, and print the next one.")
    replying.add_argument("run", type=Path, help="Run folder.")
    replying.add_argument("--session", type=Path, required=True, help="File of the conversation's state.")
    replying.add_argument("--turn", default="", help='The turn to add, "NAME: text".')
    replying.add_argument("--speaker", default="", help="Who answers. Default: the model chooses.")
    replying.add_argument("--temperature", type=float, default=0.7, help="Sampling temperature.")
    replying.add_argument("--seed", type=int, default=None, help="Random seed.")
    replying.set_defaults(action=reply)
    options = parser.parse_args()
    options.action(options)


def prepare(plays: Path, output: Path, *, seed: int) -> None:
    """Write the conversations of a file of speeches: 80 % for training, and a tenth each for validation and test."""
    found = list(conversations(read_speeches(plays)))
    random.Random(seed).shuffle(found)
    held_out = max(len(found) // 10, 1)
    parts = {
        "test": found[:held_out],
        "validation": found[held_out : 2 * held_out],
        "train": found[2 * held_out :],
    }
    for part, chosen in parts.items():
        folder = output / part
        folder.mkdir(parents=True, exist_ok=True)
        for number, turns in enumerate(chosen):
            text = "".join(turn.line() for turn in turns)
            (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
        counts = [len(turns) for turns in chosen]
        print(f"{folder}: {len(counts)} conversations, {sum(counts):,} turns, the longest {max(counts)}")


def read_speeches(file: Path) -> list[Turn]:
    """Return the speeches of a file as turns; a speech without words is left out."""
    turns = []
    for speech in file.read_text(encoding="utf-8").split("\n\n"):
        name, _, text = speech.strip().partition(":\n")
        if words := " ".join(text.split()):
            turns.append(Turn(name, words))
    return turns


def conversations(turns: list[Turn]) -> Iterator[list[Turn]]:
    """Yield the conversations: one begins where none of the last speakers is among the next ones."""
    start = 0
    for place in range(len(turns)):
        before = {turn.speaker for turn in turns[max(start, place - WINDOW) : place]}
        after = {turn.speaker for turn in turns[place : place + WINDOW]}
        if place - start >= WINDOW and len(turns) - place >= WINDOW and not before & after:
            yield turns[start:place]
            start = place
    yield turns[start:]


def read_conversations(folder: Path) -> list[list[Turn]]:
    """Return the conversations of a folder that `prepare` wrote."""
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt"))]
    return [[Turn(*line.split(": ", 1)) for line in text.splitlines()] for text in texts]


def report(run_folder: Path, folder: Path, *, figure: Path | None) -> None:
    """Print the mean surprisal of turns by their number in the conversation and by part of the turn."""
    run = load_run(run_folder)
    rows = [row for turns in read_conversations(folder / "test") for row in measure(run, turns)]
    print("| turn | turns | bytes | " + " | ".join(READINGS) + " | names: " + " | names: ".join(READINGS) + " |")
    print("|---" * (3 + 2 * len(READINGS)) + "|")
    for first, last in GROUPS:
        print_group(label(first, last), [row for row in rows if first <= row["turn"] <= last])
    print_group("all", rows)
    print("by the number of the speaker's own turns so far:")
    for first, last in GROUPS:
        print_group(label(first, last), [row for row in rows if first <= row["own turn"] <= last])
    better = sum(row["nats"][0] < row["nats"][1] for row in rows), sum(row["nats"][0] < row["nats"][2] for row in rows)
    print(
        f"less surprising with the conversation: than erased {better[0]}, than alone {better[1]} of {len(rows)} turns"
    )
    if figure is not None:
        draw(rows, figure)


def measure(run: LoadedRun, turns: list[Turn]) -> Iterator[dict[str, Any]]:
    """Yield for each turn its number, its size, and nats of the whole turn and of the name, by each reading."""
    lines = [encode(run, turn.line()) for turn in turns]
    surprisals = [*token_surprisal(run.model, lines)]
    own_turns: dict[str, int] = {}
    start = 0
    for number, (turn, ids) in enumerate(zip(turns, lines, strict=True), start=1):
        own_turns[turn.speaker] = own_turns.get(turn.speaker, 0) + 1
        alone, _ = token_surprisal(run.model, [ids])
        nats = [*(values[start : start + len(ids)] for values in surprisals), alone]
        start += len(ids)
        # Tokens that begin in the name; a token has at least one byte.
        sizes = np.cumsum([len(run.tokenizer.decode([token])) for token in ids.tolist()])
        in_name = np.concatenate([[0], sizes[:-1]]) < len(turn.speaker.encode())
        yield {
            "turn": number,
            "own turn": own_turns[turn.speaker],
            "bytes": len(turn.line().encode()),
            "nats": [float(values.sum()) for values in nats],
            "name nats": [float(values[in_name].sum()) for values in nats],
        }


def encode(run: LoadedRun, text: str) -> np.ndarray:
    """Return the token ids of a text; no token crosses the end of a line."""
    return run.tokenizer.encode(text.encode(), "turn")


def label(first: int, last: int) -> str:
    """Return the name of a group of turns."""
    if (first, last) == GROUPS[-1]:
        return f"{first} and later"
    return str(first) if first == last else f"{first} to {last}"


def print_group(name: str, rows: list[dict[str, Any]]) -> None:
    """Print bits per byte of whole turns, and bits of the names, of a group of turns."""
    if rows:
        print(f"| {name} | {len(rows)} | {sum(row['bytes'] for row in rows):,} | " + " | ".join(cells(rows)) + " |")


def cells(rows: list[dict[str, Any]]) -> list[str]:
    """Return bits per byte of whole turns, then bits per name, by each reading."""
    size = sum(row["bytes"] for row in rows)
    whole, names = (np.sum([row[key] for row in rows], axis=0) / np.log(2) for key in ("nats", "name nats"))
    return [f"{value:.3f}" for value in whole / size] + [f"{value:.2f}" for value in names / len(rows)]


def measure_time(run_folder: Path, folder: Path, numbers: list[int]) -> None:
    """Print the time of one and the same turn at several places of one conversation, and the size of the state."""
    run = load_run(run_folder)
    turns = [turn for conversation in read_conversations(folder) for turn in conversation]
    typical = sorted(turns, key=lambda turn: len(turn.text))[len(turns) // 2]
    turn = encode(run, typical.line()).tolist()
    session, sessions, read = run.session(), {}, 0
    stream = cycle(turns)
    for number in sorted(numbers):
        for each in islice(stream, number - 1 - read):
            session.feed(encode(run, each.line()).tolist())
        sessions[number], read = copy.deepcopy(session), number - 1
    times: dict[int, list[tuple[float, float, float]]] = {number: [] for number in sessions}
    print("| turn | tokens before | feed, ms | answer, ms | save and load, ms | state, bytes | file, bytes |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        files = {number: Path(temporary) / str(number) for number in sessions}
        for _ in range(REPEATS):  # alternating, so that other load on the machine meets all places alike
            for number, at in sessions.items():
                times[number].append(_one_turn(at, turn, files[number], run))
        for number, at in sessions.items():
            fed, answered, saved = (1000 * statistics.median(column) for column in zip(*times[number], strict=True))
            sizes = f"{at.state_bytes:,} | {files[number].stat().st_size:,}"
            print(f"| {number:,} | {at.num_tokens[0]:,} | {fed:.1f} | {answered:.1f} | {saved:.1f} | {sizes} |")
    print(f"the turn has {len(turn)} tokens; medians of {REPEATS} rounds")


def _one_turn(session: Session, turn: list[int], file: Path, run: LoadedRun) -> tuple[float, float, float]:
    """Return the processor seconds of a copy of a session: to read a turn, to answer as long, to save and load."""
    session = copy.deepcopy(session)
    times = [time.process_time()]
    session.feed(turn)
    times.append(time.process_time())
    session.generate(len(turn), seed=0, stop_token_ids=[])
    times.append(time.process_time())
    session.save(file)
    run.load_session(file)
    times.append(time.process_time())
    first, second, third = np.diff(times)
    return float(first), float(second), float(third)


def reply(options: argparse.Namespace) -> None:
    """Add a turn to a conversation, print the next one, and save the conversation."""
    run = load_run(options.run)
    session = run.load_session(options.session) if options.session.exists() else run.session()
    if options.turn:
        session.feed(encode(run, options.turn + "\n").tolist())
    if options.speaker:
        session.feed(encode(run, f"{options.speaker}:").tolist())
    ends = line_ends(run)
    ids = session.generate(NEW_TOKENS, temperature=options.temperature, seed=options.seed, stop_token_ids=ends)
    if ids[-1] not in ends:  # a turn that is too long is cut, and the next one begins on its own line
        session.feed(encode(run, "\n").tolist())
    text = options.speaker + (":" if options.speaker else "") + run.tokenizer.decode(ids).decode(errors="replace")
    print(text.removesuffix("\n"))
    session.save(options.session)
    print(json.dumps({"tokens": session.num_tokens[0], "state_bytes": session.state_bytes}))


def line_ends(run: LoadedRun) -> list[int]:
    """Return the tokens that end a line."""
    return [token for token in range(run.tokenizer.vocab_size) if run.tokenizer.decode([token]).endswith(b"\n")]


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw bits per byte of whole turns and bits of the names by the number of the turn."""
    canvas = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = canvas.subplots(1, 2)
    groups = [[row for row in rows if first <= row["turn"] <= last] for first, last in GROUPS]
    values = np.array([[float(cell) for cell in cells(group)] for group in groups if group])
    places = np.arange(len(values))
    labels = [label(first, last) for (first, last), group in zip(GROUPS, groups, strict=True) if group]
    for index, name in enumerate(READINGS):
        left.plot(places, values[:, index], "o-", label=name)
        right.plot(places, values[:, index + len(READINGS)], "o-", label=name)
    left.set(title="whole turns", ylabel="bits/byte")
    right.set(title="names of the speakers", ylabel="bits/name")
    for axes in (left, right):
        axes.set(xlabel="turn of the conversation", xticks=places, xticklabels=labels)
        axes.tick_params(axis="x", labelsize=8, rotation=30)
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    canvas.savefig(file, dpi=80)


if __name__ == "__main__":
    main()
