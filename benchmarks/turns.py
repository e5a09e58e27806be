"""Run models alternately: each in a separate process, so that they can use different environments, or in this one.

Compare two models by the ratio of their speeds in the same round: absolute times drift on a shared machine. Each model
is built once and warmed up once; while one works, the others wait.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Contender:
    """A process that holds one model and does a unit of work on request.

    Args:
        python: The interpreter of the model's environment.
        script: A file in this folder that builds the model. It is called with name and options (JSON), prints a line
            of properties, and answers each line on stdin with a line of JSON.
        name: The model's name in the script.
        options: The model's options.
        source: Folder from which packages are imported first. None: as in this process.
    """

    def __init__(
        self, python: str, script: str, name: str, options: Mapping[str, Any], *, source: Path | None = None
    ) -> None:
        environment = dict(os.environ) if source is None else {**os.environ, "PYTHONPATH": str(source.resolve())}
        command = [python, str(Path(__file__).parent / script), name, json.dumps(dict(options))]
        self.name = name
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.facts = self._answer()

    def work(self, what: str) -> dict[str, Any]:
        """Do one unit of work, and return the measurement: at least `seconds` and `tokens`."""
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
    """Return each model's measurements, one per round, after a warm-up round that does not count."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for count in range(rounds + 1):
        for name, contender in contenders.items():
            result = contender.work(what)
            if count:
                measured[name].append(result)
        print(f"{what}: round {count} of {rounds}", end="\r", file=sys.stderr)
    print(file=sys.stderr)
    return measured


def time_in_turns(works: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Return the seconds that each function of this process takes, one per round, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for count in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if count:  # the first round warms up, and compiles
                seconds[name].append(time.perf_counter() - started)
    return seconds


def speed(rounds: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the tokens per second of each round."""
    return [turn["tokens"] / turn["seconds"] for turn in rounds]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the lowest and the highest value."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def in_words(values: Mapping[str, float], form: str = ".2f") -> str:
    """Return the median with the lowest and the highest value."""
    return f"{values['median']:{form}} ({values['low']:{form}}-{values['high']:{form}})"


def ratios(rounds: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the spread over rounds of a model's speed divided by the base's speed."""
    return spread([own / other for own, other in zip(speed(rounds), speed(base), strict=True)])
