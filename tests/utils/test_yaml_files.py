"""Configs in YAML: numbers are what they look like, keys stand once, and what was written is read again."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memformer import InputError
from memformer.utils.yaml_files import parse_yaml, read_yaml, to_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("-010", -10),
        ("1:10", "1:10"),
        ("1:10.5", "1:10.5"),
        ("1e-3", 0.001),
        ("2E1", 20.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("1_000.5", 1000.5),
        ("0x1f", 31),
        ("0o17", 15),
        ("-.inf", -math.inf),
        ("1.2.3", "1.2.3"),
        ("1e", "1e"),
        ("'010'", "010"),
        ("no", False),
        ("", None),
    ],
)
def test_numbers_are_what_they_look_like(text, value):
    found = parse_yaml(text)
    assert (found, type(found)) == (value, type(value))


VALUES = st.recursive(
    st.text(max_size=6) | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=3) | st.from_regex(r"[-+.0-9:_eExo]{1,6}", fullmatch=True))
@example({"path": "1e-3", "rows": "1:10", "name": "010"})
def test_what_is_written_is_read_again(value):
    fields = value if isinstance(value, dict) else {"text": value}
    assert parse_yaml(to_yaml(fields)) == fields


@pytest.mark.parametrize("text", ["a: 1\na: 2", "x: {b: 1, c: 2, b: 3}", "- {1: a, 1: b}"])
def test_a_key_that_stands_twice_is_refused_with_its_place(text, tmp_path):
    with pytest.raises(ValueError, match="the key .* stands twice in one mapping .*line"):
        parse_yaml(text)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"config \S+ is not YAML: the key .* stands twice"):
        read_yaml(tmp_path / "config.yaml")


def test_merged_keys_may_be_given_again():
    assert parse_yaml("x: &x {a: 1, b: 2}\ny: {<<: *x, a: 3}")["y"] == {"a": 3, "b": 2}


@pytest.mark.parametrize(
    ("text", "kind"), [("", "nothing"), ("null", "nothing"), ("train", "a text"), ("- 1", "a list")]
)
def test_a_file_without_keys_is_refused(text, kind, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=f"holds {kind}; it must be a mapping of keys to values"):
        read_yaml(tmp_path / "config.yaml")
