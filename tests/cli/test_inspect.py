"""`memformer inspect`: the page is complete, self-contained and harmless; --json is the data of Python."""

import base64
import html.parser
import io
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from memformer import InputError, LSTMConfig, Memformer, build_model
from memformer.data import ByteTokenizer, load_tokenizer, save_tokenizer
from memformer.evaluation.inspection import InspectionOptions, inspect_memory
from memformer.evaluation.streams import read_stream
from memformer.training.run_folder import load_run
from tests.cli.calls import call, call_json, make_text, refused
from tests.helpers import tiny_config


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("inspect") / "notes.txt"
    file.write_text(make_text(7) * 2)
    return file


def new_page(*argv, output):
    pytest.importorskip("plotly", reason="the page needs plotly")
    status, out, err = call("inspect", *argv, "--output", output)
    assert status == 0, err
    assert out.endswith(f"wrote {output}\n")
    return output.read_text(encoding="utf-8")


class Elements(html.parser.HTMLParser):
    """The elements of a page, and the text of its data element."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.data, self._is_data = [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._is_data = dict(attributes).get("id") == "data"

    def handle_data(self, data):
        self.data += data if self._is_data else ""


def unpacked(value):
    numbers = np.frombuffer(base64.b64decode(value["data"]), "<u2") / 65535
    return numbers.reshape(value["shape"])


def test_json_is_the_data_of_python(run_folder, text):
    printed = call_json("inspect", run_folder, "--text", text, "--window", "2", "5", "--num_probes", "1")
    with pytest.raises(InputError, match=r"^which \('bset'\) must be one of best, last$"):
        load_run(run_folder, which="bset")
    run = load_run(run_folder)
    model = run.model
    stream = read_stream(
        [np.frombuffer(text.read_bytes(), np.uint8)],
        segment_length=model.segment_length,
        bos_token_id=model.bos_token_id,
    )
    options = InspectionOptions(window=(2, 5), num_probes=1)
    found = json.loads(json.dumps(inspect_memory(model, stream, tokenizer=run.tokenizer, options=options).to_dict()))
    assert (printed.pop("weights"), printed.pop("source")) == (str(run_folder / "best"), f"Read from {text}.")
    assert printed == found
    assert printed["num_tokens"] == len(text.read_bytes())
    content = text.read_text()
    assert ["".join(step["target_texts"]) for step in printed["timesteps"]] == [
        content[16:24],
        content[24:32],
        content[32:40],
    ]
    assert not (run_folder / "inspect.html").exists()


def test_the_sums_are_those_of_evaluate(run_folder, text):
    printed = call_json("inspect", run_folder, "--text", text)
    documents = call_json("evaluate", run_folder, "--data.kind", "text", "--data.path", text)
    for key, name in (("nll", "with_memory"), ("nll_erased", "memory_erased")):
        bits = printed[key] / printed["num_tokens"] / np.log(2)
        assert bits == pytest.approx(documents[name]["bits_per_token"], rel=1e-6)
    given = call_json("inspect", run_folder, "--data.kind", "text", "--data.path", text)
    assert given["nll"] == pytest.approx(printed["nll"], rel=1e-6)


def test_a_pipe_is_read_like_a_file(run_folder, text, monkeypatch):
    expected = call_json("inspect", run_folder, "--text", text)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.read_bytes())))
    found = call_json("inspect", run_folder, "--text", "-")
    assert found.pop("source") == "Read from stdin."
    expected.pop("source")
    assert found == expected


def test_the_page_is_self_contained_and_a_text_cannot_change_it(run_folder, tmp_path):
    attack = "</script><script>alert(1)</script><img src=http://x.example/a onerror=alert(2)> & <!-- \u2028"
    (tmp_path / "bad.txt").write_text(attack, encoding="utf-8")
    page = new_page(run_folder, "--text", tmp_path / "bad.txt", output=tmp_path / "new" / "page.html")
    found = Elements(page)
    tags = [tag for tag, _ in found.elements]
    assert tags.count("script") == 3
    assert tags.count("meta") == 3
    assert not {"img", "link", "iframe", "object"} & set(tags)
    assert not [names for _, names in found.elements if {"src", "href", "onerror"} & names.keys()]
    policy = next(names["content"] for _, names in found.elements if "http-equiv" in names)
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    data = json.loads(found.data)
    assert "".join(part for step in data["timesteps"] for part in step["target_texts"]) == attack


def test_the_page_holds_the_weights(run_folder, text, tmp_path):
    page = new_page(run_folder, "--text", text, output=tmp_path / "page.html")
    data, printed = json.loads(Elements(page).data), call_json("inspect", run_folder, "--text", text)
    assert data["passages"] == printed["passages"]
    assert data["slots"] == printed["slots"]
    for packed, plain in zip(data["timesteps"], printed["timesteps"], strict=True):
        for name in ("kept", "writer", "readers"):
            np.testing.assert_allclose(unpacked(packed[name]), plain[name], atol=1 / 65535)


def test_the_page_of_a_run_goes_into_its_folder(copied, text):
    pytest.importorskip("plotly", reason="the page needs plotly")
    status, out, err = call("inspect", copied, "--text", text, "--max_timesteps", "4")
    assert status == 0, err
    assert (copied / "inspect.html").exists()
    for shown in ("holding", "aggregating", "fast turnover", "60-80 %", "memory gain", "timesteps is kept in full"):
        assert shown in out
    assert "One in 8 of the stream" in (copied / "inspect.html").read_text(encoding="utf-8")


def test_without_a_text_a_run_reads_its_own_data(run_folder, digits):
    printed = call_json("inspect", run_folder)
    assert printed["num_documents"] == 1
    assert "the run's held-out documents" in printed["source"]
    images = call_json("inspect", digits[0], "--num_documents", "3")
    assert (images["num_documents"], images["image_width"], images["num_tokens"]) == (3, 8, 3 * 64)
    assert [step["timestep"] for step in images["timesteps"]] == 3 * list(range(8))
    assert "--text does not apply to a run on images" in refused("inspect", digits[0], "--text", "x.txt")


def test_a_recall_run_reads_an_episode(base, tmp_path):
    config = yaml.safe_load((base / "config.yaml").read_text())
    recall = {"task": "associative", "num_facts": [2, 2], "num_keys": 5, "max_distance": 3, "question_probability": 1}
    config |= {"folder": str(tmp_path / "recall"), "data": {"recall": recall}}
    config["training"] = {"num_updates": 1, "num_lanes": 2, "rollout_length": 2, "sample_tokens": 0}
    (tmp_path / "recall.yaml").write_text(yaml.safe_dump(config))
    call_json("train", tmp_path / "recall.yaml")
    found = [call_json("inspect", tmp_path / "recall", "--seed", seed) for seed in (0, 0, 3)]
    assert found[0] == found[1] != found[2]
    assert found[0]["source"].startswith("Read one episode of the recall task 'associative' (seed 0)")
    assert found[0]["num_tokens"] == sum(len(step["target_ids"]) for step in found[0]["timesteps"]) > 0
    message = refused("inspect", tmp_path / "recall", "--num_documents", "2")
    assert message == "--num_documents does not apply to a run on a recall task"


def saved(model, folder):
    model.save_pretrained(folder)
    save_tokenizer(ByteTokenizer(), folder)
    return folder


def test_models_without_memory_slots_are_refused(tmp_path, text):
    without = saved(Memformer(tiny_config(num_slots=0, vocab_size=256)), tmp_path / "without")
    assert refused("inspect", without, "--text", text).startswith("num_slots is 0: the model has no memory to inspect")
    lstm = saved(build_model(LSTMConfig(d_model=8, num_layers=1, segment_length=8)), tmp_path / "lstm")
    assert "the model is an LSTM, whose memory has no slots that are read and written" in refused(
        "inspect", lstm, "--text", text
    )
    assert not list(tmp_path.rglob("inspect.html"))


def test_bad_texts_write_nothing(run_folder, tmp_path):
    pytest.importorskip("plotly", reason="the page needs plotly")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"text that turns" * 20 + bytes(range(256)))
    output = tmp_path / "page.html"
    for name, message in (
        ("empty.txt", "is empty; an inspection needs a text of at least 1 token"),
        ("binary.txt", "is not UTF-8 text at byte offset 300"),
        ("missing.txt", "cannot be read: No such file or directory"),
    ):
        assert message in refused("inspect", run_folder, "--text", tmp_path / name, "--output", output)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["binary.txt", "empty.txt"]


def test_the_page_replaces_nothing_that_is_read(run_folder, text, tmp_path):
    pytest.importorskip("plotly", reason="the page needs plotly")
    before = text.read_bytes()
    for output in (text, run_folder / "config.yaml"):
        kept = output.read_bytes()
        assert "must end in .html" in refused("inspect", run_folder, "--text", text, "--output", output)
        assert output.read_bytes() == kept
    source = tmp_path / "source.html"
    source.write_bytes(before)
    for options in (["--text", source], ["--data.kind", "text", "--data.path", source]):
        assert "is a file that is read" in refused("inspect", run_folder, *options, "--output", source)
        assert source.read_bytes() == before
    page = tmp_path / "page.html"
    page.write_text("of before", encoding="utf-8")
    missing = refused("inspect", run_folder, "--text", tmp_path / "missing.txt", "--output", page)
    assert "cannot be read: No such file or directory" in missing
    assert text.read_bytes() == before


def test_a_missing_plotly_is_one_sentence_and_json_needs_none(run_folder, text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    message = refused("inspect", run_folder, "--text", text, "--output", tmp_path / "page.html")
    assert message == "the page needs the extra: pip install 'memformer-lm[inspect]'; --json does not"
    assert call_json("inspect", run_folder, "--text", text)["num_documents"] == 1


def test_a_saved_model_needs_a_text(run_folder, text, tmp_path):
    folder = tmp_path / "saved"
    Memformer.from_pretrained(run_folder / "best").save_pretrained(folder)
    save_tokenizer(load_tokenizer(run_folder), folder)
    assert re.search("has no data of its own; give --text, or --data.kind", refused("inspect", folder))
    assert call_json("inspect", folder, "--text", text)["num_documents"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "a", "--data.kind", "digits"], "--text and --data are both given; give only one of them"),
        (["--text", "a", "--seed", "1"], "--seed does not apply to a run that reads --text"),
        (["--seed", "1"], "--seed does not apply to a run on documents"),
        (["--num_documents", "0"], "num_documents (0) must be at least 1"),
        (["--window", "4", "2"], "window ([4, 2]) must be a first timestep and a larger timestep after the last one"),
        (["--max_timesteps", "0"], "max_timesteps (0) must be at least 1"),
        (["--data.kind", "digits"], "data of kind 'digits' does not fit the run's tokenizer of kind 'bytes'"),
        (["--windw", "1"], "unknown option --windw; did you mean --window?"),
    ],
)
def test_refused_inspection(run_folder, options, message):
    assert refused("inspect", run_folder, *options, "--json") == message
