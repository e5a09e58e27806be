"""Stories of bAbI are read completely and in order; malformed files are refused."""

import gzip
import re

import pytest

from memformer import InputError
from memformer.data.recall.text_tasks import Story, StoryQuestion, read_stories
from tests.data.recall.texts import STORIES, write_stories


def test_stories_are_read_in_order(path):
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
        (
            "2 Mary left.\n",
            "stories.txt:1 begins with '2'; a line must begin with its ID: 1 for the first line of a story",
        ),
        ("1 Mary left.\n3 Who left?\tMary", "stories.txt:2 begins with '3'"),
        ("1 Mary left.\nWho left?\tMary", "stories.txt:2 begins with 'Who'"),
        ("7" * 5000 + " Mary left.\n", "stories.txt:1 begins with '777"),
        ("1 Who left?\tMary\t1\n", "stories.txt:1 is a question before the first statement of its story"),
    ],
)
def test_malformed_stories_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read_stories(write_stories(tmp_path, text))


def test_files_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"1 Ren\xe9 left.")
    with pytest.raises(InputError, match=r"latin.txt is not UTF-8 text at byte offset 5"):
        read_stories(str(tmp_path / "latin.txt"))
    with pytest.raises(InputError, match=r"nowhere.txt\) does not exist"):
        read_stories(str(tmp_path / "nowhere.txt"))
