"""How `memformer train` reads its config and options: types of values, and sections of another model or source."""

import re

import pytest
import yaml

from memformer.cli.run_config import parse_run_config
from memformer.errors import InputError
from memformer.models.loading import MODELS
from tests.test_readme import ROOT


@pytest.fixture
def read(tmp_path):
    """Return a function that parses a config and options; it returns the config and the warnings."""

    def parse(given, *options):
        file = tmp_path / "config.yaml"
        file.write_text(given if isinstance(given, str) else yaml.safe_dump(given))
        warnings = []
        return parse_run_config([str(file), *options], warn=warnings.append)[0], warnings

    return parse


@pytest.mark.parametrize("text", ["", " ", "#1"])
def test_a_text_without_content_is_not_null(read, text):
    """An empty value, as of an unset shell variable, is refused where null means a default."""
    with pytest.raises(InputError, match=r"training\.evaluation_tokens \('.*'\) must be an integer"):
        read({"training": {"evaluation_tokens": text}})
    with pytest.raises(InputError, match=r"threads \('.*'\) must be an integer"):
        read({}, "--threads", text)
    assert read({"threads": "null"}, "--training.evaluation_tokens", "null")[0].threads is None


def test_numbers_may_be_written_in_any_way(read):
    """Integers such as 1e3, and 1e-3 that YAML reads as a text, are numbers in a file and as options."""
    text = "training: {num_updates: 1e3, learning_rate: 1e-3, warmup_updates: '7', betas: [5e-1, 0.75]}"
    options = ["--training.num_lanes=4.0", "--model.num_slots", "8.0", "--threads", "1e0", "--data.recall.max_distance"]
    config, _ = read(text, *options, "2e1")
    training = config.training
    assert (training.num_updates, training.learning_rate, training.warmup_updates) == (1000, 0.001, 7)
    assert (training.betas, training.num_lanes, config.model.num_slots) == ((0.5, 0.75), 4, 8)
    assert (config.threads, config.data.recall.max_distance) == (1, 20)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("model: {num_slots: many}", [], "model.num_slots ('many') must be an integer"),
        ("training: {compiled: 1}", [], "training.compiled (1) must be true or false"),
        ("training: {method: magic}", [], "training.method ('magic') must be one of replay, bptt, checkpoint"),
        ("data: {validation: {kind: web}}", [], "data.validation.kind ('web') must be one of text, jsonl"),
        ("seed: 0", ["--model.num_slots", "2.5"], "model.num_slots (2.5) must be an integer"),
        ("seed: 0", ["--training.learning_rate=fast"], "training.learning_rate ('fast') must be a number"),
        ("seed: 0", ["--data.train.kind", "web"], "data.train.kind ('web') must be one of text, jsonl"),
        ("seed: 0", ["--data.validation.kind", "web"], "data.validation.kind ('web') must be one of text, jsonl"),
        ("seed: 0", ["--threads", "many"], "threads ('many') must be an integer"),
        ("seed: 0", ["--model.forgetting_speeds", "[1]"], "model.forgetting_speeds ([1]) must be 2 numbers"),
        ("seed: 0", ["--data.recall.num_facts", "1"], "data.recall.num_facts (1) must be a list of integers"),
        ("seed: 0", ["--model", '{"preset": "paper"}'], "--model is no option: the config comes first, and --KEY.KEY"),
        ("seed: 0", ["--data.recall", "[1]"], "data.recall must be a mapping of its keys to valid values"),
        ("seed: 0", ["--config=other.yaml"], "--config is no option: the config comes first, and --KEY.KEY sets one"),
    ],
)
def test_a_wrong_type_gives_one_clear_sentence(read, text, options, message):
    """No message describes a value by Python's types."""
    with pytest.raises(InputError) as caught:
        read(text, *options)
    assert str(caught.value).startswith(message)


def test_a_config_of_a_memformer_trains_a_baseline(read):
    """With --model_type, the keys of the other model are left out with one warning."""
    text = (ROOT / "experiments" / "text.yaml").read_text()
    config, warnings = read(text, "--model_type", "transformer_xl", "--model.memory_length=64")
    assert (config.model_type, config.model.d_model, config.model.dropout) == ("transformer_xl", 192, 0.1)
    assert (config.model.num_layers, config.model.memory_length) == (8, 64)
    (warning,) = warnings
    assert warning.endswith(
        "config.yaml: model_type transformer_xl does not read model.num_encoder_layers, model.num_slots, "
        "model.convolution_kernel; its defaults are num_layers 8"
    )
    for model_type in MODELS:
        assert read(text, f"--model_type={model_type}")[0].model_type == model_type
    assert read(text, "--model_type", "memformer")[1] == read(text)[1] == []


def test_settings_that_need_a_memformer_and_presets_are_left_out_too(read):
    given = {
        "model": {"preset": "recall", "d_model": 32},
        "training": {"write_penalty": 0.1, "compiled": True, "num_updates": 3},
    }
    config, warnings = read(given, "--model_type", "lstm")
    assert (config.model.d_model, config.training.num_updates, config.training.write_penalty) == (32, 3, 0)
    assert "does not read model.preset, training.write_penalty, training.compiled; its" in warnings[0]
    back = {"model_type": "lstm", "model": {"num_layers": 3, "d_model": 64}}
    config, warnings = read(back, "--model_type", "memformer", "--model.num_slots", "3")
    assert (config.model.num_slots, config.model.d_model, len(warnings)) == (3, 64, 1)


def test_only_keys_of_the_other_model_are_left_out(read):
    with pytest.raises(InputError, match="unknown key 'num_slotz'"):
        read({"model": {"num_slotz": 3, "num_slots": 3}}, "--model_type", "lstm")
    with pytest.raises(InputError, match="unknown option --model.num_slots"):
        read({"model": {"num_slots": 3}}, "--model_type", "lstm", "--model.num_slots", "4")
    with pytest.raises(InputError, match="unknown key 'num_slots'"):
        read({"model_type": "lstm", "model": {"num_slots": 3}})
    with pytest.raises(InputError, match=r"training.write_penalty \(0.5\) needs model_type 'memformer'"):
        read({"training": {"write_penalty": 0.1}}, "--model_type", "lstm", "--training.write_penalty", "0.5")


def test_another_kind_of_data_leaves_out_the_keys_that_it_does_not_read(read):
    """`data.train.path` of a config need not be nulled for a data set of the hub."""
    text = (ROOT / "experiments" / "text.yaml").read_text()
    hub = ["--data.train.kind", "huggingface", "--data.train.name", "some/set", "--data.train.split", "train"]
    config, (warning,) = read(text, *hub)
    assert (config.data.train.name, config.data.train.path) == ("some/set", None)
    assert warning.endswith("config.yaml: data.train.kind huggingface does not read data.train.path")
    given = {
        "data": {
            "tokenizer": {"kind": "bpe", "vocab_size": 300},
            "validation": {"kind": "jsonl", "path": "x", "text_key": "body"},
        }
    }
    config, (warning,) = read(given, "--data.tokenizer.kind=bytes", "--data.validation.kind", "text")
    assert (config.data.tokenizer.kind, config.data.validation.path) == ("bytes", "x")
    assert warning.endswith(
        "data.validation.kind text does not read data.validation.text_key; data.tokenizer.kind bytes does not read "
        "data.tokenizer.vocab_size"
    )
    given["data"] |= {"recall": {"task": "associative", "num_keys": 8, "num_values": 9}, "train": {"kind": "python"}}
    config, (warning,) = read(given, "--data.recall.task", "fact")
    assert (config.data.tokenizer.kind, config.data.validation, config.data.recall.num_values) == ("bytes", None, 9)
    assert warning.endswith(
        "data.recall.task fact does not read data.recall.num_keys; data.recall.task fact does not read "
        "data.validation, data.tokenizer"
    )
    bpe = {"data": {"train": {"kind": "python"}, "tokenizer": {"kind": "bpe", "vocab_size": 300}}}
    config, (warning,) = read(bpe, "--data.train.kind", "digits")
    assert config.data.tokenizer.kind == "bytes"
    assert warning.endswith("config.yaml: data.train.kind digits does not read data.tokenizer")
    assert read(bpe, "--data.train.kind", "python")[0].data.tokenizer.kind == "bpe"
    assert read({"data": {"tokenizer": {"kind": "bytes"}}}, "--data.train.kind", "digits")[1] == []
    with pytest.raises(InputError, match=r"path \('x'\) is not read by kind 'digits'"):
        read(text, "--data.train.kind", "digits", "--data.train.path", "x")


def test_a_deeply_nested_value_is_refused(read):
    """A message shows only the outer levels of a value."""
    nested = "[" * 200 + "]" * 200
    with pytest.raises(InputError, match=r"^model\.num_slots \(\[{4}\.\.\.\]{4}\) must be an integer$"):
        read(f"model: {{num_slots: {nested}}}")
    with pytest.raises(InputError, match=r"^training\.betas \(\[{4}\.\.\.\]{4}\) must be a number$"):
        read(f"training: {{betas: [{nested}, 1]}}")


def test_a_slice_of_an_optional_section_is_no_mapping(read):
    """YAML reads `5:` as a mapping; as an option it is a slice, whichever section it belongs to."""
    for number in ("5:", "-5:", ":5", "5:7"):
        options = [f"--data.validation.documents={number}", "--data.validation.kind", "python"]
        config, _ = read({}, *options, f"--data.train.documents={number}")
        assert (config.data.validation.documents, config.data.train.documents) == (number, number)


@pytest.mark.parametrize("options", [["tensorboard,wandb"], ["[tensorboard, wandb]"], ['["tensorboard","wandb"]']])
def test_a_list_of_words_needs_no_brackets(read, options):
    for given in (["--logging.trackers", *options], [f"--logging.trackers={options[0]}"]):
        assert read({"logging": {"trackers": ["trackio"]}}, *given)[0].logging.trackers == ["tensorboard", "wandb"]
    assert read({}, "--logging.trackers", "wandb")[0].logging.trackers == ["wandb"]
    assert read({}, "--logging.trackers", "[]")[0].logging.trackers == []
    assert read({})[0].logging.trackers == ["tensorboard"]
    with pytest.raises(InputError, match=r"logging\.trackers \(''\) must be one of tensorboard, wandb, trackio"):
        read({}, "--logging.trackers", "")
    assert read({"logging": {"trackers": ["wandb"]}}, "--logging.trackers+", "trackio")[0].logging.trackers == [
        "wandb",
        "trackio",
    ]


@pytest.mark.parametrize("text", ["# .*", "&a", "null # x", "a: b", "[ab]", "true", "12", "\t.*", "5:", "'#.*'", "!x"])
def test_a_text_of_the_command_line_is_taken_as_it_stands(read, text):
    """YAML would read some of them as null, as a mapping, or as nothing."""
    for options in ([f"--data.train.document_start={text}"], ["--data.train.document_start", text]):
        config, _ = read({}, "--data.train.kind", "text", "--data.train.path", "x", *options)
        assert config.data.train.document_start == text
    for key in ("path", "document_start"):
        config, _ = read({}, "--data.validation.path", "x", f"--data.validation.{key}", text)
        if (key, text) != ("path", "[ab]"):  # a path can also be a list
            assert getattr(config.data.validation, key) == text
    assert yaml.safe_load(yaml.safe_dump(config.to_dict())) == config.to_dict()


def test_null_and_lists_of_texts_on_the_command_line(read):
    given = {"data": {"train": {"kind": "text", "path": "x", "document_start": "a"}}}
    assert read(given, "--data.train.document_start", "null")[0].data.train.document_start is None
    given = {"data": {"train": {"kind": "array", "path": "x"}, "validation": {"kind": "array", "path": "y"},
                      "tokenizer": {"kind": "bins"}}}  # fmt: skip
    for text in ("temp,load", "temp, load", "[temp, load]", '["temp","load"]'):
        assert read(given, "--data.train.columns", text)[0].data.train.columns == ["temp", "load"]
    assert read(given, "--data.train.columns", "temp")[0].data.train.columns == ["temp"]
    assert read(given, "--data.train.path", "[a, b]")[0].data.train.path == ["a", "b"]
    with pytest.raises(InputError, match=r"data\.train\.columns \(0\) must be a text \(in YAML, put it in quotes\)"):
        read(given, "--data.train.columns", "[0, 1]")


def test_a_slice_from_the_end_is_a_value(read):
    for name in ("train", "validation"):
        for text in ("-10:", "-50:-5"):
            options = ["--data.validation.kind", "python", f"--data.{name}.documents", text]
            assert getattr(read({}, *options)[0].data, name).documents == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.test.levels", "3"], "data.test.path (None) must be given for kind 'text'"),
        (["--data.validation.kind", "jsonl"], "data.validation.path (None) must be given for kind 'jsonl'"),
        (["--data.train.rows", "x"], "data.train.rows ('x') is not read by kind 'python', only by array"),
        (["--data.tokenizer.num_bins", "1"], "data.tokenizer.num_bins (1) must be at least 2"),
        (["--model.d_model", "-3"], "model.d_model (-3) must be at least 1"),
        (["--model.d_model", "6", "--model.num_heads", "2"], "model: rotary positions need an even head width"),
    ],
)
def test_the_message_names_the_section(read, options, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        read({}, *options)


def test_a_wrong_value_of_a_section_in_a_section_is_named(read):
    with pytest.raises(InputError, match=r"^data\.recall\.curriculum\.window \(0\) must be at least 1"):
        read({}, "--data.recall.curriculum.window", "0")
    with pytest.raises(InputError, match=r"^data\.recall\.max_distance \(0\) must be at least 1"):
        read({}, "--data.recall.curriculum.window", "5", "--data.recall.max_distance", "0")
    with pytest.raises(InputError, match="unknown option .*windw; did you mean --data.recall.curriculum.window"):
        read({}, "--data.recall.curriculum.windw", "5")


def test_a_source_without_a_kind_has_that_of_the_training_documents(read):
    """Texts that are JSON lines would otherwise be read as they stand, brackets and keys included."""
    train = {"kind": "jsonl", "path": "a.jsonl"}
    data = read({"data": {"train": train, "validation": {"path": "b.jsonl"}}}, "--data.test.path", "c.jsonl")[0].data
    assert (data.validation.kind, data.test.kind) == ("jsonl", "jsonl")
    data = read({"data": {"train": train, "validation": {"kind": "text", "path": "b"}}})[0].data
    assert data.validation.kind == "text"
    data = read({"data": {"validation": {"path": "b"}}}, "--data.train.kind", "jsonl", "--data.train.path", "a")[0].data
    assert data.validation.kind == "jsonl"
    data = read({"data": {"train": {"path": "book.txt"}, "validation": {"path": "b"}}})[0].data
    assert (data.train.kind, data.validation.kind) == ("text", "text")
    assert read({}, "--data.train.path", "book.txt")[0].data.train.kind == "text"
    data = read({"data": {"train": {"name": "some/data", "split": "train"}}})[0].data
    assert data.train.kind == "huggingface"
    assert read({})[0].data.train.kind == "python"


@pytest.mark.parametrize("value", ["{a.txt: 0.7, b.txt: 0.3}", "!!set {a.txt, b.txt}", "{a.txt: b.txt}"])
def test_a_mapping_is_no_list_of_paths(read, value):
    """Its values, such as the shares of two files, would be dropped."""
    with pytest.raises(InputError, match=r"data\.train\.path \(\{.*\) must be a text"):
        read(f"data: {{train: {{kind: text, path: {value}}}}}")
    with pytest.raises(InputError, match=r"data\.train\.columns \(\{.*\) must be a list of texts"):
        read(f"data: {{train: {{kind: array, path: x, columns: {value}}}}}")
