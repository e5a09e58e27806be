"""Inspection: weights are those of `encode`, sums those of `evaluate`; splits, windows and samples change nothing."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer import AttentionRecord, InputError, Rollout, evaluate
from memformer.data import ByteTokenizer, PixelTokenizer, corpus_from_arrays
from memformer.evaluation import inspection, streams
from memformer.evaluation.inspection import InspectionOptions, check_can_inspect, inspect_memory
from memformer.evaluation.inspection_page import json_in_html
from memformer.evaluation.inspection_parts import Sampler
from memformer.evaluation.inspection_results import HOLDING_FROM, KINDS, InspectedTimestep, kind_of
from memformer.evaluation.streams import TokenTexts, read_stream
from tests.data.streams import one_lane
from tests.evaluation.corpora import documents
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, tiny_model
from tests.models.baselines import TYPES, tiny_baseline

LENGTH = 9 * SEGMENT_LENGTH + 2


def stream_of(model, pieces):
    return read_stream(pieces, segment_length=SEGMENT_LENGTH, bos_token_id=model.bos_token_id)


def inspected(model, array, **options):
    return inspect_memory(model, stream_of(model, [array]), options=InspectionOptions(**options))


@pytest.fixture(scope="module")
def array():
    return documents([LENGTH])[0]


def read_by_hand(model, array):
    """Yield the segment and the attention record of every timestep."""
    memory, segment = model.initial_memory(1), torch.tensor([[model.bos_token_id]])
    for start in range(0, len(array), SEGMENT_LENGTH):
        record = AttentionRecord()
        with torch.no_grad():
            _, memory = model.encode(segment, memory=memory, attention=record)
        yield segment[0].tolist(), record
        segment = torch.tensor(array[None, start : start + SEGMENT_LENGTH])


def test_weights_are_those_of_the_attention_record(variant, array):
    if variant.get("num_slots") == 0:
        pytest.skip("a model without memory is refused")
    model = tiny_model(**variant)
    found = inspected(model, array, num_probes=1)
    by_hand = list(read_by_hand(model, array))
    assert len(found.timesteps) == len(by_hand) == found.num_timesteps == 10
    for timestep, (ids, record) in zip(found.timesteps, by_hand, strict=True):
        assert timestep.read_ids == ids
        writer = record.writer[0].mean(dim=0)
        np.testing.assert_allclose(timestep.writer, writer, atol=1e-12)
        for layer, reader in zip(timestep.readers, record.reader, strict=True):
            np.testing.assert_allclose(layer, reader[0].mean(dim=0), atol=1e-12)
        np.testing.assert_allclose(timestep.kept, writer[:, 0] * record.left[0], atol=1e-12)
        assert (timestep.kept >= 0).all()
        assert (timestep.kept <= 1).all()


@pytest.mark.parametrize("name", ["recurrent memory", "recurrent memory, one token"])
def test_a_recurrent_memory_transformer_has_weights_but_no_forgetting_vectors(name, array):
    model = tiny_baseline(name)
    found = inspected(model, array, num_probes=1, probe_timesteps=4)
    expected = evaluate(model, corpus_from_arrays([array], VOCAB_SIZE))
    assert found.nll == pytest.approx(expected.with_memory.nll, rel=1e-10)
    assert found.nll_erased == pytest.approx(expected.memory_erased.nll, rel=1e-10)
    memory = model.initial_memory(1)
    for timestep in found.timesteps:
        record = AttentionRecord()
        with torch.no_grad():
            _, memory = model.encode(torch.tensor([timestep.read_ids]), memory=memory, attention=record)
        np.testing.assert_allclose(timestep.writer, record.writer[0].mean(dim=0), atol=1e-12)
        np.testing.assert_allclose(timestep.readers, torch.cat(record.reader).mean(dim=1), atol=1e-12)
        np.testing.assert_array_equal(timestep.kept, timestep.writer[:, 0])
        sums = timestep.writer.sum(axis=1)
        assert np.allclose(sums, 1) if len(sums) == 1 else (sums < 1).all()
    for slot in found.slots:
        assert (slot.forgetting_norm, slot.half_life, slot.num_probes) == (None, None, 1)
    assert json.dumps(found.to_dict())


@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 3 * SEGMENT_LENGTH), min_size=1, max_size=4))
def test_surprisals_sum_to_what_evaluate_says(lengths):
    model = tiny_model()
    lengths = [*lengths, SEGMENT_LENGTH + 1]
    corpus = corpus_from_arrays(documents(lengths), VOCAB_SIZE)
    found = inspect_memory(model, one_lane(model, corpus))
    expected = evaluate(model, corpus)
    assert found.num_tokens == expected.with_memory.num_tokens == sum(lengths)
    assert found.num_documents == len(lengths)
    assert found.nll == pytest.approx(expected.with_memory.nll, rel=1e-10)
    assert found.nll_erased == pytest.approx(expected.memory_erased.nll, rel=1e-10)
    assert sum(timestep.nll.sum() for timestep in found.timesteps) == pytest.approx(found.nll, rel=1e-10)
    assert sum(timestep.nll_erased.sum() for timestep in found.timesteps) == pytest.approx(found.nll_erased, rel=1e-10)


def assert_same(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-8, abs=2e-6)  # arrays are rounded to 6 decimals
    else:
        assert found == expected


def test_any_split_into_pieces_and_rollouts_gives_the_same(array, monkeypatch):
    model = tiny_model()
    expected = inspected(model, array).to_dict()
    assert json.dumps(expected, allow_nan=False)
    for cuts, num_segments in (([1], 1), ([5, 6, 7, 30], 2), ([SEGMENT_LENGTH, 4 * SEGMENT_LENGTH], 4), ([30], 100)):
        monkeypatch.setattr(streams, "_TOKENS_AT_ONCE", num_segments * SEGMENT_LENGTH)
        pieces = np.split(array, cuts)
        assert_same(inspect_memory(model, stream_of(model, pieces)).to_dict(), expected)
    corpus = corpus_from_arrays([array], VOCAB_SIZE)
    for rollout_length in (1, 4, 20):
        assert_same(inspect_memory(model, one_lane(model, corpus, rollout_length)).to_dict(), expected)


def test_a_window_and_samples_keep_the_same_timesteps(array):
    model = tiny_model()
    whole = inspected(model, array).to_dict()
    for options, indices in (({"window": (3, 6)}, [3, 4, 5]), ({"max_timesteps": 3}, [0, 4, 8])):
        part = inspected(model, array, **options).to_dict()
        assert [timestep["index"] for timestep in part["timesteps"]] == indices
        assert_same(part["timesteps"], [whole["timesteps"][index] for index in indices])
        assert "kept in full (3 timesteps); sums, slots and passages cover all of them" in part["selection"]
        for key in whole.keys() - {"timesteps", "selection"}:
            assert_same(part[key], whole[key])
    assert whole["selection"] == "All 10 timesteps are kept in full."
    beyond = [inspected(model, array, window=window).to_dict()["selection"] for window in ((8, 20), (10, 20))]
    assert beyond[0].startswith("Timesteps 8 to 9 of the stream's 10 are kept in full (2 timesteps)")
    assert beyond[1].startswith("No timestep is kept in full: the window begins at timestep 10, and the stream has 10")


def empty_timestep(index):
    empty = np.empty(0)
    fields = {"read_ids": [], "target_ids": [], "read_texts": [], "target_texts": []}
    arrays = {"kept": empty, "writer": empty, "readers": empty, "nll": empty, "nll_erased": empty}
    return InspectedTimestep(index=index, document=0, timestep=index, **fields, **arrays)


@given(num_timesteps=st.integers(1, 300), most=st.integers(1, 40))
def test_samples_are_evenly_spaced_and_few(num_timesteps, most):
    sampler = Sampler(None, most)
    for index in range(num_timesteps):
        if sampler.wants(index):
            sampler.add(empty_timestep(index))
        assert len(sampler.timesteps) <= most
    indices = [timestep.index for timestep in sampler.timesteps]
    assert indices[0] == 0
    assert len(set(np.diff(indices))) <= 1
    if num_timesteps > most:
        assert len(indices) > most / 2 - 1
        assert indices[-1] + (indices[1] if len(indices) > 1 else num_timesteps) >= num_timesteps


def test_passages_are_the_ones_with_the_largest_gains(array):
    model = tiny_model()
    found = inspected(model, array, num_passages=4, passage_tokens=4)
    gains = {}
    for timestep in found.timesteps:
        for start in range(0, len(timestep.target_ids), 4):
            part = slice(start, start + 4)
            gains[timestep.index, start] = (timestep.nll_erased[part] - timestep.nll[part]).sum()
    best = sorted((gain for gain in gains.values() if gain > 0), reverse=True)[:4]
    assert [passage.gain for passage in found.passages] == pytest.approx(best)
    for passage in found.passages:
        assert passage.gain == pytest.approx(gains[passage.index, passage.first_token])
        timestep = found.timesteps[passage.index]
        assert passage.token_ids == timestep.target_ids[passage.first_token : passage.first_token + 4]
        read = timestep.readers.mean(axis=(0, 1))
        assert [slot.slot for slot in passage.slots] == np.argsort(-read, kind="stable")[:3].tolist()
        assert passage.slots[0].weight == pytest.approx(read.max())
        for slot in passage.slots:
            earlier = [
                earlier.timestep
                for earlier in found.timesteps[1 : passage.index]
                if earlier.writer[slot.slot, 0] < HOLDING_FROM
            ]
            assert (slot.last_write and slot.last_write.timestep) == (earlier[-1] if earlier else None)
    none = inspected(model, array, num_passages=0)
    assert (none.passages, none.max_passages, found.max_passages) == ([], 0, 4)


def test_slots_summarize_all_timesteps_but_the_first(array):
    model = tiny_model()
    found = inspected(model, array)
    own = np.array([timestep.writer[:, 0] for timestep in found.timesteps[1:]])
    kinds = kind_of(own)
    for name, number in zip(KINDS, range(3), strict=True):
        assert found.kind_shares[name] == pytest.approx((kinds == number).mean())
    for slot in found.slots:
        column = kinds[:, slot.slot].tolist()
        assert column.count(KINDS.index(slot.kind)) == max(column.count(number) for number in range(3))
        assert slot.mean_own_weight == pytest.approx(own[:, slot.slot].mean())
        assert slot.mean_kept == pytest.approx(np.mean([step.kept[slot.slot] for step in found.timesteps[1:]]))
        written = [index for index, kind in enumerate(column, start=1) if kind != 0]
        assert (slot.last_write and slot.last_write.timestep) == (written[-1] if written else None)
        if slot.last_write:
            weights = found.timesteps[written[-1]].writer[slot.slot, 1:]
            assert (slot.last_write.token, slot.last_write.weight) == (weights.argmax(), pytest.approx(weights.max()))
    heads = kind_of(np.array([record.writer[0, :, :, 0] for _, record in read_by_hand(model, array)][1:]))
    for name, number in zip(KINDS, range(3), strict=True):
        assert found.kind_shares_of_heads[name] == pytest.approx((heads == number).mean())
    assert found.kind_shares != found.kind_shares_of_heads
    assert sum(found.kind_shares.values()) == pytest.approx(1)


def test_the_text_of_a_write_has_whole_characters():
    model = tiny_model(vocab_size=256)
    text = "äöü€" * SEGMENT_LENGTH  # segments begin inside characters
    stream = stream_of(model, [np.frombuffer(text.encode(), np.uint8)])
    found = inspect_memory(model, stream, tokenizer=ByteTokenizer(), options=InspectionOptions(num_passages=99))
    reads = [read for passage in found.passages for read in passage.slots]
    texts = [each.last_write.text for each in (*found.slots, *reads) if each.last_write]
    assert "".join(texts)
    assert set("".join(texts)) <= set(text)


def test_a_text_of_one_segment_is_refused_because_the_memory_never_takes_it(array):
    model = tiny_model()
    with pytest.raises(InputError, match=rf"needs a document of at least {SEGMENT_LENGTH + 1} tokens"):
        inspected(model, array[:SEGMENT_LENGTH])
    assert inspected(model, array[: SEGMENT_LENGTH + 1]).num_timesteps == 2
    # A Recurrent Memory Transformer takes a segment while it predicts it.
    assert inspected(tiny_baseline("recurrent memory"), array[:SEGMENT_LENGTH]).num_timesteps == 1


def test_a_new_document_has_no_earlier_writes():
    model = tiny_model()
    first, second = documents([5 * SEGMENT_LENGTH, 2 * SEGMENT_LENGTH])
    corpus = corpus_from_arrays([first, second], VOCAB_SIZE)
    options = InspectionOptions(num_passages=50, passage_tokens=2)
    found = inspect_memory(model, one_lane(model, corpus), options=options)
    alone = inspected(model, second, num_passages=50, passage_tokens=2)
    assert found.num_documents == 2
    assert [(step.document, step.timestep) for step in found.timesteps] == [(0, t) for t in range(5)] + [(1, 0), (1, 1)]
    for step, expected in zip(found.timesteps[5:], alone.timesteps, strict=True):
        np.testing.assert_allclose(step.writer, expected.writer, atol=1e-12)
        np.testing.assert_allclose(step.nll, expected.nll, atol=1e-10)
    last = [passage for passage in found.passages if passage.document == 1]
    assert [passage.text for passage in last] == [passage.text for passage in alone.passages]
    assert all(slot.last_write is None for passage in last for slot in passage.slots)


def test_a_timestep_of_padding_alone_counts_for_no_slot(array):
    model = tiny_model()
    rollout = next(one_lane(model, corpus_from_arrays([array[: 3 * SEGMENT_LENGTH]], VOCAB_SIZE), rollout_length=3))
    padding = torch.zeros_like(rollout.inputs, dtype=torch.bool)
    padding[-1] = True
    padding[0, :, 1:] = True
    no_target = torch.zeros_like(padding)
    no_target[-1] = True
    found = inspect_memory(model, [dataclasses.replace(rollout, input_padding=padding, target_padding=no_target)])
    assert found.num_timesteps == 3
    assert found.timesteps[-1].read_ids == []
    # The first timestep reads [BOS], so the second one alone counts.
    assert all(sum(slot.kind_shares.values()) == 1 for slot in found.slots)
    assert [slot.mean_own_weight for slot in found.slots] == pytest.approx(found.timesteps[1].writer[:, 0].tolist())


def test_measured_half_lives_come_from_probes(array):
    model = tiny_model(forgetting_speeds=(2.0, 1e-4), write_temperature=1.0)
    found = inspected(model, array, num_probes=1, probe_timesteps=3)
    assert found.num_probes == 1
    assert all(slot.num_probes == 1 and slot.share_left is not None for slot in found.slots)
    assert found.slots[0].half_life_measured <= 1
    never = inspected(model, array, num_probes=0)
    assert {(slot.half_life_measured, slot.share_left, slot.num_probes) for slot in never.slots} == {(None, None, 0)}
    few = inspected(model, array, max_probed_slots=2)
    assert [slot.slot for slot in few.slots if slot.num_probes] == [0, 4]
    assert few.num_probed_slots == 2


def test_long_texts_are_thinned(monkeypatch):
    (array,) = documents([127 * SEGMENT_LENGTH])
    assert len(inspected(tiny_model(), array).timesteps) == 127  # as many as are predicted
    (array,) = documents([129 * SEGMENT_LENGTH])
    assert len(inspected(tiny_model(), array).timesteps) == 65
    monkeypatch.setattr(inspection, "_KEPT_WEIGHTS", 1)
    assert len(inspected(tiny_model(), array).timesteps) <= 4


@given(text=st.text(max_size=60), cut=st.integers(0, 60))
def test_texts_of_tokens_join_to_the_text(text, cut):
    ids = list(text.encode())
    texts = TokenTexts(ByteTokenizer())
    first, second = texts.of(ids[:cut]), texts.of(ids[cut:], before=ids[:cut])
    assert len(first) + len(second) == len(ids)
    assert "".join([*first, *second]) == text


def test_texts_of_special_tokens_and_pixels():
    assert TokenTexts(ByteTokenizer()).of([256]) == ["[BOS]"]
    assert TokenTexts(PixelTokenizer(4, 2, 2)).of([0, 3]) == ["0", "3"]
    assert TokenTexts(PixelTokenizer(4, 2, 2)).of([4]) == ["[BOS]"]
    assert TokenTexts(PixelTokenizer(4, 2, 2)).image_width == 2
    assert TokenTexts(None).of([1]) == []


def test_the_example_in_the_docs_runs(capsys):
    document = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL)
    exec(compile(example, "inspect.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "(4,) (4, 9) (4, 8, 4)"


def test_json_cannot_end_a_script_element():
    text = "</script><!-- <script>"
    assert "<" not in json_in_html({"text": text})
    assert json.loads(json_in_html({"text": text})) == {"text": text}


@pytest.mark.parametrize("name", [name for name in TYPES if name != "recurrent memory"])
def test_models_without_slots_are_refused(name):
    with pytest.raises(InputError, match=r"^the model is an? \w+, whose memory has no slots"):
        check_can_inspect(tiny_baseline(name))


def test_bad_input_is_refused(array):
    with pytest.raises(InputError, match="^num_slots is 0: the model has no memory to inspect"):
        inspected(tiny_model(num_slots=0), array)
    model = tiny_model()
    with pytest.raises(InputError, match="^the stream has no token"):
        inspected(model, array[:0])
    two = Rollout(inputs=torch.zeros(1, 2, 3, dtype=torch.int64), targets=torch.zeros(1, 2, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="^a rollout has 2 rows"):
        inspect_memory(model, [two])
    with torch.no_grad():
        model.embedding.weight.fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        inspected(model, array)


@pytest.mark.parametrize("as_piece", [list, torch.tensor, np.asarray])
def test_pieces_of_a_stream_are_lists_arrays_or_tensors(as_piece):
    (rollout,) = read_stream([as_piece([1, 2]), as_piece([3])], segment_length=4, bos_token_id=9)
    assert rollout.targets[0, 0, :3].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([np.zeros((2, 2), np.int64)], r"token ids have shape \(2, 2\)"),
        ([[9]], "token id 9 is outside the vocabulary; valid ids are 0 to 8"),
    ],
)
def test_wrong_pieces_of_a_stream_are_refused(pieces, message):
    with pytest.raises(InputError, match=message):
        list(read_stream(pieces, segment_length=4, bos_token_id=9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_timesteps": 0}, r"max_timesteps \(0\) must be at least 1"),
        ({"window": (3,)}, r"window \(\[3\]\) must be a first timestep and a larger"),
        ({"window": (3, 3)}, r"window \(\[3, 3\]\) must be"),
        ({"window": (0, 3), "max_timesteps": 3}, "window and max_timesteps are both given"),
        ({"num_probes": -1}, r"num_probes \(-1\) must be at least 0"),
        ({"passage_tokens": 0}, r"passage_tokens \(0\) must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        InspectionOptions(**options)
