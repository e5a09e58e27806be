"""A complete run: log, training options, choice of the best weights, and losses that are not finite."""

import dataclasses
import math
import pathlib

import pytest
import torch
from safetensors.torch import load_file

from memformer import InputError, Memformer, SaveError
from memformer.cli.main import main
from memformer.training import loop
from memformer.training.logs import JsonLinesSink, read_log
from memformer.training.loop import train
from memformer.training.optimizer import clip_gradients
from memformer.training.replay import backpropagate
from memformer.training.run_data import DocumentData, prepare_data
from tests.training.runs import NUM_UPDATES, checkpoint_of, config_file, logged, run_config

pytestmark = pytest.mark.usefixtures("without_report")


def model_of(folder, update):
    return load_file(checkpoint_of(folder, update) / "model.safetensors")


def test_the_uninterrupted_run_exceeds_an_epoch_and_logs_every_update(base, unbroken):
    training, evaluation = logged(unbroken)
    assert [line[0] for line in training] == list(range(1, NUM_UPDATES + 1))
    assert [line[0] for line in evaluation] == [5, 10]
    num_tokens = prepare_data(run_config(base).data).train.num_tokens
    tokens_at = {line[0]: line[4] for line in training}
    assert tokens_at[6] < num_tokens < tokens_at[NUM_UPDATES]


def test_training_lowers_the_loss(unbroken):
    training, evaluation = logged(unbroken)
    assert training[-1][1] < training[0][1] - 0.5
    assert evaluation[-1][1] < evaluation[0][1]


def test_losses_that_are_not_finite_end_the_run_and_do_not_change_the_weights(base, tmp_path):
    config = run_config(base, max_skipped_in_a_row=3)
    config = dataclasses.replace(config, folder=str(tmp_path))
    model = Memformer(config.model)
    with torch.no_grad():
        model.embedding.weight.mul_(1e30)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        InputError, match=r"update 4: loss .* must be finite\. 4 updates in a row .* changed no weights"
    ):
        train(config, prepare_data(config.data), model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [line["update"] for line in read_log(tmp_path) if line["kind"] == "skipped"] == [1, 2, 3]


def test_too_little_device_memory_is_one_sentence_with_advice(base, tmp_path, monkeypatch):
    def out_of_memory(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.\nfurther lines")

    monkeypatch.setattr("memformer.training.loop.backpropagate", out_of_memory)
    config = dataclasses.replace(run_config(base), folder=str(tmp_path))
    with pytest.raises(InputError, match=r"Tried to allocate 12.00 GiB\. Lower training.readout_timesteps"):
        train(config, prepare_data(config.data), Memformer(config.model))


def test_graphs_are_refused_without_cuda(base, tmp_path):
    config = dataclasses.replace(run_config(base, engine="graphs"), folder=str(tmp_path))
    with pytest.raises(InputError, match=r"training.engine \('graphs'\) needs a CUDA device; .* is 'cpu'"):
        train(config, prepare_data(config.data), Memformer(config.model))
    with pytest.raises(InputError, match=r"training.engine \('graphs'\) needs training.method 'replay'"):
        run_config(base, engine="graphs", method="bptt")


def test_a_learning_rate_that_is_far_too_high_gives_one_error_line(base, tmp_path, capsys):
    argv = ["train", config_file(run_config(base)), "--folder", str(tmp_path), "--training.learning_rate", "1e30"]
    assert main([*argv, "--training.max_skipped_in_a_row", "2"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("memformer: error:")] == lines[-1:]
    assert "with a lower training.learning_rate" in lines[-1]


@pytest.mark.parametrize(
    "options", [{"method": "bptt"}, {"method": "checkpoint"}, {"precision": "bfloat16"}, {"max_gradient_norm": 0.0}]
)
def test_other_training_options(base, tmp_path, unbroken, options):
    config = run_config(base, num_updates=2, warmup_updates=0, sample_tokens=0)
    argv = ["train", config_file(config), "--folder", str(tmp_path)]
    assert main([*argv, *(part for key, value in options.items() for part in (f"--training.{key}", str(value)))]) == 0
    training, _ = logged(tmp_path)
    expected = logged(unbroken)[0]
    relative = 1e-2 if "precision" in options else 1e-5  # bfloat16 has 8 bits of mantissa, float32 has 24
    if "method" not in options:
        assert training[0][1] == pytest.approx(expected[0][1], rel=relative)
        assert training[0][2] == pytest.approx(expected[0][2], rel=3 * relative)
    assert (training[0][1] == expected[0][1]) == ("precision" not in options)


def test_training_options_reach_the_update(base, tmp_path, monkeypatch):
    """Most of them change no result, so the results cannot tell."""
    seen, limits = set(), []

    def recorded(*arguments, **options):
        seen.add((options["method"], options["readout_timesteps"], torch.is_autocast_enabled("cpu")))
        return backpropagate(*arguments, **options)

    def clipped(model, limit):
        limits.append(limit)
        return clip_gradients(model, limit)

    monkeypatch.setattr(loop, "backpropagate", recorded)
    monkeypatch.setattr(loop, "clip_gradients", clipped)
    options = {"method": "checkpoint", "readout_timesteps": 3, "precision": "bfloat16", "max_gradient_norm": 0.25}
    config = run_config(base, num_updates=1, sample_tokens=0, **options)
    assert main(["train", config_file(config), "--folder", str(tmp_path)]) == 0
    assert seen == {("checkpoint", 3, True)}
    assert limits == [0.25]


def test_the_logged_norms_are_those_of_the_memory_gradient(base, tmp_path, monkeypatch):
    results = []
    monkeypatch.setattr(
        loop, "backpropagate", lambda *given, **options: keep(results, backpropagate(*given, **options))
    )
    config = run_config(base, num_updates=2, log_every=2, rollouts_per_update=1, sample_tokens=0)
    assert main(["train", config_file(config), "--folder", str(tmp_path)]) == 0
    (line,) = (line for line in read_log(tmp_path) if line["kind"] == "training")  # none of the first update
    assert line["memory_gradient_norms"] == pytest.approx(results[-1].memory_grad_norms.tolist())


def keep(items, item):
    items.append(item)
    return item


def test_the_write_penalty_changes_the_gradient_but_not_the_logged_loss(base, tmp_path, monkeypatch):
    config = config_file(run_config(base, num_updates=1, warmup_updates=0, sample_tokens=0))
    runs = {}
    for name, penalty, learned in (("none", "0", math.inf), ("penalized", "1", math.inf), ("not learned", "1", 0.1)):
        monkeypatch.setattr("memformer.training.optimizer.LEARNED_LOSS", learned)
        argv = ["train", config, "--folder", str(tmp_path / name), "--model.write_normalizer", "entmax15"]
        assert main([*argv, "--training.write_penalty", penalty]) == 0
        runs[name] = logged(tmp_path / name)[0][0]
    assert runs["not learned"] == runs["none"]
    assert runs["penalized"][1] == runs["none"][1], "the loss must not include the penalty"
    assert runs["penalized"][2] != runs["none"][2], "the gradient must include the penalty"


def test_the_write_penalty_decays_over_the_run(base, tmp_path, monkeypatch):
    weights = []

    def backpropagate_and_record(*args, hooks, **options):
        weights.append(hooks.auxiliary_weight(0.05))
        assert hooks.auxiliary_weight(0.1) == 0.0
        assert hooks.shortfall_weight is None, "the loss of a text does not say whether writing is learned"
        return backpropagate(*args, hooks=hooks, **options)

    monkeypatch.setattr("memformer.training.loop.backpropagate", backpropagate_and_record)
    config = config_file(run_config(base, num_updates=4, rollouts_per_update=1, sample_tokens=0))
    argv = ["train", config, "--folder", str(tmp_path), "--model.write_normalizer", "entmax15"]
    assert main([*argv, "--training.write_penalty", "2"]) == 0
    assert weights == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5])


@pytest.mark.parametrize(("scores", "kept"), [([0.5, 0.5], 2), ([0.5, 0.6], 1), ([0.6, 0.5], 2)])
def test_of_equal_scores_the_later_weights_are_the_best(base, tmp_path, monkeypatch, scores, kept):
    results = iter([*scores, 0.0])
    evaluate = DocumentData.evaluate

    def scored(self, model, training, **options):
        result = evaluate(self, model, training, **options)
        score = next(results)
        monkeypatch.setattr(type(result), "score", property(lambda self: score))
        return result

    monkeypatch.setattr(DocumentData, "evaluate", scored)
    config = run_config(base, num_updates=2, warmup_updates=0, sample_tokens=0, evaluate_every=1, save_every=1)
    assert main(["train", config_file(config), "--folder", str(tmp_path)]) == 0
    weights = load_file(tmp_path / "best" / "model.safetensors")
    same = [
        update
        for update in (1, 2)
        if all(torch.equal(weights[name], tensor) for name, tensor in model_of(tmp_path, update).items())
    ]
    assert same == [kept]


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    """On a full disk; the system's own message names no file."""
    sink = JsonLinesSink(tmp_path, lines=[], num_updates=0)
    sink._lines.close()
    sink._lines = pathlib.Path("/dev/full").open("w")  # noqa: SIM115  closed by the sink
    for act in (lambda: sink.record("training", 1, {}), sink.flush, sink.close):
        with pytest.raises(SaveError, match=r"log\.jsonl could not be written: No space left on device"):
            act()
