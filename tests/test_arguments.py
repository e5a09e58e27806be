"""Arguments of other types than the annotated ones: numpy numbers, integral floats, iterators, single values, paths."""

import json
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from memformer import (
    InputError,
    InputTypeError,
    MemformerConfig,
    Rollout,
    Session,
    TransformerXLConfig,
    backpropagate,
    evaluate,
)
from memformer.data import CurriculumConfig, LaneStream, MultitaskConfig, PixelTokenizer, RecallConfig, SourceConfig
from memformer.data.corpus import corpus_from_arrays
from memformer.data.tokenizer_training import TokenizerConfig
from memformer.evaluation.document_retention import measure_documents
from memformer.evaluation.inspection import inspect_memory
from memformer.evaluation.streams import read_stream
from memformer.training.config import DataConfig, RunConfig, TrainingConfig
from memformer.training.engine import ReplayEngine
from memformer.utils.checks import check_integer, check_integers, check_number
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, random_rollout, tiny_config, tiny_model

FOURS = [4, np.int64(4), np.uint8(4), 4.0, np.float32(4), np.array(4), torch.tensor(4), torch.tensor(4.0), Fraction(4)]


@pytest.mark.parametrize("four", FOURS, ids=lambda value: f"{type(value).__name__} {value!r}")
def test_an_integer_of_any_type_is_taken(four):
    """Integers and numbers of any type are taken as such."""
    for found in (check_integer("n", four, 0, 9), *check_integers("n", four, 0), *check_integers("n", iter([four]), 0)):
        assert (type(found), found) == (int, 4)
    found = check_number("n", four, minimum=0)
    assert type(found) in (int, float)
    assert found == 4


@pytest.mark.parametrize(
    ("wrong", "is_list"),
    [
        *(
            (each, False)
            for each in ("4", b"4", True, np.True_, torch.tensor(True), None, 4.5, np.nan, float("inf"), 4j)
        ),
        *((each, True) for each in (np.ones(1), [4])),
    ],
)
def test_other_values_are_refused(wrong, is_list):
    with pytest.raises(InputTypeError, match=r"^n \(.*\) must be an integer$"):
        check_integer("n", wrong, 0)
    if not is_list:
        with pytest.raises(InputTypeError, match=r"^n \(.*\) must be (an integer|integers)$"):
            check_integers("n", wrong, 0)


def test_generation_takes_numbers_of_any_type_and_stop_ids_of_any_kind():
    """A single stop token id, an iterator, an array and None are taken."""
    options = {"temperature": np.float32(1), "top_k": 4.0, "top_p": Fraction(1, 2), "seed": np.int64(0)}
    expected = Session(tiny_model()).generate(30, temperature=1.0, top_k=4, top_p=0.5, seed=0)
    assert Session(tiny_model(), batch_size=np.int64(1)).generate(np.float64(30), **options) == expected
    stop = expected[3]
    until = expected[: expected.index(stop) + 1]
    for ids in (stop, [stop], {stop}, np.array([stop]), torch.tensor(stop), iter([stop]), (each for each in [stop])):
        assert Session(tiny_model()).generate(30, **options, stop_token_ids=ids) == until
    assert Session(tiny_model()).generate(30, **options, stop_token_ids=None) == expected
    for wrong in ("3", "ab", 1.5, [VOCAB_SIZE], -1):
        with pytest.raises(InputError, match=r"^stop token id \(.*\) must be"):
            Session(tiny_model()).stream(1, stop_token_ids=wrong)


def test_configs_hold_plain_values_and_can_be_written():
    """Configs take numpy numbers, integral floats, paths, lists and iterators."""
    model = tiny_config(num_slots=np.int64(5), d_ff=32.0, forgetting_speeds=np.array([0.5, 0.25]), convolution_kernel=3)
    recall = RecallConfig(
        num_keys=np.int32(32), num_facts=iter([1, 1]), curriculum=CurriculumConfig(window=20.0), max_distance=9.0
    )
    config = RunConfig(
        folder=Path("runs"),
        seed=np.int64(3),
        threads=np.float64(1),
        model=model,
        data=DataConfig(recall=recall, cache=Path("cache"), validation_fraction=np.float32(0.5)),
        training=TrainingConfig(num_updates=1e3, betas=[0.5, np.float32(0.75)], learning_rate=np.float64(1)),
    )
    written = config.to_dict()
    assert yaml.safe_load(yaml.safe_dump(written)) == json.loads(json.dumps(written))
    assert (written["folder"], written["seed"], written["training"]["num_updates"]) == ("runs", 3, 1000)
    assert written["model"]["forgetting_speeds"] == [0.5, 0.25]
    assert model == tiny_config(forgetting_speeds=(0.5, 0.25), convolution_kernel=3)
    source = SourceConfig(path=[Path("a"), "b"], levels=256.0)
    assert (source.path, source.levels) == (["a", "b"], 256)
    assert TokenizerConfig(kind="bpe", vocab_size=300.0).vocab_size == 300
    assert MultitaskConfig(mean_span=np.float32(2)).mean_span == 2.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingConfig(num_updates="many"), r"^training\.num_updates \('many'\) must be an integer$"),
        (lambda: TrainingConfig(method=3), r"^training\.method \(3\) must be one of replay, bptt, checkpoint$"),
        (lambda: TrainingConfig(compiled=1), r"^training\.compiled \(1\) must be true or false$"),
        (lambda: TrainingConfig(betas=0.9), r"^training\.betas \(0\.9\) must be a list of numbers$"),
        (lambda: TrainingConfig(betas=(0.9,)), r"^training\.betas \(\[0\.9\]\) must be 2 numbers$"),
        (lambda: RunConfig(folder=None), r"^folder \(None\) must be a text$"),
        (lambda: RunConfig(folder="\udcff"), r"^folder \('\\udcff'\) must be UTF-8"),
        (lambda: RunConfig(training={}), r"^training \(\{\}\) must be of class TrainingConfig$"),
        (lambda: MemformerConfig(d_model="64"), r"^d_model \('64'\) must be an integer$"),
        (lambda: MemformerConfig(num_slots=2.5), r"^num_slots \(2\.5\) must be an integer$"),
        (lambda: MemformerConfig(positions="none"), r"^positions \('none'\) must be one of rotary, relative$"),
        (lambda: TransformerXLConfig(dropout="0.1"), r"^dropout \('0\.1'\) must be a number$"),
        (lambda: SourceConfig(path=5), r"^path \(5\) must be a text \(in YAML, put it in quotes\)$"),
        (lambda: SourceConfig(kind=["text"]), r"^kind \(\['text'\]\) must be one of text, jsonl"),
        (lambda: TokenizerConfig(kind="byte"), r"^kind \('byte'\) must be one of bytes, bpe, word, pretrained, bins$"),
        (lambda: RecallConfig(num_facts=3), r"^data\.recall\.num_facts \(3\) must be a list of integers$"),
    ],
)
def test_a_config_names_the_value_and_the_rule(make, message):
    with pytest.raises(InputTypeError if "one of" not in message else InputError, match=message):
        make()


def test_functions_on_documents_take_numbers_of_any_type():
    tokens = np.arange(40) % VOCAB_SIZE
    corpus = corpus_from_arrays(([int(each) for each in tokens], tokens[:9]), np.int64(VOCAB_SIZE), iter([40, 9]))
    assert corpus.subset(np.int64(1)).num_tokens == corpus.subset(iter([1.0])).num_tokens == 9
    assert corpus.document(np.int64(1)).tolist() == tokens[:9].tolist()
    train, held_out = corpus.split(np.float32(0.5), np.int64(0))
    assert {train.num_tokens, held_out.num_tokens} == {40, 9}
    numbers = {"num_lanes": np.int64(2), "segment_length": 6.0, "rollout_length": np.uint8(3), "seed": np.int64(0)}
    rollout = next(LaneStream(corpus, **numbers, bos_token_id=float(VOCAB_SIZE)))
    assert rollout.inputs.shape == (3, 2, SEGMENT_LENGTH)
    assert isinstance(LaneStream(corpus, **numbers, bos_token_id=VOCAB_SIZE).state()["seed"], int)
    model = tiny_model()
    assert evaluate(model, corpus, num_lanes=np.int64(1), rollout_length=2.0).with_memory.num_tokens == 49
    assert list(measure_documents(model, corpus, delays=iter([2.0]), num_lanes=1.0).delayed_nll) == [0, 2]
    assert list(measure_documents(model, corpus, delays=np.int64(1)).delayed_nll) == [0, 1]
    assert PixelTokenizer(np.int64(4), 2.0, 2).levels == 4
    for wrong in ("1", [0, "x"], np.array([0.5])):
        with pytest.raises(InputTypeError, match="document ind.* must be (an integer|integers)"):
            corpus.subset(wrong)


def test_tokens_and_rollouts_of_another_type_are_refused_in_one_sentence():
    """`encode([1, 2, 3])` and `backpropagate(model, tensor)` name the argument and its type."""
    model = tiny_model()
    with pytest.raises(InputTypeError, match=r"^segment is of class list; it must be a Tensor of token ids, \(rows, "):
        model.encode([1, 2, 3])
    with pytest.raises(InputTypeError, match=r"^targets is of class ndarray; it must be a Tensor"):
        model.decode(np.zeros((1, 3), np.int64), hidden=model.encode(torch.ones(1, 3, dtype=torch.int64))[0])
    with pytest.raises(InputTypeError, match=r"^rollout is of class Tensor; it must be a Rollout$"):
        backpropagate(model, torch.ones(2, 2, 3, dtype=torch.int64))
    engine = ReplayEngine(model)
    with pytest.raises(InputTypeError, match=r"^rollout is of class Tensor; it must be a Rollout$"):
        engine.backpropagate(torch.ones(2, 2, 3, dtype=torch.int64))
    with pytest.raises(InputTypeError, match=r"^rollout inputs is of class list; it must be a Tensor$"):
        Rollout(inputs=[[[1]]], targets=torch.ones(1, 1, 1, dtype=torch.int64))
    rollout = random_rollout(2, 2)
    for function in (partial(backpropagate, model), engine.backpropagate):
        assert function(rollout, readout_timesteps=np.int64(2), gradient_scale=np.float32(1)).num_tokens == 24
    segment = rollout.inputs[0]
    hidden, memory = model.encode(segment)
    wrong = [
        ("memory", lambda: model.encode(segment, memory=memory.tolist())),
        ("padding_mask", lambda: model.encode(segment, padding_mask=segment.numpy() == 0)),
        ("hidden", lambda: model.decode(segment.clamp(max=VOCAB_SIZE - 1), hidden=hidden.tolist())),
        ("config", lambda: type(model)({"d_model": 64})),
        ("config", lambda: type(model)(TransformerXLConfig())),
        ("corpus", lambda: evaluate(model, [np.arange(9)])),
        ("corpus", lambda: LaneStream([[1]], num_lanes=1, segment_length=1, rollout_length=1, bos_token_id=1)),
    ]
    for name, call in wrong:
        with pytest.raises(InputTypeError, match=rf"^{name} is of class \w+; it must be a "):
            call()


@pytest.mark.parametrize("row", [True, np.True_, torch.tensor(True), 1.5, "1"])
def test_a_mask_does_not_choose_rows(row):
    tokens = torch.arange(24).view(2, 3, 4)
    with pytest.raises(InputTypeError, match=r"row \(.*\) must be an integer"):
        Rollout(inputs=tokens, targets=tokens).select_rows([row, row])


def test_only_rollouts_are_inspected_and_only_integers_are_pieces_of_a_stream():
    model, ids = tiny_model(), np.arange(3)
    with pytest.raises(InputTypeError, match=r"^stream is a Corpus; it must be rollouts, such as those of read_doc"):
        inspect_memory(model, corpus_from_arrays([ids], vocab_size=VOCAB_SIZE))
    with pytest.raises(InputTypeError, match=r"^a rollout of the stream is of class ndarray; it must be a Rollout"):
        inspect_memory(model, [ids])
    with pytest.raises(InputTypeError, match=r"^options is of class dict; it must be an InspectionOptions"):
        inspect_memory(model, [], options={"num_probes": 1})
    for pieces, message in (
        ([ids + 0.9], "token ids have dtype float64; they must be integers"),
        (ids, "token ids are an int64; they must be a list"),
        ("abc", "token ids are a str; they must be a list"),
    ):
        with pytest.raises(InputTypeError, match=message):
            list(read_stream(pieces, segment_length=4, bos_token_id=9))


def test_the_engine_takes_a_bool_for_whether_it_records():
    with pytest.raises(InputTypeError, match="records is of class str; it must be a bool"):
        ReplayEngine(tiny_model(), records="no")
