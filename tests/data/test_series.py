"""Series from CSV files and NumPy arrays: columns by name, slices of rows, and what is refused."""

import gzip
import tracemalloc

import numpy as np
import pytest

from memformer import InputError
from memformer.data import SourceConfig, iterate_documents
from memformer.data.files import SourceFile
from memformer.data.series import series_columns

CSV = "time,temp,load\n2026-01-01,1.5,2\n2026-01-02,-3e2, 4\n2026-01-03,0,6\n"


@pytest.fixture
def file(tmp_path):
    (tmp_path / "x.csv").write_text(CSV)
    return tmp_path / "x.csv"


def read(path, **options):
    path = [str(each) for each in path] if isinstance(path, list) else str(path)
    source = SourceConfig(kind="array", path=path, **options)
    return [document.content.tolist() for document in iterate_documents(source)]


def test_columns_are_read_by_name_in_the_given_order(file):
    assert read(file, columns=["load", "temp"]) == [[[2.0, 1.5], [4.0, -300.0], [6.0, 0.0]]]


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_file_without_names_and_an_array_are_the_same(tmp_path, compress):
    values = np.arange(8.0).reshape(4, 2)
    np.save(tmp_path / "x.npy", values)
    (tmp_path / "x.npy").write_bytes(compress((tmp_path / "x.npy").read_bytes()))
    (tmp_path / "x.csv").write_bytes(compress(b"\xef\xbb\xbf0,1\r\n2,3\r\n\r\n4,5\r\n6,7"))
    assert read(tmp_path / "x.npy") == read(tmp_path / "x.csv") == [values.tolist()]
    assert read(tmp_path / "x.npy", columns=["1"]) == [values[:, [1]].tolist()]
    np.save(tmp_path / "y.npy", np.array([1, 2], np.int8))
    assert read([tmp_path / "x.csv", tmp_path / "y.npy"], columns=["0"]) == [values[:, [0]].tolist(), [[1.0], [2.0]]]


def test_names_may_be_numbers_if_the_columns_say_so(tmp_path):
    (tmp_path / "x").write_text("time,50,x\n2024,2,3\n2025,4,5\n")
    assert read(tmp_path / "x", columns=["50", "x"]) == [[[2, 3], [4, 5]]]
    assert read(tmp_path / "x", columns=["50"]) == [[[2], [4]]]
    (tmp_path / "x").write_text("2024-01-01,3,4\n2024-01-02,5,6\n")  # no names
    assert read(tmp_path / "x", columns=["2", "1"]) == [[[4, 3], [6, 5]]]
    (tmp_path / "x").write_text("2019,2020\n1,2\n3,4\n")
    assert read(tmp_path / "x", columns=["2020", "2019"]) == [[[2, 1], [4, 3]]]
    assert read(tmp_path / "x") == [[[2019, 2020], [1, 2], [3, 4]]]
    (tmp_path / "x").write_text("1,0\n5,6\n")  # no names
    assert read(tmp_path / "x", columns=["1"]) == [[[0], [6]]]
    (tmp_path / "x").write_text(",a\n0,5\n1,6\n")  # an index
    assert read(tmp_path / "x", columns=["a"]) == [[[5], [6]]]
    (tmp_path / "x").write_text("a,a,b\n1,2,3\n")  # two columns that are not read
    assert read(tmp_path / "x", columns=["b"]) == [[[3]]]


def test_rows_divide_a_file(file):
    for rows, expected in ((":2", [2.0, 4.0]), ("2:", [6.0]), ("-2:", [4.0, 6.0]), ("1:-1", [4.0])):
        assert read(file, columns=["load"], rows=rows) == [[[value] for value in expected]]


def npy_header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (CSV, {}, r"line 2, column 'time' is '2026-01-01', which is not a number; choose the columns"),
        (CSV, {"columns": ["temp", "x"]}, "has no column 'x'; its columns are time, temp, load"),
        (CSV, {"columns": ["temp"], "rows": "3:"}, "has no values to read in rows 3:"),
        ("a,b\n1,2\n3\n", {}, "line 3 has 1 fields; the first line has 2"),
        ("a\n1\n\nNaN\n", {}, r"row 1 \(counted from 0\), column 'a' is nan; a series needs finite numbers"),
        ("a,b\n1,2\n3,\n", {}, r"row 1 \(counted from 0\), column 'b' is nan"),
        ("a,b\n1,2\n3,\n", {"columns": ["b"], "rows": "1:"}, r"row 1 \(counted from 0\), column 'b' is nan"),
        ("1\ninf\n", {}, "column '0' is inf"),
        ("a,a\n1,2\n", {}, "has two columns of the same name: a, a"),
        (",a\n0,5\n1,6\n", {}, "the first line ',a' has a column without a name .* choose the columns to read"),
        ("time,2,1\n9,8,7\n", {"columns": ["2", "1"]}, "x: the first line 'time,2,1' has the columns 2, 1 as names"),
        ("2024-01-01,1,0\n", {"columns": ["1"]}, "has the columns 1 as names or as values"),
        ("a,b\n", {}, "has no values to read"),
        ("temp;power\n1,5;2,5\n", {}, "the first line 'temp;power' has ';' in it; .* must be separated by commas"),
        ("1\t2\n", {}, "separated by commas"),
        ("20,126;124,33\n", {}, "the first line '20,126;124,33' has ';' in it"),
        ("a\n" + '"' + "x" * 200_000, {}, "is not CSV"),
        (b"\x93NUMPY\x01\x00\x76", {}, "is not a NumPy array of numbers"),
        (npy_header("{'descr': '<f8',}"), {}, "is not a NumPy array of numbers"),
        (npy_header("{'descr': ("), {}, "is not a NumPy array of numbers"),
        (
            npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999,)}"),
            {},
            "is not a NumPy array",
        ),
        (b"\x89PNG\r\n\x1a\n", {}, "is not UTF-8 text at byte offset 0"),
    ],
)
def test_refused_files(tmp_path, content, options, message):
    (tmp_path / "x").write_bytes(content if isinstance(content, bytes) else content.encode())
    if not options and str(content).startswith("a,a"):
        with pytest.raises(InputError, match=message):
            series_columns([SourceFile(tmp_path / "x", True)], None)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "x", **options)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (5, 0)])
def test_an_array_without_values_is_refused(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.zeros(shape))
    with pytest.raises(InputError, match="has no values to read"):
        read(tmp_path / "x.npy")


def test_a_file_of_two_arrays_is_refused(tmp_path):
    with (tmp_path / "x.npy").open("wb") as file:
        np.save(file, np.arange(4.0))
        np.save(file, np.arange(4.0))
    with pytest.raises(InputError, match=r"it has data after the array, of shape \(4,\)"):
        read(tmp_path / "x.npy")


@pytest.mark.parametrize("array", [np.zeros((2, 2, 2)), np.array(["a"]), np.array([{}], dtype=object)])
def test_refused_arrays(tmp_path, array):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match="numbers"):
        read(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": []}, r"columns \(\[\]\) must be at least one name"),
        ({"columns": ["a", "a"]}, "each of them once"),
        ({"rows": "5"}, r"rows \('5'\) must be 'start:stop'"),
        ({"path": None}, "path"),
        ({"text_key": "body"}, "is not read by kind 'array'"),
        ({"kind": "text", "rows": ":5"}, "is not read by kind 'text', only by array"),
    ],
)
def test_refused_configs(options, message):
    with pytest.raises(InputError, match=message):
        SourceConfig(**{"kind": "array", "path": "x", **options})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x has no values to read"),
        (b"\n\r\n", "x has no values to read"),
        (b",a\n0,5\n", "has a column without a name"),
    ],
)
def test_columns_of_a_file_that_has_none_are_refused(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=message):
        series_columns([SourceFile(tmp_path / "x", None)], None)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "x")


def test_columns_of_an_array_without_any_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((5, 0)))
    with pytest.raises(InputError, match="has no values to read"):
        series_columns([SourceFile(tmp_path / "x.npy", None)], None)


def test_a_long_series_needs_little_more_memory_than_its_values(tmp_path):
    rows = 200_000
    (tmp_path / "a.csv").write_text("x,y\n" + "1.25,-3.5\n" * rows)
    tracemalloc.start()
    try:
        ((_, values),) = iterate_documents(SourceConfig(kind="array", path=str(tmp_path / "a.csv")))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert values.shape == (rows, 2)
    assert peak < 4 * values.nbytes  # lists of rows: about ten times as much
