"""Recall in text: stories are read whole or refused, facts stay whole among documents, and answers are right."""

import gzip
import json
import re

import numpy as np
import pytest
import yaml

from memformer import InputError
from memformer.cli.main import main
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
from memformer.data.recall.stream import task_text, tell
from memformer.data.recall.text_tasks import Story, StoryQuestion, read_stories
from memformer.training.config import DataConfig
from memformer.training.run_data import prepare_data

STORIES = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary took the milk.
5 Mary went to the kitchen.
6 Where is Mary?\tkitchen\t5
7 What is Mary carrying?\tmilk,football
1 Sandra went to the garden.
2 Is Sandra in the garden?\tyes\t1
"""
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "did", "not"]
KINDS = ("bytes", "bpe", "word")


def write_stories(folder, text=STORIES, name="stories.txt"):
    path = folder / name
    path.write_text(text)
    return str(path)


def babi(path, **fields):
    return RecallConfig(**{"task": "babi", "path": path, "validation_path": path, "num_facts": (1, 9), **fields})


def haystack_texts(num_documents=9):
    """Documents of words that no fact has, each beginning with a number of its own."""
    generator = np.random.default_rng(0)
    return [f"{index} " + " ".join(generator.choice(WORDS, size=7 + 20 * index)) for index in range(num_documents)]


def tokenizer_of(kind, config):
    documents = [Document(str(index), text.encode()) for index, text in enumerate(haystack_texts())]
    vocab_size = {"bytes": None, "bpe": 400, "word": None}[kind]
    return train_tokenizer(TokenizerConfig(kind=kind, vocab_size=vocab_size), documents, text=task_text(config, kind))


def text_task(config, kind="word", *, tokenizer=None):
    tokenizer = tokenizer or tokenizer_of(kind, config)
    arrays = [tokenizer.encode(text.encode(), "haystack") for text in haystack_texts()]
    return make_text_task(config, tokenizer, corpus_from_arrays(arrays, tokenizer.vocab_size), path=config.path)


def text_of(task, tokens):
    """What tokens say, whatever the kind: words apart, no blanks before marks, digits together."""
    text = task.tokenizer.decode([int(token) for token in tokens]).decode()
    return re.sub(r"(?<=\d) (?=\d)", "", re.sub(r" ([.?,]) ?", r"\1 ", text)).strip()


@pytest.fixture
def path(tmp_path):
    return write_stories(tmp_path)


def test_stories_are_read_as_they_are_told(path):
    first, second = read_stories(path)
    assert first.statements == [
        "Mary moved to the bathroom.",
        "John went to the hallway.",
        "Mary took the milk.",
        "Mary went to the kitchen.",
    ]
    assert first.questions == [
        StoryQuestion(2, "Where is Mary?", "bathroom"),
        StoryQuestion(4, "Where is Mary?", "kitchen"),
        StoryQuestion(4, "What is Mary carrying?", "milk,football"),
    ]
    assert second == Story(["Sandra went to the garden."], [StoryQuestion(1, "Is Sandra in the garden?", "yes")])


def test_files_may_be_compressed_and_several(tmp_path, path):
    packed = tmp_path / "more.txt.gz"
    packed.write_bytes(gzip.compress(STORIES.replace("\n", "\r\n").encode()))
    assert read_stories([path, str(packed)]) == read_stories(path) * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "stories.txt holds no question; stories need at least one"),
        ("1 Mary left.\n", "stories.txt holds no question"),
        ("1 Mary left.\n2 Where is Mary? bathroom 1\n3 Who left?", "stories.txt:3 must be 'ID text' or 'ID question"),
        ("1 Mary left.\n2 Who left?\t \t1\n", "stories.txt:2 must be 'ID text' or 'ID question"),
        ("1 Mary left.\n2 \tMary\n", "stories.txt:2 must be"),
        ("1\n", "stories.txt:1 must be"),
        ("2 Mary left.\n", "stories.txt:1 begins with '2'; a line begins with its ID: 1 for the first of a story"),
        ("1 Mary left.\n3 Who left?\tMary", "stories.txt:2 begins with '3'"),
        ("1 Mary left.\nWho left?\tMary", "stories.txt:2 begins with 'Who'"),
        ("7" * 5000 + " Mary left.\n", "stories.txt:1 begins with '777"),
        ("1 Who left?\tMary\t1\n", "stories.txt:1 asks before its story has told anything"),
    ],
)
def test_malformed_stories_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read_stories(write_stories(tmp_path, text))


def test_files_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"packed.gz cannot be read: Not a gzipped file"):
        read_stories(write_stories(tmp_path, name="packed.gz"))
    (tmp_path / "latin.txt").write_bytes(b"1 Ren\xe9 left.")
    with pytest.raises(InputError, match=r"latin.txt is not UTF-8 at byte offset 5"):
        read_stories(str(tmp_path / "latin.txt"))
    with pytest.raises(InputError, match=r"nowhere.txt\) does not exist"):
        read_stories(str(tmp_path / "nowhere.txt"))


def room_of_story(facts, question):
    """The answer that bAbI's first task has, worked out from what was told."""
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
                told = [text.split(" ", 1)[1] for text in lines[-(line - 1) :] if "\t" not in text]
                question = f"Where is {generator.choice(people)}?"
                lines.append(f"{line} {question}\t{room_of_story(told, question)}\t1")
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


def test_a_tokenizer_of_words_knows_every_word_without_its_full_stop(path):
    config = babi(path)
    task = text_task(config, "word")
    episode = task.make_episode(np.random.default_rng(0), 1)
    assert [len(fact) for fact in episode.facts] == [6]  # Sandra went to the garden .
    assert task.answer_length == 3  # milk , football
    assert (task.question_length, task.fact_length) == (6, 6)
    known = task.tokenizer.tokenizer.get_vocab()
    assert {"garden", "bathroom", "milk", "football", ".", "?", ","} <= known.keys()
    assert not {"garden.", "Mary?", "milk,football"} & known.keys()


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
    with pytest.raises(InputError, match="the word 'attic', which the run's tokenizer lacks"):
        text_task(babi(other), tokenizer=tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_pass_keys_are_told_and_answered_in_the_same_tokens(kind):
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
        # What a tokenizer makes of the whole is what it makes of the parts.
        asked = np.concatenate([question.tokens, question.answer])
        if kind != "word":
            whole = f" What is the pass key? The pass key is {number}"
            assert asked.tolist() == task.tokenizer.encode(whole.encode(), "whole").tolist()
            assert task.tokenizer.encode(f" The pass key is {number}. Remember it.".encode(), "whole").tolist() == [
                *fact
            ]
        numbers.add(number)
    assert len(numbers) > 40
    assert task.answer_length == (5 if kind == "word" else 6)


def test_filler_goes_on_in_the_documents():
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


def test_every_place_of_the_documents_is_equally_likely():
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
        told = tell(task, episodes, timesteps, range(6), 70, generator)
        for row, episode in enumerate(episodes):
            read = text_of(task, told[:, row].ravel())
            positions = [read.index(text_of(task, fact)) for fact in episode.facts]
            assert positions == sorted(positions)
            rest = text_of(task, told[len(timesteps) :, row].ravel())
            assert not any(text_of(task, fact) in rest for fact in episode.facts)


def test_windows_tell_each_fact_once_at_its_timestep(path):
    task = text_task(babi(path), KINDS[0])
    generator = np.random.default_rng(0)
    episodes = [task.make_episode(generator, 3) for _ in range(4)]
    timesteps = [0, 7, 12]
    windows = [tell(task, episodes, timesteps, range(start, start + 5), 70, generator) for start in (0, 5, 10)]
    told = np.concatenate(windows)
    assert told.shape == (15, 4, 70)
    for row, episode in enumerate(episodes):
        for segment, timestep in zip(told[:, row], range(15), strict=True):
            found = [fact for fact in episode.facts if text_of(task, fact) in text_of(task, segment)]
            index = timesteps.index(timestep) if timestep in timesteps else len(episode.facts)
            assert [text_of(task, fact) for fact in found] == [
                text_of(task, f) for f in episode.facts[index : index + 1]
            ]


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
            "model.segment_length (11) must be at least 12: a segment tells 2 facts (recall.facts_per_segment) of up "
            "to 6 tokens, or ends with a question of up to 6"
        ),
    ):
        RecallStream(
            text_task(config), config, num_lanes=1, segment_length=11, rollout_length=9, bos_token_id=999, seed=0
        )


def test_stories_longer_than_asked_for_are_refused(tmp_path):
    path = write_stories(tmp_path, STORIES[: STORIES.index("1 Sandra")])
    with pytest.raises(InputError, match="num_facts asks for 1; the shortest question of the stories has 2 statements"):
        text_task(babi(path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "babi", "validation_path": "x"}, "recall.path (None) must be given for the task 'babi'"),
        ({"task": "babi", "path": "x"}, "recall.validation_path (None) must be given for the task 'babi'"),
        ({"path": "x"}, "recall.path ('x') is not read by the task 'fact', only by babi"),
        ({"task": "passkey", "validation_path": "x"}, "validation_path ('x') is not read by the task 'passkey'"),
        ({"task": "passkey", "num_values": 5}, "num_values (5) is not read by the task 'passkey', only by fact, "),
        ({"task": "copy", "num_keys": 5}, "num_keys (5) is not read by the task 'copy', only by associative, rewrite"),
        ({"task": "passkey", "num_facts": (1, 2)}, "recall.num_facts (1, 2) must be (1, 1) for the task of one fact"),
    ],
)
def test_fields_that_do_not_fit_the_task_are_refused(fields, message):
    with pytest.raises(InputError, match=re.escape(message)):
        RecallConfig(**fields)


def test_a_task_in_text_is_not_made_without_text():
    with pytest.raises(InputError, match="recall.task \\('passkey'\\) is in text"):
        make_task(RecallConfig(task="passkey"))
    with pytest.raises(InputError, match="kind \\('digits'\\) holds images; recall.task 'passkey' needs text"):
        prepare_data(DataConfig(train=SourceConfig(kind="digits"), recall=RecallConfig(task="passkey")))


def write_run(folder, recall, tokenizer, *, segment_length):
    """A tiny run on a recall task in text; return its config file."""
    texts = folder / "texts"
    texts.mkdir()
    for index, text in enumerate(haystack_texts()):
        (texts / f"{index}.txt").write_text(text)
    fields = {
        "folder": str(folder / "run"),
        "threads": 1,
        "device": "cpu",
        "model": {
            "d_model": 16,
            "num_heads": 2,
            "d_ff": 32,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "segment_length": segment_length,
            "num_slots": 3,
        },
        "data": {
            "train": {"kind": "text", "path": str(texts)},
            "tokenizer": tokenizer,
            "recall": {"max_distance": 1, **recall},
            "cache": str(folder / "cache"),
        },
        "training": {"num_updates": 2, "num_lanes": 2, "rollout_length": 3, "sample_tokens": 4},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(fields))
    return str(file)


@pytest.mark.parametrize("task", ["passkey", "babi"])
def test_a_run_trains_evaluates_and_goes_on(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("memformer.training.report.write_report", lambda folder: folder / "summary.html")
    if task == "babi":
        path = write_stories(tmp_path)
        held_out = write_stories(tmp_path, STORIES.replace("Mary", "Sandra"), "held_out.txt")
        recall = {"task": task, "path": [path], "validation_path": held_out, "num_facts": [2, 4]}
        file = write_run(tmp_path, recall, {"kind": "word", "vocab_size": 40}, segment_length=8)
    else:
        file = write_run(tmp_path, {"task": task}, {"kind": "bytes"}, segment_length=40)
    assert main(["train", file, "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["num_facts"] == (4 if task == "babi" else 1)
    assert [point["distance"] for point in trained["points"]] == [1, 2, 4, 8, 16, 32]
    # The run's own tokenizer is used: one trained now would know another word.
    tokenizer = (tmp_path / "run" / "tokenizer_config.json").read_text()
    (tmp_path / "texts" / "new.txt").write_text("xylophone " * 50)
    assert main(["train", file, "--json", "--resume", "--training.num_updates", "3"]) == 0
    assert (tmp_path / "run" / "tokenizer_config.json").read_text() == tokenizer
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert len(evaluated["points"]) == 6


def test_a_run_whose_segments_are_too_short_is_refused_before_it_trains(tmp_path, capsys):
    path = write_stories(tmp_path)
    longer = write_stories(tmp_path, STORIES.replace("Where is", "Where in the garden is"), "longer.txt")
    recall = {"task": "babi", "path": path, "validation_path": longer, "num_facts": [1, 4]}
    file = write_run(tmp_path, recall, {"kind": "word"}, segment_length=6)
    assert main(["train", file]) == 2
    error = capsys.readouterr().err
    assert "model.segment_length (6) must be at least 7" in error
    assert "update" not in error
