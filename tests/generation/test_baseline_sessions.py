"""Sessions, evaluation and commands support every model; sessions and evaluation predict the same."""

import copy
import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn.utils.rnn import PackedSequence

from memformer import CheckpointError, InputError, MemformerConfig, Session, evaluate, load_model
from memformer.data import corpus_from_arrays
from memformer.models import LSTM
from memformer.models.next_token import SegmentState
from memformer.training.config import DataConfig, RunConfig, TrainingConfig
from tests.cli.calls import call, call_json, make_text, refused
from tests.generation.sessions import assert_same_state, random_tokens
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, assert_close
from tests.models.baselines import BASELINES, TYPES, tiny_baseline

baselines = pytest.mark.parametrize("name", BASELINES)


def session_nll(model, tokens):
    """Return the NLL of every token, each predicted by a session that was fed the tokens before it one by one."""
    session, nll = Session(model), []
    for token in tokens:
        nll.append(-session.next_token_logits()[0].log_softmax(-1)[token])
        session.feed([token])
    return torch.stack(nll)


@baselines
def test_the_size_of_the_state_is_that_of_what_is_saved(name, tmp_path):
    session = Session(tiny_baseline(name))
    session.feed(range(9))
    session.save(tmp_path / "state")
    assert session.state_bytes == sum(tensor.nbytes for tensor in load_file(tmp_path / "state").values())


@baselines
def test_any_split_and_any_rows_give_the_same_state(name, tmp_path):
    model = tiny_baseline(name)
    rows = [random_tokens(count, seed=count) for count in (0, 5, SEGMENT_LENGTH, 3 * SEGMENT_LENGTH + 1)]
    together = Session(model, batch_size=len(rows))
    together.feed([row[:2] for row in rows])
    together.next_token_logits()
    together.feed([row[2:] for row in rows])
    together.save(tmp_path / "session")
    again = Session.load(tmp_path / "session", model=model)
    assert_same_state(again, together)
    assert again.state_bytes == together.state_bytes
    for index, row in enumerate(rows):
        alone = Session(model)
        alone.feed(row)
        assert_close(together.next_token_logits()[index], alone.next_token_logits()[0])
        assert_close(together.memory[index], alone.memory[0])


def logits_of(model, row):
    """Return the next-token logits after these tokens, all read at once by a new session."""
    session = Session(model)
    session.feed(row)
    return session.next_token_logits()[0]


@pytest.mark.parametrize("places", [1, 64])
@baselines
def test_tokens_are_read_once_and_predict_as_if_read_at_once(name, places, monkeypatch):
    """Rows are fed unequal numbers of tokens, end segments at different times, and are chosen anew in between."""
    monkeypatch.setattr("memformer.models.next_token._FIRST_PLACES", places)
    model = tiny_baseline(name)
    texts = [random_tokens(4 * SEGMENT_LENGTH, seed=seed) for seed in range(3)]
    session, rows = Session(model, batch_size=3), [[], [], []]
    for counts in ([0, 3, SEGMENT_LENGTH - 1], [1, 0, 1], [1, 1, 1], [2, SEGMENT_LENGTH, 0], [1, 1, 2], [0, 0, 0]):
        new = [text[len(row) : len(row) + count] for text, row, count in zip(texts, rows, counts, strict=True)]
        session.feed(new)
        rows = [row + more for row, more in zip(rows, new, strict=True)]
        for logits, row in zip(session.next_token_logits(), rows, strict=True):
            assert_close(logits, logits_of(model, row))
    session.feed([[1]] * 3)
    session.select_rows([2, 0, 2, 1])
    chosen = [[*rows[index], 1] for index in (2, 0, 2, 1)]
    for more in ([[2], [3], [4], []], [[5] * SEGMENT_LENGTH, [6], [7], [1, 2]]):
        session.feed(more)
        chosen = [row + new for row, new in zip(chosen, more, strict=True)]
        for logits, row in zip(session.next_token_logits(), chosen, strict=True):
            assert_close(logits, logits_of(model, row))


@baselines
def test_every_token_is_read_once_within_its_segment(name, monkeypatch):
    model, read = tiny_baseline(name), []
    embed = type(model)._embed
    monkeypatch.setattr(type(model), "_embed", lambda self, tokens: read.append(tokens.shape[1]) or embed(self, tokens))
    session = Session(model)
    session.generate(SEGMENT_LENGTH - 1, seed=0)
    assert read == [1] * (SEGMENT_LENGTH - 1)  # [BOS] and all tokens but the last


class Doubled(torch.nn.Module):
    """Stands in a layer's place and computes otherwise."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *arguments, **options):
        return 2 * self.layer(*arguments, **options)


def assert_predicts_what_it_reads(model):
    """Assert that a session predicts, token by token and in rows of unequal length, what the model's `encode` says."""
    documents = [random_tokens(count, seed=count) for count in (2 * SEGMENT_LENGTH + 2, SEGMENT_LENGTH + 4)]
    for document in documents:
        corpus = corpus_from_arrays([np.array(document)], vocab_size=VOCAB_SIZE)
        expected = evaluate(model, corpus, num_lanes=1, rollout_length=2).with_memory.nll
        assert_close(session_nll(model, document).sum(), torch.tensor(expected, dtype=torch.float64))
    session = Session(model, batch_size=2)
    session.feed([document[:-1] for document in documents])
    session.next_token_logits()
    session.feed([document[-1:] for document in documents])
    for logits, document in zip(session.next_token_logits(), documents, strict=True):
        assert_close(logits, logits_of(model, document))


@pytest.mark.parametrize("name", TYPES)
def test_a_subclass_that_reads_otherwise_predicts_what_it_reads(name):
    model = tiny_baseline(name)

    class Own(type(model)):
        def _read(self, x, *, memory, num_tokens, **options):
            hidden, memory = super()._read(x, memory=memory, num_tokens=num_tokens, **options)
            return hidden + x, memory

    own = Own(model.config).double().eval()
    own.load_state_dict(model.state_dict())
    assert_predicts_what_it_reads(own)


def test_a_model_whose_states_depend_on_the_number_of_tokens_predicts_what_it_reads():
    class Own(LSTM):
        def _read(self, x, *, memory, num_tokens):
            num_tokens = torch.full((len(x),), x.shape[1]) if num_tokens is None else num_tokens
            hidden, memory = super()._read(x, memory=memory, num_tokens=num_tokens)
            return hidden * num_tokens[:, None, None], memory

    own = Own(tiny_baseline("lstm").config).double().eval()
    session = Session(own, batch_size=2)
    session.feed([[1, 2, 3], [4]])
    for logits, row in zip(session.next_token_logits(), ([1, 2, 3], [4]), strict=True):
        assert_close(logits, logits_of(own, row))


@pytest.mark.parametrize("name", ["transformer-xl", "compressive", "recurrent memory"])
def test_other_modules_in_the_place_of_layers_are_used(name):
    model = tiny_baseline(name)
    model.layers[1] = Doubled(model.layers[1])
    assert_predicts_what_it_reads(model)


def test_hooks_of_an_lstm_are_called_for_single_tokens():
    def doubled(module, inputs, output):
        sequence = output[0]
        packed = isinstance(sequence, PackedSequence)
        return (sequence._replace(data=2 * sequence.data) if packed else 2 * sequence, output[1])

    model = tiny_baseline("lstm")
    model.layers[0].register_forward_hook(doubled)
    assert_predicts_what_it_reads(model)


@pytest.mark.parametrize("name", TYPES)
def test_layer_norms_may_have_another_dtype(name):
    model = tiny_baseline(name).bfloat16()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    session = Session(model)
    session.feed([1, 2])
    assert session.next_token_logits().isfinite().all()


@baselines
def test_an_interrupt_after_a_training_step_leaves_nothing_of_the_old_weights(name, monkeypatch):
    model = tiny_baseline(name)
    session = Session(model)
    session.feed([1, 2])
    session.next_token_logits()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)

    def interrupted(self, memory):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(model), "begin_segment", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.next_token_logits()
    assert_close(session.next_token_logits(), copy.deepcopy(session).next_token_logits())


def test_an_interrupt_while_chosen_rows_are_copied_loses_nothing(monkeypatch):
    model = tiny_baseline("transformer-xl")
    session = Session(model, batch_size=2)
    session.feed([[1, 2], [3]])
    session.next_token_logits()

    def interrupted(self, rows):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SegmentState, "select_rows", interrupted)
        session.select_rows([1, 1, 0])
        with pytest.raises(KeyboardInterrupt):
            session.next_token_logits()
    session.select_rows([2, 0])
    for logits, row in zip(session.next_token_logits(), ([1, 2], [3]), strict=True):
        assert_close(logits, logits_of(model, row))


@baselines
def test_a_training_step_between_two_tokens_is_noticed(name):
    model = tiny_baseline(name)
    session, other = Session(model), Session(model)
    for each in (session, other):
        each.feed([1, 2])
    session.next_token_logits()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert_close(session.next_token_logits(), other.next_token_logits())


def test_a_session_of_another_model_and_a_compiled_one_are_refused(tmp_path):
    model = tiny_baseline("lstm")
    with pytest.raises(InputError, match="an lstm cannot be compiled in a session"):
        Session(model, compiled=True)
    session = Session(model)
    session.feed([1, 2])
    session._streams.context.previous.fill_(model.bos_token_id + 1)
    session.save(tmp_path / "session")
    with pytest.raises(CheckpointError, match="the token before the pending tokens is outside the vocabulary"):
        Session.load(tmp_path / "session", model=model)
    with pytest.raises(CheckpointError, match="another model"):
        Session.load(tmp_path / "session", model=tiny_baseline("transformer-xl"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("baselines")
    (base / "texts").mkdir()
    for seed in range(8):
        (base / "texts" / f"{seed}.txt").write_text(make_text(seed))
    return base


def config_of(base, model_type):
    config = {
        "folder": str(base / model_type),
        "threads": 1,
        "device": "cpu",
        "model_type": model_type,
        "model": {"d_model": 16, "segment_length": 8},
        "data": {"train": {"kind": "text", "path": str(base / "texts")}, "cache": str(base / "cache")},
        "training": {"num_updates": 4, "num_lanes": 2, "rollout_length": 2, "sample_tokens": 10, "save_every": 2},
    }
    file = base / f"{model_type}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.mark.parametrize("model_type", [BASELINES[name][0].model_type for name in TYPES])
def test_the_commands_support_every_model_type(base, model_type):
    file, run = config_of(base, model_type), base / model_type
    trained = call_json("train", file)
    assert load_model(run / "best").config.model_type == model_type
    assert yaml.safe_load((run / "config.yaml").read_text())["model_type"] == model_type
    evaluated = call_json("evaluate", run)
    assert evaluated["with_memory"] == trained["with_memory"]
    generated = call_json("generate", run, "--prompt", "the cat", "--max_new_tokens", "12", "--seed", "1")
    assert len(generated["token_ids"]) == 12
    status, _, error = call("retention", run, "--delays", "1", "2")
    assert status == 0, error
    assert json.loads((run / "retention.json").read_text())["segment_length"] == 8
    (run / "evaluation.json").unlink()
    assert call_json("train", run, "--resume", "--training.num_updates", "6")["run"] == str(run)


def test_the_model_type_determines_the_options(base):
    lstm, memformer = config_of(base, "lstm"), config_of(base, "memformer")
    assert "unknown option --model.num_slots" in refused("train", lstm, "--model.num_slots", "4")
    assert "model_type ('gru') in --model_type must be one of memformer, lstm" in refused(
        "train", lstm, "--model_type=gru"
    )
    assert "num_layers" in refused("train", memformer, "--model.num_layers", "2")
    status, out, _ = call("train", "--model_type", "transformer_xl", "--help")
    assert status == 0
    assert "--model.memory_length" in out
    assert "  --model.num_slots" not in out
    assert "needs model_type 'memformer', not 'lstm'" in refused("train", lstm, "--training.write_penalty", "0.1")


def test_options_for_a_memformer_only_are_refused_for_others():
    lstm = type(tiny_baseline("lstm").config)()
    with pytest.raises(InputError, match=r"model_type \('memformer'\) must be 'lstm'"):
        RunConfig(model=lstm)
    with pytest.raises(InputError, match="training.sharding needs model_type 'memformer', not 'lstm'"):
        RunConfig(model_type="lstm", model=lstm, training=TrainingConfig(sharding="optimizer_state"))
    assert RunConfig(model=MemformerConfig(), data=DataConfig()).model_type == "memformer"
