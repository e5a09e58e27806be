"""Sessions: the state depends only on the tokens, and predictions match those over whole documents."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer import CheckpointError, InputError, InputTypeError, Memformer, MemformerConfig, SaveError, Session
from memformer.evaluation.streams import read_stream
from memformer.generation.sampling import sample
from memformer.generation.session_files import FORMAT, FORMAT_VERSION, WEIGHTS, check_state
from memformer.utils.files import write_tensors
from tests.generation.sessions import assert_same_state, document_log_probabilities, random_tokens
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, assert_close, tiny_model


def test_next_token_distribution_matches_the_whole_document(variant):
    model = tiny_model(**variant).eval()
    tokens = random_tokens(3 * SEGMENT_LENGTH + 4)
    expected = document_log_probabilities(model, tokens)
    session = Session(model)
    for position, token in enumerate(tokens):
        assert_close(session.next_token_logits()[0].log_softmax(-1), expected[position])
        session.feed([token])


def test_a_session_reads_exactly_as_evaluation_does():
    # Bit for bit, because until a model is trained the rounding of one segment grows from segment to segment.
    config = MemformerConfig(vocab_size=30, d_model=32, num_heads=4, d_ff=64, segment_length=16, num_slots=8)
    torch.manual_seed(0)
    model = Memformer(config).eval()
    tokens = np.random.default_rng(0).integers(30, size=10 * 16)
    session = Session(model)
    session.feed(tokens)
    memory = None
    for rollout in read_stream([tokens, tokens[:1]], segment_length=16, bos_token_id=model.bos_token_id):
        for timestep, segment in enumerate(rollout.inputs):
            padding = rollout.input_padding[timestep]
            with torch.no_grad():
                _, memory = model.encode(segment, memory=memory, padding_mask=padding if padding.any() else None)
    assert torch.equal(session.memory, memory)


@settings(max_examples=20)
@given(
    length=st.integers(0, 5 * SEGMENT_LENGTH),
    parts=st.lists(st.tuples(st.integers(0, 2 * SEGMENT_LENGTH + 1), st.booleans()), max_size=8),
)
def test_any_split_gives_the_same_state(length, parts):
    model = tiny_model()
    tokens = random_tokens(length)
    whole = Session(model)
    whole.feed(tokens)
    split = Session(model)
    position = 0
    for size, reads_logits in [*parts, (length, False)]:
        split.feed(tokens[position : position + size])
        position += size
        if reads_logits:
            split.next_token_logits()  # computing logits must not change the state
    assert_same_state(split, whole)


def test_rows_with_unequal_numbers_of_tokens_equal_separate_sessions(variant):
    model = tiny_model(**variant)
    rows = [random_tokens(n, seed=n) for n in (0, 5, SEGMENT_LENGTH, 3 * SEGMENT_LENGTH + 1)]
    together = Session(model, batch_size=4)
    together.feed(rows)
    together.next_token_logits()
    together.feed([row[:2] for row in rows])
    logits = together.next_token_logits()
    for index, row in enumerate(rows):
        alone = Session(model)
        alone.feed(row)
        alone.feed(row[:2])
        assert_close(together.memory[index : index + 1], alone.memory)
        assert_close(logits[index : index + 1], alone.next_token_logits())
        assert together.num_tokens[index] == len(row) + len(row[:2])


def test_generated_tokens_become_part_of_the_stream():
    model = tiny_model()
    session = Session(model)
    session.feed(random_tokens(8))
    new = session.generate(2 * SEGMENT_LENGTH, seed=0)
    other = Session(model)
    other.feed(random_tokens(8) + new)
    assert_same_state(session, other)


def test_greedy_generation_takes_the_most_likely_token_each_time():
    model = tiny_model()
    prompt = random_tokens(7)
    new = _generate_greedily(model, prompt, 2 * SEGMENT_LENGTH)
    for count in range(len(new)):
        most_likely = document_log_probabilities(model, prompt + new[: count + 1])[-1].argmax()
        assert new[count] == most_likely


def _generate_greedily(model, prompt, count):
    session = Session(model)
    session.feed(prompt)
    return session.generate(count, temperature=0)


def test_seeds_make_generation_repeatable_and_leave_the_global_generator_alone():
    model = tiny_model()
    before = torch.get_rng_state()
    first, second, other = (Session(model).generate(20, seed=seed) for seed in (1, 1, 2))
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), before)


def test_batched_generation_gives_a_list_for_each_row():
    session = Session(tiny_model(), batch_size=3)
    session.feed([random_tokens(2), random_tokens(9), []])
    rows = session.generate(SEGMENT_LENGTH + 2, temperature=0)
    assert [len(row) for row in rows] == [SEGMENT_LENGTH + 2] * 3
    assert rows[1] == _generate_greedily(session.model, random_tokens(9), SEGMENT_LENGTH + 2)


def test_narrow_slots_take_less_of_the_state():
    wide, narrow = Session(tiny_model()), Session(tiny_model(slot_width=4))
    num_slots, width = wide.model.memory_shape
    assert narrow.state_bytes == wide.state_bytes - 8 * num_slots * (width - 4)  # float64


@pytest.mark.parametrize("slot_width", [None, 4])
def test_state_does_not_grow(slot_width):
    session = Session(tiny_model(slot_width=slot_width))
    at_start = session.state_bytes
    for _ in range(15):
        session.feed(random_tokens(37))
        session.next_token_logits()
        assert session.state_bytes == at_start


def test_a_saved_session_continues_as_if_never_saved(tmp_path, variant):
    model = tiny_model(**variant)
    session = Session(model, batch_size=2)
    session.feed([random_tokens(15), random_tokens(7)])
    session.save(tmp_path / "state.safetensors")
    loaded = Session.load(tmp_path / "state.safetensors", model=model)
    assert_same_state(loaded, session, relative=0)
    assert loaded.generate(10, seed=3) == session.generate(10, seed=3)


def test_damaged_and_foreign_sessions_are_refused(tmp_path):
    session = Session(tiny_model())
    session.feed(random_tokens(20))
    path = tmp_path / "state.safetensors"
    session.save(path)
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match="the session belongs to another model"):
        Session.load(path, model=tiny_model(num_slots=3))
    with pytest.raises(CheckpointError, match="does not exist"):
        Session.load(tmp_path / "nothing", model=session.model)
    for damaged in (content[:40], content[: len(content) // 2], b"", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            Session.load(path, model=session.model)
    path.write_bytes(content.replace(b"memformer-session", b"memformer-sassion"))
    with pytest.raises(CheckpointError, match="not a saved session"):
        Session.load(path, model=session.model)
    path.write_bytes(content.replace(b'"version":"3"', b'"version":"9"'))
    with pytest.raises(CheckpointError, match="session format version '9'"):
        Session.load(path, model=session.model)
    session.model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="not a saved session|holds no memory"):
        Session.load(tmp_path / "model" / "model.safetensors", model=session.model)


def test_invalid_saved_states_are_refused(tmp_path):
    session = Session(tiny_model())
    session.feed(random_tokens(20))
    path = tmp_path / "state.safetensors"
    session._streams.memory[0, 0, 0] = float("nan")
    metadata = {"format": FORMAT, "version": FORMAT_VERSION, WEIGHTS: session.model.fingerprint()}
    write_tensors(path, session._streams.state(), metadata=metadata)
    with pytest.raises(CheckpointError, match="memory holds values that are not finite"):
        Session.load(path, model=session.model)
    session._streams.memory[0, 0, 0] = 0.0
    state = session._streams.state()
    state["counts"][0] = SEGMENT_LENGTH
    write_tensors(path, state, metadata=metadata)
    with pytest.raises(CheckpointError, match="impossible"):
        Session.load(path, model=session.model)


def test_a_failed_save_leaves_earlier_files_intact(tmp_path):
    session = Session(tiny_model())
    (tmp_path / "folder").write_text("a file where a folder must be")
    with pytest.raises(SaveError, match="could not be written"):
        session.save(tmp_path / "folder" / "state")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_errors_name_wrong_tokens_and_options():
    session = Session(tiny_model())
    for wrong in ([0, VOCAB_SIZE], [-1]):
        with pytest.raises(InputError, match=f"token id {wrong[-1]} is outside the vocabulary; valid ids are 0 to 10"):
            session.feed(wrong)
    with pytest.raises(InputTypeError, match="token ids have dtype float32"):
        session.feed(torch.zeros(3))
    assert session.num_tokens == [0]
    with pytest.raises(InputError, match=r"batch_size \(0\) must be at least 1"):
        Session(tiny_model(), batch_size=0)
    with pytest.raises(InputError, match="a session of 2 rows was fed 3 items"):
        Session(tiny_model(), batch_size=2).feed([1, 2, 3])
    for options, message in (
        ({"temperature": -1.0}, r"temperature \(-1.0\) must be at least 0"),
        ({"top_k": 0}, r"top_k \(0\) must be at least 1"),
        ({"top_p": 0.0}, r"top_p \(0.0\) must be above 0"),
        ({"max_new_tokens": -1}, r"max_new_tokens \(-1\)"),
        ({"seed": 2**70}, r"seed \(1180591620717411303424\) must be from 0"),
    ):
        with pytest.raises(InputError, match=message):
            session.stream(**{"max_new_tokens": 1, **options})  # immediately, not at the first token


def test_sampling_keeps_only_the_most_likely_tokens():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    generator = torch.Generator().manual_seed(0)

    def drawn(**options):
        options = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
        return sample(logits, generator=generator, **options).bincount(minlength=4) / 4000

    assert torch.allclose(drawn(), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03)
    assert torch.allclose(drawn(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)
    assert torch.allclose(drawn(top_p=0.7), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)
    assert torch.allclose(drawn(temperature=0.5), torch.tensor([0.685, 0.247, 0.062, 0.007]), atol=0.03)
    assert drawn(temperature=0.0)[0] == drawn(top_p=1e-6)[0] == drawn(top_p=1e-300)[0] == 1
    allowed = torch.tensor([True, True, False, False]).expand(4000, -1)
    assert torch.allclose(drawn(temperature=1e300, allowed=allowed), torch.tensor([0.5, 0.5, 0, 0]), atol=0.03)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 0}, {"seed": 0, "top_k": 1, "top_p": 0.5}])
def test_only_allowed_tokens_are_generated(options):
    """Here even ids follow an even number of tokens, and the rows have different ranges."""
    session = Session(tiny_model(), batch_size=2)
    session.feed([[1, 2, 3], [4]])

    def allowed(row, num_tokens):
        return range(5 * row + num_tokens % 2, 5 * row + 5, 2)

    generated = session.generate(12, allowed_token_ids=allowed, **options)
    for row, tokens in enumerate(generated):
        assert all(token in allowed(row, number) for number, token in enumerate(tokens, start=(3, 1)[row]))
    assert len({*generated[0]}) > 1


def test_sampling_options_reach_the_draw():
    greedy = Session(tiny_model()).generate(20, temperature=0)
    assert Session(tiny_model()).generate(20, seed=0) != greedy
    assert all(
        Session(tiny_model()).generate(20, seed=0, **{name: 1e-6}) == greedy for name in ("top_p", "temperature")
    )
    assert Session(tiny_model()).generate(20, seed=0, top_k=1) == greedy


def test_all_tokens_may_be_allowed():
    sessions = [Session(tiny_model()) for _ in range(2)]
    rows = [
        session.generate(20, seed=0, allowed_token_ids=allowed)
        for session, allowed in zip(sessions, (None, lambda *_: range(VOCAB_SIZE)), strict=True)
    ]
    assert rows[0] == rows[1]
    for allowed, error, message in (
        ([], InputError, "lets no token follow the 20 tokens of row 0"),
        (VOCAB_SIZE, InputError, rf"allowed token id \({VOCAB_SIZE}\)"),
        (["a"], InputTypeError, "allowed token id"),
    ):
        with pytest.raises(error, match=message):
            sessions[0].generate(1, allowed_token_ids=lambda *_, allowed=allowed: allowed)
    assert sessions[0].num_tokens == [20]


def test_empty_lists_tensors_and_arrays_can_be_fed():
    session = Session(tiny_model())
    session.feed([])
    session.feed(torch.tensor(random_tokens(9)))
    session.feed(torch.tensor([random_tokens(9)]).numpy())
    other = Session(tiny_model())
    other.feed(random_tokens(9) * 2)
    assert_same_state(session, other)


@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 5e-324])
def test_an_extremely_low_temperature_is_greedy(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.9], [80.0, -80.0, 79.0]])
    chosen = sample(logits, temperature=temperature, top_k=None, top_p=None, generator=None)
    assert chosen.tolist() == [1, 0]


def test_top_k_keeps_k_tokens_even_if_more_are_equally_likely():
    logits = torch.zeros(500, 5)
    chosen = sample(logits, temperature=1.0, top_k=2, top_p=None, generator=torch.Generator().manual_seed(0))
    assert len(set(chosen.tolist())) == 2


def test_a_model_in_training_mode_reads_without_dropout_and_stays_in_training_mode():
    model = tiny_model(dropout=0.5)
    expected = Session(model.eval())
    expected.feed(random_tokens(20))
    session = Session(model.train())
    session.feed(random_tokens(20))
    assert_same_state(session, expected)
    assert model.training
    assert model.decoder.training


def test_a_session_loads_only_with_the_weights_that_it_was_saved_with(tmp_path):
    path = tmp_path / "state"
    session = Session(tiny_model())
    session.feed(random_tokens(20))
    session.save(path)
    other = tiny_model()
    with torch.no_grad():
        other.decoder.norm.bias += 1e-3
    message = "was saved with other weights than this model's, so its memory is meaningless to this model"
    with pytest.raises(CheckpointError, match=message):
        Session.load(path, model=other)
    for changed in (tiny_model(seed=1), tiny_model(write_temperature=0.5)):
        with pytest.raises(CheckpointError, match="was saved with other weights"):
            Session.load(path, model=changed)
    assert Session.load(path, model=other, any_weights=True).num_tokens == [20]
    assert Session.load(path, model=tiny_model(dropout=0.0)).num_tokens == [20]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_weights_raise_errors_in_generation_and_saving(tmp_path, temperature):
    model = tiny_model()
    with torch.no_grad():
        model.encoder.norm.weight[0] = float("nan")
    session = Session(model)
    with pytest.raises(InputError, match="logits are not finite: its weights or its memory are broken"):
        session.generate(3, temperature=temperature)
    session.feed(random_tokens(20))
    with pytest.raises(InputError, match="session's memory is not finite"):
        session.save(tmp_path / "state")
    assert not any(tmp_path.iterdir())


def test_a_stopped_row_keeps_its_state_while_other_rows_continue():
    model = tiny_model(seed=3)
    prompts = [random_tokens(9, seed=seed) for seed in range(4)]

    def fed(prompt_rows):
        session = Session(model, batch_size=len(prompt_rows))
        session.feed(prompt_rows if len(prompt_rows) > 1 else prompt_rows[0])
        return session

    together = fed(prompts)
    whole = [fed([prompt]).generate(40, temperature=0) for prompt in prompts]
    # Stop tokens that some rows generate early, some late and some never.
    stops = {whole[0][3], whole[1][20]}
    rows = together.generate(40, temperature=0, stop_token_ids=stops)
    lengths = [next((n for n, token in enumerate(row, 1) if token in stops), 40) for row in whole]
    assert rows == [row[:length] for row, length in zip(whole, lengths, strict=True)]
    assert len(set(lengths)) > 1
    assert together.num_tokens == [9 + length for length in lengths]
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        alone = fed([[*prompt, *row]])
        assert_close(together.memory[number], alone.memory[0])
        assert_close(together.next_token_logits()[number], alone.next_token_logits()[0])
    with pytest.raises(InputError, match=rf"stop token id \({VOCAB_SIZE}\) must be from 0 to {VOCAB_SIZE - 1}"):
        together.stream(1, stop_token_ids=[VOCAB_SIZE])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_session_goes_on_with_the_same_weights_in_another_dtype(tmp_path, dtype):
    """A run in half precision is read in float32 on a CPU, so its sessions must move between devices."""
    session = Session(tiny_model().to(dtype))
    session.feed(random_tokens(20))
    session.save(tmp_path / "state")
    expected = {name: tensor.float() for name, tensor in session._streams.state().items() if tensor.is_floating_point()}
    loaded = Session.load(tmp_path / "state", model=copy.deepcopy(session.model).float())
    state = loaded._streams.state()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)
    assert loaded.next_token_logits().dtype == torch.float32
    loaded.feed(random_tokens(20))
    assert loaded.num_tokens == [40]
    state = {name: tensor.clone() for name, tensor in state.items()}
    state["tokens"] = state["tokens"].int()
    with pytest.raises(CheckpointError, match="tokens is .* torch.int32; this model's is .* torch.int64"):
        check_state(tmp_path / "state", state, expected=loaded._streams.state(), model=loaded.model)


def test_logits_that_the_caller_changes_do_not_change_what_is_generated():
    session, other = Session(tiny_model()), Session(tiny_model())
    for each in (session, other):
        each.feed([1, 2, 3])
    session.next_token_logits().mul_(-100)
    assert_close(session.next_token_logits(), other.next_token_logits())
    assert session.generate(3, temperature=0) == other.generate(3, temperature=0)
