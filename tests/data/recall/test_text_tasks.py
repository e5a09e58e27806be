"""Recall tasks in text: facts stay whole among documents, and answers are right."""

import collections
import dataclasses
import itertools
import re

import numpy as np
import pytest

from memformer import InputError
from memformer.data import (
    ByteTokenizer,
    Document,
    RecallConfig,
    RecallStream,
    SourceConfig,
    TokenizerConfig,
    corpus_from_arrays,
    make_task,
    make_text_task,
    train_tokenizer,
)
from memformer.data.recall.stream import _EPISODES_UNTIL_FILLER_IS_KNOWN, insert_facts, task_text
from memformer.training.config import DataConfig
from memformer.training.run_data import prepare_data
from tests.data.recall.texts import (
    KINDS,
    STORIES,
    babi,
    haystack_texts,
    text_of,
    text_task,
    tokenizer_of,
    write_stories,
)


def room_of_story(facts, question):
    """Return the answer of bAbI's first task, computed from the statements."""
    person = re.fullmatch(r"Where is (\w+)\?", question)[1]
    rooms = [
        fact.rstrip(".").split()[-1] for fact in facts if fact.split()[:2] in ([person, "went"], [person, "moved"])
    ]
    return rooms[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_of_a_story_is_right(tmp_path, kind):
    generator = np.random.default_rng(0)
    lines = []
    for _ in range(40):
        people = []
        for line in range(1, 10):
            if line % 3:
                people.append(generator.choice(["Mary", "John", "Ann"]))
                lines.append(f"{line} {people[-1]} went to the {generator.choice(['hall', 'garden', 'attic'])}.")
            else:
                statements = [text.split(" ", 1)[1] for text in lines[-(line - 1) :] if "\t" not in text]
                question = f"Where is {generator.choice(people)}?"
                lines.append(f"{line} {question}\t{room_of_story(statements, question)}\t1")
    config = babi(write_stories(tmp_path, "\n".join(lines)), num_facts=(2, 6))
    task = text_task(config, kind)
    answers = set()
    for num_facts, expected in ((2, 2), (3, 2), (4, 4), (5, 4), (6, 6), (100, 6)):
        for _ in range(20):
            episode = task.make_episode(generator, num_facts)
            assert len(episode.facts) == expected
            (question,) = episode.questions
            answers.add(text_of(task, question.answer))
            facts = [text_of(task, fact) for fact in episode.facts]
            assert text_of(task, question.answer) == room_of_story(facts, text_of(task, question.tokens))
    assert answers == {"hall", "garden", "attic"}


def test_a_word_tokenizer_has_every_word_without_its_full_stop(path):
    config = babi(path)
    task = text_task(config, "word")
    episode = task.make_episode(np.random.default_rng(0), 1)
    assert [len(fact) for fact in episode.facts] == [6]  # Sandra went to the garden .
    assert task.answer_length == 3  # milk , football
    assert (task.question_length, task.fact_length) == (6, 6)
    vocabulary = task.tokenizer.tokenizer.get_vocab()
    assert {"garden", "bathroom", "milk", "football", ".", "?", ","} <= vocabulary.keys()
    assert not {"garden.", "Mary?", "milk,football"} & vocabulary.keys()


def test_words_of_the_stories_are_kept_however_rare_they_are(path):
    config = babi(path)
    text = task_text(config, "word")
    documents = [Document("0", b"the cat sat " * 100)]
    num_words = len(set(text.split())) + 2
    tokenizer = train_tokenizer(TokenizerConfig(kind="word", vocab_size=num_words), documents, text=text)
    assert tokenizer.tokenizer.token_to_id("cat") is None
    text_task(config, tokenizer=tokenizer)
    with pytest.raises(InputError, match=rf"vocab_size \({num_words - 1}\) must be at least {num_words}"):
        train_tokenizer(TokenizerConfig(kind="word", vocab_size=num_words - 1), documents, text=text)


def test_a_word_that_the_tokenizer_lacks_is_refused(tmp_path, path):
    tokenizer = tokenizer_of("word", babi(path))
    other = write_stories(tmp_path, STORIES.replace("garden", "attic"), "other.txt")
    with pytest.raises(InputError, match="the recall task contains the word 'attic', which the run's tokenizer lacks"):
        text_task(babi(other), tokenizer=tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_pass_keys_have_the_same_tokens_in_facts_and_answers(kind):
    task = text_task(RecallConfig(task="passkey"), kind)
    generator = np.random.default_rng(0)
    numbers = set()
    for _ in range(50):
        episode = task.make_episode(generator, 1)
        (fact,), (question,) = episode.facts, episode.questions
        number = text_of(task, question.answer)
        assert re.fullmatch(r"[1-9]\d{4}", number)
        assert text_of(task, fact) == f"The pass key is {number}. Remember it."
        assert text_of(task, question.tokens) == "What is the pass key? The pass key is"
        assert len(fact) <= task.fact_length
        assert len(question.tokens) == task.question_length
        assert len(question.answer) <= task.answer_length
        # The tokens of the whole are the tokens of the parts.
        tokens = np.concatenate([question.tokens, question.answer])
        if kind != "word":
            whole = f" What is the pass key? The pass key is {number}"
            assert tokens.tolist() == task.tokenizer.encode(whole.encode(), "whole").tolist()
            assert task.tokenizer.encode(f" The pass key is {number}. Remember it.".encode(), "whole").tolist() == [
                *fact
            ]
        numbers.add(number)
    assert len(numbers) > 40
    assert task.answer_length == (5 if kind == "word" else 6)


def test_filler_continues_across_documents():
    task = text_task(RecallConfig(task="passkey"), "bytes")
    endless = "".join(haystack_texts()) * 3
    generator = np.random.default_rng(0)
    starts = set()
    for length in [1, 5, 60, len(endless) // 3 + 5] * 50:
        filler = bytes(task.make_filler(generator, length).tolist()).decode()
        assert len(filler) == length
        assert filler in endless
        starts.add(filler[:10])
    assert len(starts) > 50


def test_every_position_in_the_documents_is_equally_likely():
    tokenizer = ByteTokenizer()
    haystack = corpus_from_arrays([np.frombuffer(b"ab", np.uint8), np.frombuffer(b"cdefgh", np.uint8)], 256)
    task = make_text_task(RecallConfig(task="passkey"), tokenizer, haystack, path=None)
    generator = np.random.default_rng(0)
    drawn = [int(task.make_filler(generator, 1)[0]) for _ in range(8000)]
    counts = np.bincount(drawn)[ord("a") : ord("h") + 1]
    assert counts.min() > 850
    assert bytes(task.make_filler(generator, 17).tolist()).decode() in "abcdefgh" * 4


@pytest.mark.parametrize("kind", KINDS)
def test_facts_stay_whole_among_documents(path, kind):
    config = babi(path, facts_per_segment=(2, 2))
    task = text_task(config, kind)
    generator = np.random.default_rng(0)
    for num_facts in (1, 2, 4):
        episodes = [task.make_episode(generator, num_facts) for _ in range(3)]
        timesteps = list(range(-(-num_facts // 2)))
        inputs = insert_facts(task, episodes, timesteps, range(6), 70, generator)
        for row, episode in enumerate(episodes):
            read = text_of(task, inputs[:, row].ravel())
            positions = [read.index(text_of(task, fact)) for fact in episode.facts]
            assert positions == sorted(positions)
            rest = text_of(task, inputs[len(timesteps) :, row].ravel())
            assert not any(text_of(task, fact) in rest for fact in episode.facts)


def test_windows_contain_each_fact_once_at_its_timestep(path):
    task = text_task(babi(path), KINDS[0])
    generator = np.random.default_rng(0)
    episodes = [task.make_episode(generator, 3) for _ in range(4)]
    timesteps = [0, 7, 12]
    windows = [insert_facts(task, episodes, timesteps, range(start, start + 5), 70, generator) for start in (0, 5, 10)]
    inputs = np.concatenate(windows)
    assert inputs.shape == (15, 4, 70)
    for row, episode in enumerate(episodes):
        for segment, timestep in zip(inputs[:, row], range(15), strict=True):
            found = [fact for fact in episode.facts if text_of(task, fact) in text_of(task, segment)]
            index = timesteps.index(timestep) if timestep in timesteps else len(episode.facts)
            assert [text_of(task, fact) for fact in found] == [
                text_of(task, f) for f in episode.facts[index : index + 1]
            ]


DECOY_STORIES = """1 Mary moved to the bathroom.
2 Where is Mary?\tbathroom\t1
3 Sandra went to the garden.
4 Where is Sandra?\tgarden\t3
"""

# Bathrooms at the start of a document, inside one and at an end; one Sandra. "garde" and "bath" are no content words;
# "?" is in every question.
DECOY_TEXTS = [
    "a cat",
    " bathroom a cat sat on a mat",
    "a bath dog sat on a bathroom not on a garde",
    "n Sandra sat on a cat ? bathroom",
]


@pytest.mark.parametrize("kind", KINDS)
def test_decoys_are_one_or_two_texts_around_answers_and_names(tmp_path, kind):
    task = text_task(babi(write_stories(tmp_path, DECOY_STORIES)), kind, texts=DECOY_TEXTS)
    encoded = [task.tokenizer.encode(text.encode(), "text").tolist() for text in DECOY_TEXTS]
    endless, length, num_draws = [*itertools.chain(*encoded, *encoded)], 4, 4000
    places = {"bathroom": [], "garden": [], "Mary": [], "Sandra": []}
    first = 0
    for document in encoded:
        for word, found in places.items():
            tokens = task.tokenizer.encode(f" {word}".encode(), "word").tolist()
            found += [first + i for i in range(len(document)) if document[i : i + len(tokens)] == tokens]
        first += len(document)
    assert [len(found) for found in places.values()] == [3, 0, 0, 1]

    def passages(length):
        shares = collections.Counter()
        for found in (places["bathroom"], places["Sandra"]):
            for place, before in itertools.product(found, range(length)):
                start = max(place - before, 0)
                shares[tuple(endless[start : start + length])] += 1 / 2 / len(found) / length
        return shares

    expected = collections.Counter({window: num_draws / 2 * share for window, share in passages(length).items()})
    for (left, share), (right, other) in itertools.product(passages(2).items(), repeat=2):
        expected[left + right] += num_draws / 2 * share * other
    assert task.make_decoy(np.random.default_rng(0), 1).tolist() in [
        [endless[i]] for i in itertools.chain(*places.values())
    ]
    generator = np.random.default_rng(0)
    counts = collections.Counter(tuple(task.make_decoy(generator, length)) for _ in range(num_draws))
    assert counts.keys() <= expected.keys()
    for window, mean in expected.items():
        assert abs(counts[window] - mean) < 5 * mean**0.5 + 1


def test_decoys_have_their_probability(tmp_path, monkeypatch):
    config = babi(write_stories(tmp_path, DECOY_STORIES), num_facts=(1, 2), max_distance=4, decoy_probability=0.3)
    task = text_task(config, texts=DECOY_TEXTS)
    stream = RecallStream(task, config, num_lanes=8, segment_length=12, rollout_length=99, bos_token_id=999, seed=0)
    stream.load_state({**stream.state(), "episode": _EPISODES_UNTIL_FILLER_IS_KNOWN})
    made, make = [], task.make_decoy
    monkeypatch.setattr(task, "make_decoy", lambda *arguments: made.append(1) or make(*arguments))
    fillers = sum(int(rollout.is_filler[1:].sum()) for rollout, _ in zip(stream, range(100), strict=False))
    assert len(made) / fillers == pytest.approx(0.3, abs=0.05)


def test_training_segments_without_a_fact_are_decoys(tmp_path):
    path = write_stories(tmp_path, DECOY_STORIES)
    config = babi(path, num_facts=(1, 2), max_fact_gap=2, max_distance=4, decoy_probability=1.0)
    task = text_task(config, texts=DECOY_TEXTS)
    size = {"num_lanes": 8, "segment_length": 12, "rollout_length": 99, "bos_token_id": 999, "seed": 0}
    stream = RecallStream(task, config, **size)
    num_facts = num_decoys = num_questions = 0
    for rollout, _ in zip(stream, range(20), strict=False):
        has_question = ~rollout.target_padding.all(dim=-1)
        for timestep, row in np.ndindex(rollout.num_timesteps - 1, 8):
            text = text_of(task, rollout.inputs[timestep + 1, row])
            if has_question[timestep + 1, row]:
                num_questions += 1
            elif re.search(r"(went|moved) to the|took the", text):
                num_facts += 1
            else:
                assert re.search("bathroom|Sandra", text)
                num_decoys += 1
    assert num_facts > 200
    assert num_decoys > 50
    assert num_questions > 100
    with pytest.raises(InputError, match="no document contains an answer or a name of the task"):
        RecallStream(text_task(config, texts=["a cat sat on a mat"]), config, **size)
    with pytest.raises(InputError, match="decoy_probability: the task has no filler that resembles a fact"):
        RecallStream(make_task(RecallConfig()), dataclasses.replace(config, num_facts=(1, 1)), **size)


def test_questions_of_fewer_facts_waste_no_segment(path):
    config = babi(path, num_facts=(3, 3), max_distance=1)
    stream = RecallStream(
        text_task(config), config, num_lanes=4, segment_length=10, rollout_length=99, bos_token_id=999, seed=0
    )
    # The first timestep, two facts (no question has three), and the question.
    assert next(stream).num_timesteps == 1 + 2 + 1


def test_a_segment_too_short_is_refused_with_the_numbers(path):
    config = babi(path, facts_per_segment=(2, 2))
    with pytest.raises(
        InputError,
        match=re.escape(
            "model.segment_length (11) must be at least 12: a segment holds 2 facts "
            "(data.recall.facts_per_segment) of up to 6 tokens, or ends with a question of up to 6 tokens"
        ),
    ):
        RecallStream(
            text_task(config), config, num_lanes=1, segment_length=11, rollout_length=9, bos_token_id=999, seed=0
        )


def test_stories_with_too_many_facts_are_refused(tmp_path):
    path = write_stories(tmp_path, STORIES[: STORIES.index("1 Sandra")])
    with pytest.raises(InputError, match="num_facts \\(1\\) must be at least 2, the smallest number of statements"):
        text_task(babi(path))


def test_a_text_task_needs_text():
    with pytest.raises(InputError, match="recall.task \\('passkey'\\) needs a tokenizer and documents"):
        make_task(RecallConfig(task="passkey"))
    with pytest.raises(InputError, match="kind \\('digits'\\) holds images; recall.task 'passkey' needs text"):
        prepare_data(DataConfig(train=SourceConfig(kind="digits"), recall=RecallConfig(task="passkey")))
