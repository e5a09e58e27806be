"""Compare the default's decoder with the paper's: an update by replay, evaluation, and decoding of one stream.

    python benchmarks/decoders.py         # table; JSON to benchmarks/results/decoders.json

The two models alternate in one process, and a ratio compares the same round.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, positive
from sizes import half_and_half
from turns import in_words, spread, time_in_turns

from memformer import Memformer, MemformerConfig, Rollout, Session, backpropagate, evaluate
from memformer.data import corpus_from_arrays
from memformer.evaluation.flops import flops_per_token
from memformer.utils.files import write_json

SIZES = {
    "width 128, 3 + 3 layers, segments of 64": {"width": 128, "layers": 6, "segment_length": 64},
    "width 256, 4 + 4 layers, segments of 128": {"width": 256, "layers": 8, "segment_length": 128},
}
_NUM_TIMESTEPS, _BATCH_SIZE, _DECODED = 8, 4, 128


def main() -> None:
    """Measure, print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", default="benchmarks/results/decoders.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {"machine": describe_machine(options.threads), "rounds": options.rounds, "models": {}}
    print("| model | work | default, ms | speed ratio, default to paper |\n|---|---|---|---|")
    for name, size in SIZES.items():
        configs = {"default": half_and_half(**size, decoder={}), "paper": half_and_half(**size)}
        result["models"][name] = measure(configs, options.rounds)
        for work, row in result["models"][name]["work"].items():
            ratio, ms = row["default_faster_by"], row["default_ms"]
            print(f"| {name} | {work} | {in_words(ms)} | x{in_words(ratio)} |")
    write_json(Path(options.output), result)


def measure(configs: dict[str, MemformerConfig], rounds: int) -> dict[str, Any]:
    """Return parameters and operations of both models, and the times of each kind of work."""
    models = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        models[name] = Memformer(config)
    works = {name: kinds_of_work(model) for name, model in models.items()}
    return {
        "parameters": {name: model.num_parameters for name, model in models.items()},
        "flops_per_token": {name: flops_per_token(model) for name, model in models.items()},
        "work": {kind: compare({name: work[kind] for name, work in works.items()}, rounds) for kind in works["paper"]},
    }


def kinds_of_work(model: Memformer) -> dict[str, Callable[[], object]]:
    """Return functions that do each kind of work."""
    shape = (_NUM_TIMESTEPS, _BATCH_SIZE, model.segment_length)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.vocab_size, shape, generator=generator)
    rollout = Rollout(inputs=tokens, targets=tokens.roll(-1, 0))
    corpus = corpus_from_arrays(list(tokens.transpose(0, 1).flatten(1).numpy()), model.vocab_size)
    sessions = {compiled: Session(model, compiled=compiled) for compiled in (False, True)}
    for session in sessions.values():
        session.feed(tokens[:, 0].flatten())  # compiled decoding begins with the second segment

    def update() -> None:
        model.zero_grad()
        backpropagate(model, rollout)

    return {
        "update by replay": update,
        "evaluation": lambda: evaluate(model, corpus, num_lanes=_BATCH_SIZE),
        f"decoding {_DECODED} tokens": lambda: sessions[False].generate(_DECODED, temperature=0),
        f"decoding {_DECODED} tokens, compiled": lambda: sessions[True].generate(_DECODED, temperature=0),
    }


def compare(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Return the milliseconds of the default's work, and how many times as fast it is as the paper's."""
    seconds = time_in_turns(works, rounds=rounds)
    pairs = zip(seconds["default"], seconds["paper"], strict=True)
    return {
        "default_ms": spread([1e3 * value for value in seconds["default"]]),
        "default_faster_by": spread([paper / default for default, paper in pairs]),
    }


if __name__ == "__main__":
    main()
