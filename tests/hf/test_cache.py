"""Caches: rows that stop, going on after a call, and what is refused."""

import copy
import functools

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra hf")

from transformers import DynamicCache

import memformer
from memformer import InputError, InputTypeError, Session, hf
from memformer.data import ByteTokenizer
from tests.helpers import VOCAB_SIZE, assert_close, tiny_config, tiny_model
from tests.hf.models import BOS, left_padded, make_hf, scattered, texts


def generated(model, tokens, count, stop):
    session = Session(model.memformer)
    session.feed(tokens)
    return session.generate(count, temperature=0, stop_token_ids=stop)


@pytest.mark.parametrize("kind", ["default", "compressive, uneven"])
def test_rows_that_have_stopped_read_nothing_more(kind):
    model, rows = make_hf(kind), texts()
    ids, mask = left_padded(rows)
    # The token that ends most rows at different times.
    plain = [generated(model, tokens, 12, None) for tokens in rows]
    ends = {token: {row.index(token) for row in plain if token in row} for token in range(VOCAB_SIZE)}
    stop = max(ends, key=lambda token: len(ends[token]))
    found = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=stop,
        return_dict_in_generate=True,
    )
    new = found.sequences[:, ids.shape[1] :]
    for row, tokens in enumerate(rows):
        expected = generated(model, tokens, 12, stop)
        assert new[row].tolist() == expected + [BOS] * (new.shape[1] - len(expected))
    # Reading on with the last column gives every row all of its tokens, and no padding.
    output = model(found.sequences[:, -1:], cache=found.cache)
    for row, tokens in enumerate(rows):
        session = Session(model.memformer)
        session.feed([*tokens.tolist(), *generated(model, tokens, 12, stop)])
        assert_close(output.logits[row, 0, :VOCAB_SIZE], session.next_token_logits()[0])
        assert output.cache.session.num_tokens[row] == session.num_tokens[0]


def test_padding_inside_the_vocabulary_is_refused_where_rows_would_read_it():
    model = make_hf()
    ids, mask = left_padded(texts())
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": 4, "pad_token_id": 4}
    with pytest.raises(InputError, match=r"pad_token_id \(4\) is a token of the vocabulary.*it must be 11"):
        model.generate(ids, attention_mask=mask, **options)
    with pytest.raises(InputError, match=r"pad_token_id \(-100\) is negative"):
        model.generate(ids, attention_mask=mask, **(options | {"pad_token_id": -100}))
    for token, rule in ((model.config.vocab_size, "must be below vocab_size"), (-5, "must not be negative")):
        with pytest.raises(InputError, match=rf"eos_token_id \({token}\) {rule}"):
            model.generate(ids, attention_mask=mask, **(options | {"eos_token_id": token}))
    with pytest.raises(InputError, match="is a token of the vocabulary"):
        model.generate(
            ids[:1], do_sample=True, num_return_sequences=2, max_new_tokens=3, eos_token_id=4, pad_token_id=4
        )
    # A single row ends the call when it stops, and beams that have stopped are not read on.
    model.generate(ids[:1], attention_mask=mask[:1], **options)
    model.generate(ids, attention_mask=mask, num_beams=2, **options)


def test_a_cache_goes_on_with_new_masked_columns_in_chunks():
    model, rows = make_hf(), texts()
    ids, mask = left_padded(rows, filler=3)
    once = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, ids.shape[1] :]
    cache = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).cache
    options = {"max_new_tokens": 5, "do_sample": False, "prefill_chunk_size": 3}
    chunked = model.generate(ids[:, 6:], attention_mask=mask, cache=cache, **options)
    assert torch.equal(chunked[:, ids.shape[1] - 6 :], once)


def test_beams_go_on_from_a_cache():
    model, tokens = make_hf(), texts((13,))[0][None]
    once = model.generate(tokens, max_new_tokens=6, num_beams=3, do_sample=False)
    cache = model(tokens[:, :-1], use_cache=True).cache
    later = model.generate(tokens, cache=cache, max_new_tokens=6, num_beams=3, do_sample=False)
    assert torch.equal(later, once)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 2}], ids=["greedy", "beams", "chunks"]
)
def test_a_cache_goes_on_with_all_tokens_as_with_the_new_ones(options):
    """The turns of a conversation, as transformers passes them: everything so far, of which the cache has read most."""
    model, rows = make_hf(), texts()
    ids, mask = left_padded(rows, filler=3)
    options |= {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    turn = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    question = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    so_far = torch.cat([turn.sequences, question], dim=1)
    mask = torch.cat([mask, torch.ones(3, 7, dtype=mask.dtype)], dim=1)
    expected = model.generate(so_far, attention_mask=mask, max_new_tokens=5, **options)
    num_read = turn.cache.get_seq_length()
    assert num_read == turn.sequences.shape[1] - 1
    for start in (0, num_read):
        cache = copy.deepcopy(turn.cache)
        found = model.generate(so_far[:, start:], attention_mask=mask, cache=cache, max_new_tokens=5, **options)
        assert torch.equal(found.sequences, expected.sequences[:, start:])
        assert_close(torch.stack(found.logits)[..., :VOCAB_SIZE], torch.stack(expected.logits)[..., :VOCAB_SIZE])
        assert cache.session.num_tokens == expected.cache.session.num_tokens
    # The cache does not know which tokens its session read earlier, so it reads all that it is first given.
    cache = hf.MemformerCache(copy.deepcopy(turn.cache.session))
    before = list(cache.session.num_tokens)
    for _ in range(2):
        model.generate(so_far, attention_mask=mask, cache=cache, max_new_tokens=1, do_sample=False)
        tokens = mask.sum(dim=1).tolist()
        assert cache.session.num_tokens == [old + new for old, new in zip(before, tokens, strict=True)]
    cache.session.feed([[1], [2], [3]])
    with pytest.raises(InputError, match="was fed by other means than the cache"):
        model.generate(so_far, attention_mask=mask, cache=cache, max_new_tokens=1, do_sample=False)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 2}], ids=["greedy", "beams", "chunks"]
)
@pytest.mark.parametrize("lengths", [(3, 1, 7), (0, 0, 0), (0, 4, 1)], ids=["longer", "the same", "some longer"])
def test_a_cache_knows_its_tokens_wherever_padding_stands(options, lengths):
    """Every turn of a conversation is padded anew, so that the same tokens stand in other columns."""
    model, rows = make_hf(), texts()
    ids, mask = left_padded(rows, filler=3)
    cache = model(ids, attention_mask=mask, use_cache=True).cache
    rows = [torch.cat([row, more]) for row, more in zip(rows, texts(lengths, seed=4), strict=True)]
    options |= {"do_sample": False, "max_new_tokens": 5}
    for pad in (left_padded, scattered):
        ids, mask = pad(rows, filler=3)
        if pad is scattered:  # generation begins after the last column, which the beams of transformers count from
            ids, mask = torch.cat([ids, ids[:, :1]], dim=1), torch.cat([mask, torch.zeros_like(mask[:, :1])], dim=1)
        expected = model.generate(ids, attention_mask=mask, **options)
        again = copy.deepcopy(cache)
        assert torch.equal(model.generate(ids, attention_mask=mask, cache=again, **options), expected)
        if "num_beams" not in options:
            assert again.session.num_tokens == [len(row) + 4 for row in rows]


def test_a_turn_without_a_mask_is_known_too():
    model, tokens = make_hf(), texts((9,))[0]
    padding = torch.tensor([BOS])
    cache = model(torch.cat([padding, tokens])[None], use_cache=True).cache
    for ids in (tokens[None], torch.cat([padding, padding, tokens, tokens[:3]])[None]):
        expected = model.generate(ids, max_new_tokens=5, do_sample=False)
        again = copy.deepcopy(cache)
        assert torch.equal(model.generate(ids, cache=again, max_new_tokens=5, do_sample=False), expected)
        assert again.session.num_tokens == [int((ids != BOS).sum()) + 4]


def test_all_tokens_without_padding_and_mask_go_on_too():
    model, ids = make_hf(), texts((13,))[0][None]
    cache = model(ids[:, :9], use_cache=True).cache
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    again = copy.deepcopy(cache)
    assert torch.equal(model.generate(ids, cache=again, max_new_tokens=5, do_sample=False), expected)
    assert again.session.num_tokens == [13 + 4]
    # A longer mask says that all columns are new, whatever they hold.
    mask = torch.ones(1, 9 + 13)
    model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=1, do_sample=False)
    assert cache.session.num_tokens == [9 + 13]


@pytest.mark.parametrize("split", [1, 4, 8])
def test_pieces_of_a_constant_stream_are_read(split):
    """New tokens that are the same as all before cannot be told from these, so a mask has to."""
    model = make_hf()
    ids = torch.zeros((1, 12), dtype=torch.int64)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    cache = model(ids[:, :split], use_cache=True).cache
    mask = torch.ones(1, 12)
    found = model.generate(ids[:, split:], attention_mask=mask, cache=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, expected[:, split:])
    assert cache.session.num_tokens == [16]


def test_tokens_that_may_be_new_ones_or_a_changed_past_are_refused():
    model = make_hf()
    ids, mask = left_padded(texts())
    cache = model(ids, attention_mask=mask, use_cache=True).cache
    other = copy.deepcopy(cache)
    other.batch_select_indices(torch.tensor([0, 2, 1]))
    num_read, options = mask.sum(dim=1).tolist(), {"max_new_tokens": 2}
    message = "row {} of input_ids does not begin with the {} tokens that the cache has read; pass all"
    with pytest.raises(InputError, match=message.format(1, num_read[2])):
        model.generate(ids, attention_mask=mask, cache=other, **options)
    with pytest.raises(InputError, match=message.format(0, num_read[0])):
        model.generate(torch.tensor([[1], [2], [3]]), cache=cache, **options)
    with pytest.raises(InputError, match="cache has 3 rows, but input_ids have 2"):
        model.generate(ids[:2], attention_mask=mask[:2], cache=cache, **options)
    assert cache.session.num_tokens == num_read


FAULTS = {
    "begin": "row 0 of input_ids does not begin with the 12 tokens that the cache has read",
    "token": f"input_ids hold {VOCAB_SIZE + 7}, which is neither padding nor a token",
    "new token": f"input_ids hold {VOCAB_SIZE + 7}, which is neither padding nor a token",
    "top_k": "top_k.* has to be a strictly positive integer",
}


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 2}, {"num_return_sequences": 3, "do_sample": True}]
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_refused_call_leaves_the_cache_as_it_was(options, fault):
    model, ids = make_hf(), torch.stack(texts((9, 9)))
    cache = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True).cache
    read, rows = cache.num_read, repr(cache)
    follow = torch.cat([ids, torch.zeros(2, 8, dtype=torch.int64)], dim=1)
    wrong = {"attention_mask": None}
    if fault == "begin":
        follow = follow.flip(1)
    elif fault == "token":
        follow[1, -1] = VOCAB_SIZE + 7
    elif fault == "new token":
        follow = torch.full((2, 3), VOCAB_SIZE + 7)
        wrong = {"attention_mask": torch.ones(2, 3 + cache.get_seq_length(), dtype=torch.int64)}
    else:
        wrong["top_k"] = -1
    with pytest.raises(ValueError, match=FAULTS[fault]):
        model.generate(follow, cache=cache, max_new_tokens=3, **{"do_sample": fault == "top_k", **options}, **wrong)
    assert (cache.num_read, repr(cache)) == (read, rows)
    followed = model.generate(model.generate(ids, max_new_tokens=4, do_sample=False), cache=cache, max_new_tokens=3)
    assert followed.shape == (2, 16)


def test_a_cache_can_be_copied_selected_repeated_and_reset():
    model = make_hf()
    ids, mask = left_padded(texts())
    cache = model(ids, attention_mask=mask, use_cache=True).cache
    assert bool(cache)
    assert repr(cache) == f"MemformerCache(3 rows, {ids.shape[1]} columns)"
    branch = copy.deepcopy(cache)
    next_ids = torch.tensor([[3], [5], [7]])
    expected = model(next_ids, cache=branch).logits
    assert cache.session.num_tokens == [14, 8, 3]
    other = copy.deepcopy(cache)
    other.batch_select_indices(torch.tensor([False, True, True]))
    assert_close(model(next_ids[1:], cache=other).logits, expected[1:])
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    assert_close(model(next_ids.repeat_interleave(2, dim=0), cache=cache).logits, expected.repeat_interleave(2, dim=0))
    cache.crop(0)
    with pytest.raises(InputError, match="2 tokens cannot be removed"):
        cache.crop(-2)
    cache.session.stop_token_ids = frozenset({4})
    cache.reset()
    assert cache.session.stop_token_ids == {4}
    assert cache.get_seq_length() == 0
    assert cache.get_max_length() == -1
    assert_close(model(next_ids[:1].expand(6, 1), cache=cache).logits, model(next_ids[:1]).logits.expand(6, 1, 12))


def test_sampled_rows_are_independent_and_repeat_with_the_seed():
    model = make_hf()
    tokens = texts((13,))[0][None]
    options = {
        "do_sample": True,
        "num_return_sequences": 4,
        "max_new_tokens": 12,
        "top_k": 5,
        "repetition_penalty": 1.2,
    }
    torch.manual_seed(1)
    first = model.generate(torch.cat([torch.tensor([[BOS]]), tokens], dim=1), **options)
    torch.manual_seed(1)
    assert torch.equal(model.generate(torch.cat([torch.tensor([[BOS]]), tokens], dim=1), **options), first)
    assert len({tuple(row) for row in first.tolist()}) == 4
    assert first[:, 14:].max() < VOCAB_SIZE


def test_transition_scores_are_the_log_probabilities_of_the_generated_tokens():
    model, rows = make_hf(), texts()
    ids, mask = left_padded(rows)
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    scores = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    for row, tokens in enumerate(rows):
        new = found.sequences[row, ids.shape[1] :]
        session = Session(model.memformer)
        session.feed(tokens)
        assert_close(scores[row].double(), -session.score(new), relative=1e-5)


def test_generation_begins_with_bos_alone():
    model = make_hf()
    expected = Session(model.memformer).generate(6, temperature=0)
    assert model.generate(max_new_tokens=6, do_sample=False)[0].tolist() == [BOS, *expected]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cache": DynamicCache()}, "cache is a DynamicCache; this model continues from a MemformerCache only"),
        ({"cache": hf.MemformerCache(Session(tiny_model()))}, "cache is of another model"),
        ({"attention_mask": torch.ones(3, 3)}, r"attention_mask has shape \(3, 3\)"),
        ({"attention_mask": torch.ones(3, 20)}, r"attention_mask has shape \(3, 20\).* of input_ids, \(3, 16\)$"),
        ({"attention_mask": torch.ones(3, 1, 16, 16)}, r"attention_mask has shape \(3, 1, 16, 16\)"),
        ({"attention_mask": torch.full((3, 16), 0.5)}, "attention_mask holds other values than 0"),
        ({"input_ids": torch.full((3, 16), 12)}, r"input_ids hold 12, .*token ids are 0 to 10 and 11"),
        ({"input_ids": torch.full((3, 16), -1)}, "input_ids hold -1"),
        ({"input_ids": torch.ones(3, 16)}, "input_ids have dtype torch.float32"),
        ({"input_ids": torch.ones(16, dtype=torch.int64)}, r"input_ids have shape \(16,\)"),
        ({"input_ids": torch.ones(3, 0, dtype=torch.int64)}, r"input_ids have shape \(3, 0\)"),
        ({"input_ids": [[1] * 16] * 3}, "input_ids is of class list; it must be a Tensor"),
        ({"attention_mask": [[1] * 16] * 3}, "attention_mask is of class list; it must be a Tensor"),
        ({"labels": [[1] * 16] * 3}, "labels is of class list; it must be a Tensor"),
        ({"inputs_embeds": torch.ones(3, 16, 16)}, "inputs_embeds cannot be read"),
        ({"output_attentions": True}, "output_attentions must be None or False: attention weights are not returned"),
        ({"past_key_values": DynamicCache()}, "past_key_values must be None or False: the state is passed as cache"),
        ({"labels": torch.ones(3, 4)}, r"labels have shape \(3, 4\)"),
        ({"labels": torch.full((3, 16), 5)}, r"labels\[0, \d+\] is 5, but input_ids hold \d+ there"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(changed, message):
    model = make_hf()
    ids, mask = left_padded(texts())
    with pytest.raises(InputError, match=message):
        model(**{"input_ids": ids, "attention_mask": mask, **changed})


@pytest.mark.parametrize("make", [make_hf, lambda: hf.MemformerModel(make_hf().config)])
def test_arguments_of_other_models_may_be_given_if_they_ask_for_nothing(make):
    ids, model = texts((13,))[0][None], make().eval()
    nothing = dict.fromkeys(("output_attentions", "output_hidden_states"), False)
    with torch.no_grad():
        expected = model(ids)[0]
        assert torch.equal(model(ids, **nothing, past_key_values=None, position_ids=None)[0], expected)
    with pytest.raises(InputError, match="output_hidden_states must be None or False"):
        model(ids, output_hidden_states=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'lables'"):
        model(ids, lables=None)


def test_other_uses_that_cannot_work_are_refused():
    model = make_hf()
    ids = texts((13,))[0][None]
    cache = model(ids, use_cache=True).cache
    with pytest.raises(InputError, match="cache has 1 rows, but input_ids have 2"):
        model(ids.expand(2, -1), cache=cache)
    with pytest.raises(InputError, match="cannot be resized"):
        model.resize_token_embeddings(20)
    with pytest.raises(InputError, match="cache_implementation .'static'. must not be given"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    for call in (model, functools.partial(model.generate, max_new_tokens=2)):
        with pytest.raises(InputError, match="use_cache is False, but a cache is given"):
            call(ids, cache=cache, use_cache=False)
    with pytest.raises(InputError, match=r"\(1, 16\); .* \(1, 13\), or have the 13 that the cache has read in front"):
        model(ids, attention_mask=torch.ones(1, 16), cache=cache)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids, max_new_tokens=2, assistant_model=make_hf())
    with pytest.raises(InputTypeError, match=r"logits_to_keep \(\[1\]\) must be an integer"):
        model(ids, logits_to_keep=[1])
    with pytest.raises(InputError, match=r"logits_to_keep \(-2\) must be at least 0"):
        model(ids, logits_to_keep=-2)
    with pytest.raises(InputError, match=r"shape \(2,\) of torch.float32; it must be a number, or a list of integers"):
        model(ids, logits_to_keep=torch.ones(2))
    cache = model(ids, use_cache=True).cache
    for kept, message in (([13], "columns of input_ids, from 0 to 12"), ([True], "a mask of 1 columns; .* have 13")):
        with pytest.raises(InputError, match=message):
            model(ids, cache=cache, logits_to_keep=torch.tensor(kept))
    assert cache.session.num_tokens == [13]  # nothing was read
    with pytest.raises(InputError, match="inputs_embeds cannot be read"):
        model.generate(inputs_embeds=torch.ones(1, 4, 16), max_new_tokens=2)
    model.train()
    with pytest.raises(InputError, match="a cache carries no gradient"):
        model(ids, labels=ids, cache=cache)
    with pytest.raises(InputError, match="a cache carries no gradient"):
        model(ids, use_cache=True)
    model._is_replica = True
    with pytest.raises(InputError, match="torch.nn.DataParallel cannot train this model"):
        model(ids, labels=ids)


def test_generation_stops_at_strings(tmp_path):
    """transformers hands the tokenizer, in which it looks for the strings, on to the model."""
    model = memformer.Memformer(tiny_config(vocab_size=256))
    wrapped, tokenizer = hf.as_causal_lm(model), hf.as_hf_tokenizer(ByteTokenizer())
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    text = tokenizer.decode(wrapped.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :])
    stop = text[5]
    options = {"max_new_tokens": 20, "do_sample": False, "stop_strings": [stop], "tokenizer": tokenizer}
    found = tokenizer.decode(wrapped.generate(ids, **options)[0, ids.shape[1] :])
    assert found == text[: text.index(stop) + 1]
