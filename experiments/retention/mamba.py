"""Train Mamba-2 (of transformers) on the pairs of `associative.yaml`, and measure how many pairs its state holds.

    python experiments/retention/mamba.py experiments/retention/associative.yaml --name mamba-128 --states 16 32
        --num_facts 4 8 16 --data.recall.num_keys 128 --data.recall.num_values 128

The episodes, curriculum, optimizer and number of updates are those of `memformer train`; an episode is read as one
sequence, so gradients flow through all of it. The measurement inserts facts and filler as `memformer retention` does,
and asks one question for each episode. Options not listed here set keys of the config. JSON goes to
experiments/results/retention-NAME.json, in which `num_slots` is the number of states of a channel; `capacity.py` reads
it. (The first Mamba is slow without a GPU: it made fewer than 100 updates in six minutes.)
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM

from memformer.cli.run_config import parse_run_config
from memformer.data.recall.stream import (
    RecallStream,
    append_question,
    draw_fact_timesteps,
    insert_facts,
    make_task,
)
from memformer.data.recall.tasks import RecallTask
from memformer.training.config import RunConfig
from memformer.training.optimizer import clip_gradients, learning_rate_at, make_optimizer
from memformer.utils.files import write_json

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from machine import describe_machine

ROOT = Path(__file__).parents[2]
ROWS = 64
EXPANSION = 2
HEAD_WIDTH = 32
CONVOLUTION = 4


def main() -> None:
    """Train and measure all sizes and seeds, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--name", required=True, help="Name of the result.")
    parser.add_argument("--states", type=int, nargs="+", default=[32], help="Sizes of the state of a channel.")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_facts", type=int, nargs="+", default=[4, 8, 16, 32, 64, 96])
    parser.add_argument("--facts_per_segment", type=int, default=6)
    parser.add_argument("--distances", type=int, nargs="+", default=[21])
    parser.add_argument("--num_questions", type=int, default=256, help=f"A multiple of {ROWS}.")
    options, further = parser.parse_known_args()
    if options.num_questions < ROWS or options.num_questions % ROWS:
        parser.error(f"--num_questions is {options.num_questions}; it must be a multiple of {ROWS}")
    output = ROOT / "experiments" / "results" / f"retention-{options.name}.json"
    runs: list[dict[str, Any]] = []
    for seed in options.seeds:
        for num_states in options.states:
            config, _ = parse_run_config([str(options.config), "--seed", str(seed), *further])
            torch.set_num_threads(config.threads or 1)
            model, log = train(config, num_states=num_states, num_layers=options.layers)
            width = EXPANSION * config.model.d_model
            # The states of all channels, and the last inputs of the convolution over them, B and C.
            state_bytes = 4 * options.layers * (width * num_states + (width + 2 * num_states) * CONVOLUTION)
            for num_facts in options.num_facts:
                points = [
                    {"distance": distance, **measure(model, config, options, num_facts=num_facts, distance=distance)}
                    for distance in options.distances
                ]
                runs.append(
                    {
                        "seed": seed,
                        "checkpoint": "last",
                        "num_facts": num_facts,
                        "facts_per_segment": options.facts_per_segment,
                        "num_slots": num_states,
                        "state_bytes": state_bytes,
                        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
                        "training": log,
                        "points": points,
                    }
                )
                print(seed, num_states, num_facts, [point["accuracy"] for point in points], flush=True)
            variants = {"config": {"options": further, "layers": options.layers, "runs": runs}}
            summary = {"config": str(options.config), "machine": describe_machine(1), "variants": variants}
            write_json(output, summary)


def train(config: RunConfig, *, num_states: int, num_layers: int) -> tuple[Mamba2ForCausalLM, list[tuple[int, float]]]:
    """Return a trained model, and the mean loss in nats of every 100 updates."""
    task, training = task_of(config), config.training
    torch.manual_seed(config.seed)
    model = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=task.tokenizer.vocab_size + 1,
            hidden_size=config.model.d_model,
            num_hidden_layers=num_layers,
            state_size=num_states,
            expand=EXPANSION,
            head_dim=HEAD_WIDTH,
            num_heads=EXPANSION * config.model.d_model // HEAD_WIDTH,
            n_groups=1,
            conv_kernel=CONVOLUTION,
            chunk_size=64,
            bos_token_id=task.tokenizer.vocab_size,
            eos_token_id=None,
            pad_token_id=None,
            use_cache=False,
        )
    ).train()
    stream = RecallStream(
        task,
        config.data.recall,
        num_lanes=training.num_lanes,
        segment_length=config.model.segment_length,
        rollout_length=1 << 20,  # whole episodes
        bos_token_id=task.tokenizer.vocab_size,
        seed=config.seed,
    )
    optimizer, losses, log, start = make_optimizer(model, training), [], [], time.monotonic()
    for update in range(training.num_updates):
        rollout = next(stream)
        # The first timestep reads [BOS] alone. The answer of a segment follows its last token.
        logits = answer_logits(model, rollout.inputs[1:])
        is_asked = ~rollout.target_padding[1:, :, 0]
        loss = F.cross_entropy(logits[is_asked], rollout.targets[1:, :, 0][is_asked])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(update, training)
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(model, training.max_gradient_norm)
        optimizer.step()
        losses.append(loss.item())
        stream.observe(losses[-1])
        if (update + 1) % 100 == 0:
            log.append((update + 1, float(np.mean(losses[-100:]))))
            minutes = (time.monotonic() - start) / 60
            print(f"update {update + 1}: {log[-1][1]:.4f} nats, level {stream.level}, {minutes:.1f} min", flush=True)
    return model.eval(), log


def answer_logits(model: Mamba2ForCausalLM, segments: Tensor) -> Tensor:
    """Return the logits (N, B, V) after the last token of each segment (N, B, L), read as one sequence after [BOS]."""
    _, num_rows, length = segments.shape
    first = segments.new_full((num_rows, 1), model.config.bos_token_id)
    tokens = torch.cat([first, segments.transpose(0, 1).reshape(num_rows, -1)], dim=1)
    hidden = model.backbone(tokens).last_hidden_state
    return model.lm_head(hidden[:, length::length]).transpose(0, 1)


@torch.inference_mode()
def measure(
    model: Mamba2ForCausalLM, config: RunConfig, options: argparse.Namespace, *, num_facts: int, distance: int
) -> dict[str, float | int]:
    """Return the accuracy of one question for each of many episodes, a number of segments after the last fact."""
    task, length = task_of(config), config.model.segment_length
    generator = np.random.Generator(np.random.PCG64([0, num_facts, 1]))
    num_right = 0
    for _ in range(options.num_questions // ROWS):
        episodes = [task.make_episode(generator, num_facts) for _ in range(ROWS)]
        timesteps = draw_fact_timesteps(
            config.data.recall, generator, num_facts, facts_per_segment=options.facts_per_segment
        )
        window = range(timesteps[-1] + 1 + distance)
        inputs = insert_facts(task, episodes, timesteps, window, length, generator)
        questions = [each.questions[int(generator.integers(len(each.questions)))] for each in episodes]
        for segment, question in zip(inputs[-1], questions, strict=True):
            append_question(segment, question)
        predicted = answer_logits(model, torch.from_numpy(inputs))[-1].argmax(dim=-1)
        num_right += sum(
            int(token) == int(question.answer[0]) for token, question in zip(predicted, questions, strict=True)
        )
    return {
        "num_tokens": len(window) * length,
        "num_questions": options.num_questions,
        "accuracy": num_right / options.num_questions,
    }


def task_of(config: RunConfig) -> RecallTask:
    """Return the recall task of a config."""
    if config.data.recall is None or config.data.recall.is_in_text:
        sys.exit("the config needs a recall task with words of its own")
    return make_task(config.data.recall)


if __name__ == "__main__":
    main()
