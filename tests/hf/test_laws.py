"""Laws of the models of transformers, for every option of every model, in float64."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="needs the extra hf")

from memformer import InputTypeError, Memformer, Session, backpropagate, hf
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, assert_close, tiny_model
from tests.hf.models import (
    BOS,
    KINDS,
    LENGTHS,
    MODELS,
    left_padded,
    make_hf,
    right_padded,
    rollout_of,
    scattered,
    session_logits,
    texts,
)


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return make_hf(name)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """A model of one of few kinds."""
    return make_hf(request.param)


@pytest.fixture(scope="module")
def expected(model):
    """The library's own logits before and after each token of each text."""
    return session_logits(model.memformer, texts())


def with_bos(tokens):
    return torch.cat([torch.tensor([BOS]), tokens])[None]


def generated(model, tokens, count, **options):
    session = Session(model.memformer)
    session.feed(tokens)
    return session.generate(count, temperature=0, **options)


@torch.no_grad()
def test_logits_are_those_of_the_library(model, expected):
    tokens, logits = texts()[0], expected[0]
    found = model(with_bos(tokens)).logits
    assert_close(found[0, :, :VOCAB_SIZE], logits)
    assert (found[..., VOCAB_SIZE:] == torch.finfo(found.dtype).min).all()
    assert found.shape[-1] == model.config.num_token_ids
    assert_close(model(tokens[None]).logits[0, :, :VOCAB_SIZE], logits[1:])


@torch.no_grad()
def test_padding_before_between_and_after_tokens_changes_nothing(model, expected):
    # Ids at padding are not read, so they can be anything.
    ids, mask = scattered(texts(), filler=12345)
    logits = model(ids, attention_mask=mask).logits[..., :VOCAB_SIZE]
    for row, values in enumerate(expected):
        # At padding, the logits are those after the last token before it.
        assert_close(logits[row], values[mask[row].cumsum(0)])


@pytest.mark.parametrize("place", [left_padded, right_padded, scattered])
@torch.no_grad()
def test_the_ids_of_bos_and_padding_are_not_read_without_a_mask(kind, place):
    ids, mask = place(texts())
    expected = kind(ids, attention_mask=mask).logits
    for row, values in enumerate(session_logits(kind.memformer, texts())):
        assert_close(expected[row, :, :VOCAB_SIZE], values[mask[row].cumsum(0)])
    assert_close(kind(ids).logits, expected)
    assert_close(kind(ids, use_cache=True).logits, expected)


@torch.no_grad()
def test_a_prompt_in_chunks_equals_one_call(model, expected):
    ids, mask = scattered(texts())
    cache, parts = None, []
    for start, end in ((0, 1), (1, 1 + SEGMENT_LENGTH), (1 + SEGMENT_LENGTH, ids.shape[1])):
        output = model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
        cache = output.cache
        parts.append(output.logits[..., :VOCAB_SIZE])
    logits = torch.cat(parts, dim=1)
    for row, values in enumerate(expected):
        assert_close(logits[row], values[mask[row].cumsum(0)])
    assert cache.get_seq_length() == ids.shape[1]
    assert cache.session.num_tokens == list(LENGTHS)


@torch.no_grad()
def test_only_the_logits_of_kept_columns_are_returned(kind):
    ids, mask = left_padded(texts())
    whole = kind(ids, attention_mask=mask).logits
    for use_cache in (False, True):
        for kept, chosen in (
            (1, slice(-1, None)),
            (np.int64(3), slice(-3, None)),
            (torch.tensor(3), slice(-3, None)),
            (torch.tensor([4, 0, 15]), [4, 0, 15]),
            (torch.arange(ids.shape[1]) % 3 == 0, torch.arange(ids.shape[1]) % 3 == 0),
            (torch.tensor([], dtype=torch.long), []),
        ):
            found = kind(ids, attention_mask=mask, use_cache=use_cache, logits_to_keep=kept).logits
            assert_close(found, whole[:, chosen])
    one = torch.tensor([True])
    assert_close(kind(ids[:, -1:], logits_to_keep=one).logits, kind(ids[:, -1:]).logits)


def test_greedy_rows_of_any_length_generate_as_a_session_does(kind):
    rows = texts()
    ids, mask = left_padded(rows)
    found = kind.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    chunked = kind.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, prefill_chunk_size=4)
    uncached = kind.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, use_cache=False)
    for row, tokens in enumerate(rows):
        expected = generated(kind, tokens, 9)
        assert found[row, ids.shape[1] :].tolist() == expected
        assert chunked[row, ids.shape[1] :].tolist() == expected
        assert uncached[row, ids.shape[1] :].tolist() == expected[:3]


def test_two_calls_generate_what_one_does(kind):
    ids, mask = left_padded(texts())
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = kind.generate(ids, attention_mask=mask, max_new_tokens=8, **options)
    mask_so_far = torch.cat([mask, mask.new_ones(len(mask), 8)], dim=1)
    second = kind.generate(first.sequences, attention_mask=mask_so_far, cache=first.cache, max_new_tokens=9, **options)
    once = kind.generate(ids, attention_mask=mask, max_new_tokens=17, do_sample=False)
    assert torch.equal(second.sequences, once)


def test_beams_are_those_of_a_plain_beam_search(kind):
    rows = texts((10, 7))
    ids, mask = left_padded(rows)
    found = kind.generate(ids, attention_mask=mask, max_new_tokens=6, num_beams=3, do_sample=False)
    for row, tokens in enumerate(rows):
        assert found[row, ids.shape[1] :].tolist() == beam_search(kind.memformer, tokens, num_tokens=6, num_beams=3)


def beam_search(model, tokens, *, num_tokens, num_beams):
    """Return the likeliest continuation that a beam search finds; each hypothesis has a session of its own."""
    session = Session(model)
    session.feed(tokens)
    beams = [(0.0, [], session)]
    for _ in range(num_tokens):
        candidates = []
        for score, continuation, session in beams:
            nats = session.next_token_logits()[0].float().log_softmax(-1)
            candidates += [(score + float(nats[token]), token, continuation, session) for token in range(VOCAB_SIZE)]
        beams = []
        for score, token, continuation, session in sorted(candidates, key=lambda each: -each[0])[:num_beams]:
            own = copy.deepcopy(session)
            own.feed([token])
            beams.append((score, [*continuation, token], own))
    return beams[0][1]


@pytest.mark.parametrize("name", [*KINDS, "compressive", "compressive, mean", "adaptive softmax"])
def test_gradients_are_those_of_back_propagation_through_time(name):
    model = make_hf(name, dropout=0.2)
    tokens = torch.stack(texts((3 * SEGMENT_LENGTH,) * 2))
    rollout = rollout_of(tokens)
    torch.manual_seed(5)
    backpropagate(model.memformer, rollout, method="bptt")
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(5)
    # With [BOS] before it, the first token counts too.
    ids = torch.cat([torch.full((2, 1), BOS), tokens], dim=1)
    output = model(ids, labels=ids)
    assert output.logits is None
    output.loss.backward()
    for parameter_name, parameter in model.named_parameters():
        if expected[parameter_name] is None:
            assert parameter.grad is None
        else:
            assert_close(parameter.grad, expected[parameter_name])


@torch.no_grad()
def test_the_loss_in_evaluation_is_that_of_the_logits_with_and_without_a_cache(kind):
    ids, mask = scattered(texts())
    labels = ids.masked_fill((mask == 0) | (torch.rand(ids.shape) < 0.3), -100)
    logits = kind(ids, attention_mask=mask).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    for use_cache in (False, True):
        output = kind(ids, attention_mask=mask, labels=labels, use_cache=use_cache, logits_to_keep=2)
        assert_close(output.loss, expected)
        assert_close(output.logits, logits[:, -2:])
    assert kind(ids, labels=torch.full_like(ids, -100)).loss == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
@pytest.mark.parametrize("is_training", [True, False])
def test_the_loss_does_not_depend_on_the_integers_that_hold_the_tokens(dtype, is_training):
    """In uint8, -100 is 156, the byte of many accented letters."""
    model = hf.as_causal_lm(tiny_model(vocab_size=256)).train(is_training)
    ids = torch.tensor([[1, 156, 156, 7, 156, 250]])
    expected = model(ids, labels=ids).loss
    assert torch.equal(model(ids.to(dtype), labels=ids.to(dtype)).loss, expected)
    assert torch.equal(model(ids, labels=ids.to(dtype)).loss, expected)
    with pytest.raises(InputTypeError, match="labels have dtype float32; they must be integers"):
        model(ids, labels=ids.float())


def test_the_loss_and_its_gradients_are_those_of_the_logits(name, model):
    if "compressive" in name:
        pytest.skip("its reconstruction loss adds to the gradients")
    ids, mask = scattered(texts())
    # Some labels do not count, as those of a prompt.
    labels = ids.masked_fill((mask == 0) | (torch.rand(ids.shape) < 0.3), -100)
    logits = model(ids, attention_mask=mask).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected_grads = torch.autograd.grad(expected, parameters, allow_unused=True)
    model.train()
    trained = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(7))
    model.eval()
    num_labels = int((labels[:, 1:] != -100).sum())
    assert_close(trained.loss, expected * num_labels / 7)
    grads = torch.autograd.grad(3 * trained.loss, parameters, allow_unused=True)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        if expected_grad is not None:
            assert_close(grad, expected_grad * 3 * num_labels / 7)
        elif grad is not None:
            assert_close(grad, torch.zeros_like(grad))


@torch.no_grad()
def test_hidden_states_do_not_depend_on_padding(kind):
    hidden_class = getattr(hf, type(kind).__name__.replace("ForCausalLM", "Model"))
    hidden_model = hidden_class.from_core(kind.memformer)
    alone = [hidden_model(tokens[None]).last_hidden_state[0] for tokens in texts()]
    ids, mask = scattered(texts())
    found = hidden_model(ids, attention_mask=mask).last_hidden_state
    for row, states in enumerate(alone):
        assert_close(found[row][mask[row] == 1], states)
    for tokens, states in zip(texts(), alone, strict=True):
        segment = tokens[None, :SEGMENT_LENGTH]  # shorter in the last row
        assert_close(states[:SEGMENT_LENGTH], first_states(kind.memformer, segment))


def first_states(model, segment):
    """Return the states that a model reads its first segment into."""
    bos = torch.tensor([[BOS]])
    if isinstance(model, Memformer):
        _, memory = model.encode(bos)
        return model.encode(segment, memory=memory)[0][0, : segment.shape[1]]
    hidden, memory = model.encode(torch.cat([bos, segment[:, :-1]], dim=1))
    return torch.cat([hidden[0, 1:], model.encode(segment[:, -1:], memory=memory)[0][0]])


def test_a_loaded_session_goes_on_in_transformers(tmp_path):
    model = make_hf()
    tokens = texts((13,))[0]
    session = Session(model.memformer)
    session.feed(tokens[:-1])
    session.save(tmp_path / "state")
    cache = hf.MemformerCache(Session.load(tmp_path / "state", model=model.memformer))
    found = model.generate(tokens[None, -1:], cache=cache, max_new_tokens=9, do_sample=False)
    assert found[0, 1:].tolist() == generated(model, tokens, 9)
