"""Baselines learn recall from the same episodes: the answer is the next token after the question."""

import dataclasses
import math

import pytest
import torch
import yaml

from memformer import InputError, Rollout, backpropagate
from memformer.data import RecallConfig, RecallStream, make_task
from memformer.evaluation import inspection_parts
from memformer.evaluation.recall import measure_recall
from tests.cli.calls import call, call_json, refused
from tests.helpers import assert_close
from tests.models.baselines import BASELINES, tiny_baseline

CONFIG = RecallConfig(
    task="associative",
    num_facts=(2, 3),
    num_keys=4,
    num_values=5,
    num_fillers=3,
    max_distance=4,
    question_probability=0.9,
)


def make_stream(model, config=CONFIG, *, num_lanes=3):
    return RecallStream(
        make_task(config),
        config,
        num_lanes=num_lanes,
        segment_length=model.segment_length,
        rollout_length=99,
        bos_token_id=model.bos_token_id,
        seed=1,
    )


def model_for_task(name, config=CONFIG, **changes):
    return tiny_baseline(name, vocab_size=make_task(config).tokenizer.vocab_size, **changes)


@pytest.mark.parametrize("name", BASELINES)
def test_the_last_token_of_a_segment_predicts_the_answer(name):
    model = model_for_task(name).eval()
    episodes = next(make_stream(model))
    shifted = model.align_inputs(episodes)
    assert torch.equal(shifted.inputs, episodes.inputs)
    assert shifted.targets.shape == shifted.inputs.shape
    memory, total, count = model.initial_memory(3), 0.0, 0
    with torch.no_grad():
        for timestep, segment in enumerate(episodes.inputs):
            padding = episodes.input_padding[timestep]
            hidden, memory = model.encode(segment, memory=memory, padding_mask=padding if padding.any() else None)
            logits = model.decode(episodes.targets[timestep], hidden=hidden[:, -1:])
            nll = -logits.log_softmax(dim=-1).gather(-1, episodes.targets[timestep][..., None])[..., 0]
            asked = ~episodes.target_padding[timestep]
            total, count = total + float(nll[asked].sum()), count + int(asked.sum())
    assert count > 3
    for method in ("replay", "bptt"):
        found = backpropagate(model, episodes, method=method)
        assert found.num_tokens == count
        assert_close(found.loss, torch.tensor(total / count, dtype=torch.float64))


def test_shifted_rollouts_stay_so_in_parts():
    rollout = next(make_stream(model_for_task("lstm")))
    assert rollout.targets_are_answers
    shifted = rollout.shifted_by_one_token()
    for part, whole in (
        (rollout[1:3].shifted_by_one_token(), shifted[1:3]),
        (rollout.select_rows([0, 2]).shifted_by_one_token(), shifted.select_rows([0, 2])),
        (rollout.to("cpu").shifted_by_one_token(), dataclasses.replace(shifted)),
    ):
        assert torch.equal(part.targets, whole.targets)
        assert part.targets_are_answers
        assert part.is_shifted
        assert whole.is_shifted
        assert whole.shifted_by_one_token() is whole
    text = dataclasses.replace(rollout, targets=rollout.inputs, target_padding=None, targets_are_answers=False)
    once = text.shifted_by_one_token()
    assert not torch.equal(once.inputs, text.inputs)
    assert once.shifted_by_one_token() is once


def test_answers_without_padding_are_the_only_targets():
    rollout = Rollout(
        inputs=torch.arange(6).view(1, 2, 3), targets=torch.tensor([[[7], [8]]]), targets_are_answers=True
    )
    shifted = rollout.shifted_by_one_token()
    assert torch.equal(shifted.inputs, rollout.inputs)
    assert shifted.targets[~shifted.target_padding].tolist() == [7, 8]
    assert shifted.target_padding.tolist() == [[[True, True, False]] * 2]


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("is_before", [True, False])
def test_padding_around_a_question_changes_nothing(name, is_before):
    """The answer follows the last token of the question, wherever its padding is."""
    model = tiny_baseline(name).eval()
    question, padding = torch.tensor([1, 2, 3]), torch.tensor([False, False, False, True, True])
    losses = []
    for filler in (0, 5):
        tokens = torch.cat([question, torch.tensor([filler, filler])])
        if is_before:
            tokens, hides = tokens.roll(2), padding.roll(2)
        else:
            hides = padding
        rollout = Rollout(
            inputs=tokens.view(1, 1, -1),
            input_padding=hides.view(1, 1, -1),
            targets=torch.tensor([[[7]]]),
            targets_are_answers=True,
        )
        losses.append(backpropagate(model, rollout).loss)
    alone = Rollout(inputs=question.view(1, 1, -1), targets=torch.tensor([[[7]]]), targets_are_answers=True)
    for loss in losses:
        assert_close(loss, backpropagate(model, alone).loss)


@pytest.mark.parametrize(("name", "reaches_far"), [("lstm", True), ("transformer-xl", False)])
def test_a_trained_baseline_recalls_a_fact_as_far_as_its_memory_reaches(name, reaches_far):
    config = RecallConfig(task="fact", num_values=2, num_fillers=2, max_distance=2, question_probability=1.0)
    model = model_for_task(name, config, d_model=32).float()
    stream = make_stream(model, config, num_lanes=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(100):
        optimizer.zero_grad()
        backpropagate(model, next(stream))
        optimizer.step()
    near, far = measure_recall(model, stream.task, config, distances=[1, 8], num_facts=1).points
    assert near.accuracy == 1.0
    assert near.accuracy_memory_erased < 0.75
    assert (far.accuracy > 0.95) == reaches_far


def test_an_answer_is_measured_at_the_last_token_of_the_question(monkeypatch):
    model = model_for_task("lstm").eval()
    encode, decode = model.encode, model.decode
    encoded, asked = [], []

    def watched_encode(segment, **others):
        encoded.append((segment, encode(segment, **others)))
        return encoded[-1][1]

    def watched_decode(targets, *, hidden):
        segment, (states, _) = encoded[-1]
        assert torch.equal(hidden, states)
        assert targets.shape == segment.shape
        asked.append(segment[:, -2:])
        return decode(targets, hidden=hidden)

    monkeypatch.setattr(model, "encode", watched_encode)
    monkeypatch.setattr(model, "decode", watched_decode)
    task = make_task(CONFIG)
    measure_recall(model, task, CONFIG, distances=[1, 3], num_facts=3, num_episodes=4)
    questions = [task.tokenizer.decode(tokens.tolist()).decode().split() for tokens in torch.cat(asked)]
    assert len(questions) == 2 * 3 * 2 * 4  # distances, questions, with the memory and without, episodes
    assert all(mark == "?" and key.startswith("key") for mark, key in questions)


def test_answers_of_several_tokens_are_refused():
    config = RecallConfig(task="copy", num_facts=(3, 3))
    model = model_for_task("lstm", config)
    message = "answers have up to 3 tokens; a model that predicts the next token of what it reads can be asked for one"
    with pytest.raises(InputError, match=message):
        backpropagate(model, next(make_stream(model, config)))
    with pytest.raises(InputError, match=message):
        measure_recall(model, make_task(config), config, distances=[1], num_facts=3)


@pytest.mark.parametrize("model_type", ["lstm", "recurrent_memory_transformer"])
def test_commands_for_a_baseline_on_a_recall_task(tmp_path, monkeypatch, model_type):
    folder = str(tmp_path / "run")
    sizes = {} if model_type == "lstm" else {"num_heads": 2, "num_memory_tokens": 3}
    config = {
        "folder": folder,
        "threads": 1,
        "device": "cpu",
        "model_type": model_type,
        "model": {"d_model": 16, "num_layers": 1, "segment_length": 8, **sizes},
        "training": {"num_updates": 2, "num_lanes": 4},
    }
    copy, fact = tmp_path / "copy.yaml", tmp_path / "fact.yaml"
    copy.write_text(yaml.safe_dump({**config, "data": {"recall": {"task": "copy", "num_facts": [2, 2]}}}))
    fact.write_text(yaml.safe_dump({**config, "data": {"recall": {"task": "fact"}}}))
    assert "recall.task ('copy') does not fit the model: answers have up to 2 tokens" in refused("train", copy)
    assert not (tmp_path / "run").exists()
    assert call("train", fact)[0] == 0
    page = (tmp_path / "run" / "summary.html").read_text()
    assert ("an episode of the recall task" in page) == (model_type != "lstm")
    found = call_json("retention", folder, "--distances", "1")
    assert found["num_slots"] is None
    assert found["state_bytes"] >= 2 * 16 * 4
    assert found["points"][0]["num_questions"] == 64
    if model_type != "lstm":
        monkeypatch.setattr(inspection_parts, "_LEAST_GAIN", -math.inf)  # passages even where the memory does not help
        inspected = call_json("inspect", folder)
        asked = [timestep for timestep in inspected["timesteps"] if timestep["target_ids"]]
        assert len(asked) == inspected["num_tokens"] > 0
        assert all(timestep["read_texts"][-2:] == [" ?", " key0"] for timestep in asked)
        assert len(inspected["passages"]) == len(asked)
        assert all(passage["context"].endswith(" ? key0") for passage in inspected["passages"])
