"""Bins of measured values: fitted on given values alone, exact in both directions, closed at both ends."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from memformer import CheckpointError, InputError
from memformer.data import BinTokenizer, Document, fit_bins, load_tokenizer, save_tokenizer

SPACINGS = ("quantile", "uniform")
values = arrays.arrays(
    np.float64, st.tuples(st.integers(1, 30), st.integers(1, 3)), elements=st.floats(-1e6, 1e6, width=32)
)


def fit(content, *, num_bins=4, spacing="quantile"):
    columns = [f"c{index}" for index in range(content.shape[1])]
    return fit_bins([Document("series", content)], columns=columns, num_bins=num_bins, spacing=spacing)


@pytest.mark.parametrize("spacing", SPACINGS)
@settings(max_examples=60)
@given(content=values, num_bins=st.integers(2, 9), seed=st.integers(0, 9))
def test_ids_survive_text_and_files(spacing, content, num_bins, seed, tmp_path_factory):
    """Every id is written as a value of its own bin; the saved tokenizer is the same."""
    tokenizer = fit(content, num_bins=num_bins, spacing=spacing)
    ids = tokenizer.encode(content, "series")
    text = tokenizer.decode(ids.tolist())
    assert text.count(b"\n") == len(content)
    assert tokenizer.encode(text, "text").tolist() == ids.tolist()
    folder = tmp_path_factory.mktemp("bins")
    save_tokenizer(tokenizer, folder)
    assert load_tokenizer(folder).fingerprint == tokenizer.fingerprint
    assert load_tokenizer(folder).encode(content, "series").tolist() == ids.tolist()


@given(content=values, num_bins=st.integers(2, 9))
def test_an_id_is_that_of_a_search_by_hand(content, num_bins):
    """Each column has its own bins and its own ids, whatever the other columns hold."""
    tokenizer = fit(content, num_bins=num_bins)
    ids = tokenizer.encode(content, "series").reshape(content.shape)
    first = 0
    for column, edges in enumerate(tokenizer.edges):
        alone = fit(content[:, [column]], num_bins=num_bins)
        assert alone.edges[0].tolist() == edges.tolist()
        expected = [first + sum(value >= edge for edge in edges) for value in content[:, column]]
        assert ids[:, column].tolist() == expected
        first += len(edges) + 1
    assert first == tokenizer.vocab_size


def test_quantile_bins_hold_equally_many_values_and_uniform_bins_are_equally_wide():
    content = np.random.default_rng(0).lognormal(size=(1000, 1))
    quantile = fit(content, num_bins=8)
    counts = np.bincount(quantile.encode(content, "series"))
    assert counts.min() >= 124
    assert counts.max() <= 126
    means = [content[quantile.encode(content, "series") == index].mean() for index in range(8)]
    assert quantile.centres[0] == pytest.approx(means)
    uniform = fit(content, num_bins=8, spacing="uniform")
    edges = [content.min(), *uniform.edges[0], content.max()]
    assert np.diff(edges) == pytest.approx(np.ptp(content) / 8)
    assert uniform.centres[0] == pytest.approx((np.array(edges[1:]) + edges[:-1]) / 2)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_values_outside_belong_to_the_outer_bins(spacing):
    tokenizer = fit(np.linspace(0, 1, 50)[:, None], spacing=spacing)
    assert tokenizer.encode(np.array([[-1e300], [-1.0], [2.0], [1e300]]), "test").tolist() == [0, 0, 3, 3]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_few_different_values_and_one(spacing):
    """A column of switches gets two quantile bins, a constant one gets one bin."""
    content = np.array([[0.0, 5.0], [1.0, 5.0], [0.0, 5.0]] * 9)
    tokenizer = fit(content, num_bins=64, spacing=spacing)
    assert len(tokenizer.centres[1]) == 1
    if spacing == "quantile":
        assert tokenizer.decode([0, 2, 1, 2]) == b"0,5\n1,5\n"
    assert (
        tokenizer.encode(content, "series").reshape(-1, 2)[0].tolist()
        != tokenizer.encode(content, "").reshape(-1, 2)[1].tolist()
    )


def test_rare_values_are_told_from_a_common_one():
    """Quantiles see no value that is rarer than a bin: a flag that is seldom set, a counter that is seldom not 0."""
    generator = np.random.default_rng(0)
    rare = generator.random(5000) < 0.02
    flag = rare[:, None].astype(float)
    assert fit(flag, num_bins=32).edges[0].tolist() == [1.0]
    assert fit(1 - flag, num_bins=32).edges[0].tolist() == [1.0]
    amounts = np.where(rare, generator.gamma(2.0, size=5000), 0.0)
    for content in (amounts, -amounts, amounts - 7):
        tokenizer = fit(content[:, None], num_bins=32)
        common = np.median(content)
        (own,) = set(tokenizer.encode(np.array([[common]]), ""))
        ids = tokenizer.encode(content[:, None], "")
        assert (ids == own).tolist() == (content == common).tolist()
        assert len(tokenizer.centres[0]) <= 32
    middle = np.concatenate([np.full(4000, 5.0), generator.normal(5, 2, 1000)])
    tokenizer = fit(middle[:, None], num_bins=8)
    ids = tokenizer.encode(middle[:, None], "")
    assert set(ids[4000:]).isdisjoint(ids[:4000])


common_values = st.lists(st.tuples(st.integers(-9, 9), st.integers(1, 40)), min_size=1, max_size=40)


@settings(max_examples=300)
@given(counts=common_values, num_bins=st.integers(2, 16))
def test_a_value_more_common_than_a_bin_has_one_of_its_own(counts, num_bins):
    content = np.concatenate([np.full(count, value / 2) for value, count in counts])
    tokenizer = fit(content[:, None], num_bins=num_bins)
    ids = tokenizer.encode(content[:, None], "")
    assert np.unique(ids).tolist() == [*range(tokenizer.vocab_size)]
    assert tokenizer.vocab_size <= num_bins
    values, totals = np.unique(content, return_counts=True)
    common = values[totals * num_bins > len(content)]
    if 2 * len(common) + 1 <= num_bins or len(values) <= num_bins:
        for value in common:
            assert len(np.unique(content[ids == ids[content == value][0]])) == 1
            assert tokenizer.centres[0][ids[content == value][0]] == value


def test_common_values_at_the_ends_and_in_few_bins():
    zeros = np.append(np.zeros(25), np.linspace(1, 50, 975))  # 2.5 %, one and a half of 64 bins
    tokenizer = fit(zeros[:, None], num_bins=64)
    assert (tokenizer.centres[0][0], tokenizer.edges[0][0]) == (0.0, 1.0)
    counts = np.bincount(tokenizer.encode(zeros[:, None], ""))
    assert (counts[0], counts[1:].min(), counts[1:].max()) == (25, 15, 16)
    many = np.append(np.zeros(46), np.linspace(1, 50, 16))
    assert fit(many[:, None], num_bins=2).edges[0].tolist() == [1.0]
    # Two bins cannot separate a value from those on both of its sides.
    middle = np.concatenate([-np.arange(1.0, 21), np.zeros(46), np.arange(1.0, 21)])
    assert fit(middle[:, None], num_bins=2).edges[0].tolist() == [0.0]
    assert fit(middle[:, None], num_bins=3).edges[0].tolist() == [0.0, 1.0]


def test_uniform_bins_of_the_widest_and_the_narrowest_columns():
    wide = np.array([[-1.7e308], [1.7e308]])
    assert fit(wide, spacing="uniform").edges[0] / 1.7e308 == pytest.approx([-0.5, 0, 0.5])
    for narrow in ([1.0, 1 + 3e-16], [0.0, 5e-324], [1e16, 1e16 + 4]):
        assert fit(np.array(narrow)[:, None], spacing="uniform").vocab_size == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"c0,c1,c2\n", "has no numbers; the rows must have c0, c1, in this order"),
        (b"c1,c0\n", "has no numbers; the rows must have c0, c1, in this order"),
        (b"1,2,3\n", "the line '1,2,3' has 3 fields; a row has one number for each of the columns c0, c1"),
        (b"1,x\n", "has 'x', which is not a finite number"),
        (b"1,\n", "has '', which is not a finite number"),
        (b"1,nan\n", "has 'nan', which is not a finite number"),
        (b"inf,1\n", "has 'inf', which is not a finite number"),
        (b"1_0,1\n", "has '1_0', which is not a finite number"),
        (b"1\r2,3\n", "has a carriage return in it; lines must end with a line feed"),
    ],
)
def test_refused_lines(text, message):
    with pytest.raises(InputError, match=message):
        fit(np.zeros((3, 2))).encode(text, "prompt")


def test_names_and_blank_lines_have_no_tokens():
    tokenizer = fit(np.array([[0.0, 1.0], [2.0, 3.0]]), num_bins=2)
    assert tokenizer.encode(b"c0, c1\n0,1\n\n 2 , 3\r\n", "").tolist() == tokenizer.encode(b"0,1\n2,3", "").tolist()
    assert tokenizer.encode(b"", "").tolist() == []


def test_fields_in_quotation_marks_are_read_as_in_a_file_of_training():
    tokenizer = BinTokenizer(["time", "temp, C"], [[1.0], [1.0]], [[0.0, 2.0], [0.0, 2.0]])
    assert tokenizer.encode(b'"time","temp, C"\n"0","2.5"\n', "").tolist() == tokenizer.encode(b"0,2.5", "").tolist()


@pytest.mark.parametrize("spacing", ["quantile", "uniform"])
def test_values_outside_of_the_training_data_are_counted(spacing, tmp_path):
    tokenizer = fit(np.array([[0.0, 10.0], [2.0, 30.0], [4.0, 20.0]]), num_bins=2, spacing=spacing)
    save_tokenizer(tokenizer, tmp_path)
    rows = b"c0,c1\n0,10\n4,30\n-1,31\n4.001,20\n"
    for one in (tokenizer, load_tokenizer(tmp_path)):
        assert one.count_outside(rows, "").tolist() == [2, 1]
        assert one.count_outside(np.array([[5.0, 5.0]]), "").tolist() == [1, 1]
    # A run of an earlier version does not know them.
    definition = {key: value for key, value in tokenizer.definition.items() if key != "ranges"}
    earlier = BinTokenizer(**definition)
    assert earlier.count_outside(rows, "").tolist() == [0, 0]
    assert earlier.definition == definition


def test_other_arrays_and_damaged_files_are_refused(tmp_path):
    tokenizer = fit(np.arange(8.0).reshape(4, 2))
    for wrong, message in (
        (np.zeros((3, 3)), r"shape \(3, 3\); it must be \(rows, 2\)"),
        (np.array([[0.0, np.nan]]), "not finite"),
    ):
        with pytest.raises(InputError, match=message):
            tokenizer.encode(wrong, "series")
    for wrong, message in ((np.zeros((0, 2)), "no rows"), (np.array([[0.0, np.inf]]), "not a finite number")):
        with pytest.raises(InputError, match=message):
            fit(wrong)
    with pytest.raises(InputError, match="no rows"):
        fit_bins([], columns=["a"], num_bins=2, spacing="quantile")
    with pytest.raises(InputError, match=r"num_bins \(1\) must be at least 2"):
        fit(np.zeros((3, 2)), num_bins=1)
    for edges, centres in (([[2.0, 1.0]], [[0.0, 1.5, 3.0]]), ([[1.0]], [[2.0, 3.0]]), ([[1.0]], [[0.0]]), ([], [])):
        with pytest.raises(InputError, match="bins"):
            BinTokenizer(["c"], edges, centres)
    for ranges in ([], [[0.0]], [[2.0, 1.0]], [[0.0, float("nan")]]):
        with pytest.raises(InputError, match="smallest and the largest value"):
            BinTokenizer(["c"], [[1.0]], [[0.0, 2.0]], ranges)
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for key, value in (
        ("edges", [[1.0], ["a"]]),
        ("edges", [[0.5], [9.0]]),
        ("columns", ["c0"]),
        ("centres", 3),
        ("ranges", 3),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(CheckpointError, match="tokenizer_config.json"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("names", [["0"], ["0", "1"]])
def test_columns_without_names_have_no_line_of_names(names):
    """A row of values that reads like the numbers of the columns is a row."""
    values = np.arange(12.0).reshape(-1, len(names))
    tokenizer = fit_bins([Document("x", values)], columns=names, num_bins=12, spacing="uniform")
    row = [[float(name) for name in names]]
    text = ",".join(names).encode()
    assert tokenizer.encode(text, "").tolist() == tokenizer.encode(np.array(row), "").tolist()
    assert len(tokenizer.encode(b"%b\n%b\n" % (text, text), "")) == 2 * len(names)
