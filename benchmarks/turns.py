"""Contenders that take turns, each in a process of its own, so that they may live in different environments.

What counts is the ratio of two contenders in the same round: absolute times drift where a machine is shared. A
contender is built once, warms up once, and works on whenever it is its turn; the others wait meanwhile.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Contender:
    """A process that works when it is told to.

    Args:
        python: The interpreter of its environment.
        script: The file beside this one that builds it and works: it is called with name and options (JSON), prints a
            line of facts, and answers each line on stdin with a line.
        name: Which of the script's contenders.
        options: Its setting.
    """

    def __init__(self, python: str, script: str, name: str, options: Mapping[str, Any]) -> None:
        command = [python, str(Path(__file__).parent / script), name, json.dumps(dict(options))]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._answer()

    def work(self, what: str) -> dict[str, Any]:
        """Do one unit of work; return what the contender measured: at least `seconds` and `tokens`."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"contender {self.name} ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def take_turns(contenders: Mapping[str, Contender], what: str, *, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Return what each contender measured in each round; a round before the first warms up and does not count."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for count in range(rounds + 1):
        for name, contender in contenders.items():
            result = contender.work(what)
            if count:
                measured[name].append(result)
        print(f"{what}: round {count} of {rounds}", end="\r", file=sys.stderr)
    print(file=sys.stderr)
    return measured


def speed(rounds: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the tokens per second of each round."""
    return [turn["tokens"] / turn["seconds"] for turn in rounds]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(rounds: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return how many times as fast as the base a contender was, round by round."""
    return spread([own / other for own, other in zip(speed(rounds), speed(base), strict=True)])
