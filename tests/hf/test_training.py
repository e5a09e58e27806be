"""Training: gradients that add up in any order and over processes, and the Trainer of transformers."""

import dataclasses
import gc

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="needs the extra hf")

from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from memformer import InputError, Session, backpropagate, load_model
from memformer.training.processes import processes_started
from tests.helpers import SEGMENT_LENGTH, assert_close
from tests.hf.models import left_padded, make_hf, rollout_of, texts
from tests.training.gradients import gradients_of
from tests.training.jobs import run_job

LENGTH = 2 * SEGMENT_LENGTH
# For tests with many updates.
SMALL = {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_slots": 3}


def batch(num_rows, seed=3):
    return torch.stack(texts((LENGTH,) * num_rows, seed=seed))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert_close(found[name], grad)


def one_batch_gradients(ids, kind="default"):
    model = make_hf(kind).train()
    model(ids, labels=ids).loss.backward()
    return gradients_of(model)


def test_gradients_of_parts_add_up_to_those_of_the_batch():
    ids = batch(3)
    expected = one_batch_gradients(ids)
    model = make_hf().train()
    num_items = 3 * (LENGTH - 1)
    losses = [model(part, labels=part, num_items_in_batch=num_items).loss for part in (ids[:1], ids[1:])]
    # Until its backward pass, a loss changes no gradient.
    assert gradients_of(model) == {}
    for loss in losses:
        loss.backward()
    assert_same(gradients_of(model), expected)


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)], ids=["none", "zero", "tensor"])
def test_a_batch_of_which_no_label_counts_has_the_loss_zero(num_items):
    """Completions whose prompt fills the row, say; the Trainer then divides by 0 labels."""
    ids, model = batch(2), make_hf()
    labels = torch.full_like(ids, -100)
    for is_training in (True, False):
        loss = model.train(is_training)(ids, labels=labels, num_items_in_batch=num_items).loss
        assert loss.item() == 0.0
        if is_training:
            loss.backward()
            assert all(not grad.any() for grad in gradients_of(model).values())


def test_a_loss_can_be_scaled_combined_and_left_unused():
    ids = batch(2)
    expected = one_batch_gradients(ids)
    model = make_hf().train()
    first, second = model(ids, labels=ids).loss, model(ids, labels=ids).loss
    model(ids, labels=ids)
    (1024 * first + 2 * second).backward()
    assert_same(gradients_of(model), {name: 1026 * grad for name, grad in expected.items()})
    frozen = make_hf().train()
    frozen.memformer.embedding.weight.requires_grad_(False)
    frozen(ids, labels=ids).loss.backward()
    del expected["memformer.embedding.weight"]
    assert_same(gradients_of(frozen), expected)


def test_parameters_that_hooks_use_get_gradients_with_the_loss_scale():
    """A parameter of the wrapper, added to the embedded tokens by a hook, as adapters do."""
    ids, norms = batch(2), []
    for scale in (1.0, 0.1):
        model = make_hf().train()
        model.shift = torch.nn.Parameter(torch.zeros(16, dtype=torch.float64))
        model.memformer.embedding.register_forward_hook(lambda *call, model=model: call[2] + model.shift)
        loss = scale * model(ids, labels=ids).loss
        assert model.shift.grad is None
        loss.backward()
        norms.append(float(model.shift.grad.norm()))
    assert norms[1] == pytest.approx(0.1 * norms[0])
    assert norms[0] > 0


def test_second_derivatives_are_refused():
    ids, model = batch(2), make_hf().train()
    loss = model(ids, labels=ids).loss
    with pytest.raises(InputError, match="memory replay has no second derivatives"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True, allow_unused=True)


@pytest.mark.parametrize("is_training", [True, False])
def test_labels_at_padding_that_the_caller_has_counted_are_refused(is_training):
    """The Trainer divides by the number of all labels; rows padded to one length, say, whose labels are their ids."""
    ids, mask = left_padded(texts(), filler=3)
    model = make_hf().train(is_training)
    masked = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=masked).loss
    assert_close(model(ids, attention_mask=mask, labels=ids).loss, loss)  # a mean over what is predicted
    num_items = int((masked[:, 1:] != -100).sum())
    assert_close(model(ids, attention_mask=mask, labels=masked, num_items_in_batch=num_items).loss, loss)
    with pytest.raises(InputError, match=r"\d+ labels stand at padding or \[BOS\].*num_items_in_batch counts them"):
        model(ids, attention_mask=mask, labels=ids, num_items_in_batch=ids[:, 1:].numel())


def test_autocast_applies_to_the_replay():
    ids, model = batch(2), make_hf().float().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    exact = model(ids, labels=ids).loss
    assert loss.dtype == torch.float32
    assert loss != exact
    assert_close(loss, exact, relative=0.05)
    loss.backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


# The second model has a parameter that gets no gradient.
KINDS = ["default", "without memory"]


def test_processes_share_their_gradients(tmp_path):
    done = run_job(share_gradients, tmp_path)
    assert done.status == 0, done.output
    for kind in KINDS:
        expected = one_batch_gradients(batch(4), kind)
        later = one_batch_gradients(batch(4, seed=8), kind)
        assert_same(load_file(tmp_path / f"{kind}, once"), expected)
        added = {name: grad + later[name] for name, grad in expected.items()}
        assert_same(load_file(tmp_path / f"{kind}, accumulated"), added)


def share_gradients(folder):
    with processes_started("cpu") as processes:
        for kind in KINDS:
            once, accumulated = shared_gradients(kind, processes.rank)
            if processes.is_first:
                save_file(once, folder / f"{kind}, once")
                save_file(accumulated, folder / f"{kind}, accumulated")
        # If it outlived its process group, torch would wait for a thread that waits for the lock of Python.
        assert not any(isinstance(each, DistributedDataParallel) for each in gc.get_objects())


def shared_gradients(kind, rank):
    model = make_hf(kind).train()
    # As the Trainer does it.
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    rows = slice(2 * rank, 2 * rank + 2)
    first, second = batch(4)[rows], batch(4, seed=8)[rows]
    parallel(input_ids=first, labels=first)
    parallel(input_ids=first, labels=first).loss.backward()
    once = gradients_of(model)
    model.zero_grad()
    with parallel.no_sync():
        parallel(input_ids=first, labels=first).loss.backward()
    parallel(input_ids=second, labels=second).loss.backward()
    return once, gradients_of(model)


class Recorder:
    """A collator that notes its batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, examples):
        ids = torch.stack([example["input_ids"] for example in examples])
        self.batches.append(ids)
        return {"input_ids": ids, "labels": ids.clone()}


def make_trainer(model, folder, collator, **options):
    examples = [{"input_ids": tokens} for tokens in batch(24)]
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 20,
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "report_to": [],
        "logging_steps": 5,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    return Trainer(
        model, TrainingArguments(**settings), train_dataset=examples, eval_dataset=examples, data_collator=collator
    )


def own_updates(model, batches, *, num_updates):
    """Train as the Trainer does, with the library's own replay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for update, parts in enumerate(zip(batches[::2], batches[1::2], strict=True)):
        num_items = sum(part.numel() - len(part) for part in parts)
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - update / num_updates)
        for part in parts:
            rollout = rollout_of(part)
            excluded = torch.zeros(rollout.targets.shape, dtype=torch.bool)
            excluded[0, :, 0] = True
            rollout = dataclasses.replace(rollout, target_padding=excluded)
            backpropagate(model, rollout, gradient_scale=rollout.count_target_tokens() / num_items)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_twenty_updates_of_the_trainer_are_those_of_the_library(tmp_path):
    model, collator = make_hf(**SMALL), Recorder()
    make_trainer(model, tmp_path, collator).train()
    own = make_hf(**SMALL).memformer
    assert len(collator.batches) >= 40
    own_updates(own, collator.batches[:40], num_updates=20)
    for found, expected in zip(model.memformer.parameters(), own.parameters(), strict=True):
        assert_close(found, expected)


def test_the_trainer_saves_resumes_evaluates_and_is_reloaded(tmp_path):
    whole = make_hf(**SMALL)
    trainer = make_trainer(whole, tmp_path, Recorder(), max_steps=8, save_strategy="steps", save_steps=4)
    trainer.train()
    resumed = make_hf(**SMALL)
    again = make_trainer(resumed, tmp_path, Recorder(), max_steps=8, save_strategy="steps", save_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for found, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)
    loss = trainer.evaluate()["eval_loss"]
    session = Session(load_model(tmp_path / "checkpoint-8"), batch_size=24)
    expected = torch.stack(session.score(batch(24).tolist()))[:, 1:].mean()
    assert loss == pytest.approx(float(expected), rel=1e-6)
    trainer.save_model(str(tmp_path / "final"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    for found, expected in zip(reloaded.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)
