"""Every error message that tells a user what to do: following it works.

Advice that other tests follow: `--checkpoint last` and the first line of config.yaml (`test_loading.py`),
`--load_session` instead of `--resume`, and the same prompt (`test_reading.py`), `--resume` for a folder with a run
(`training/test_resuming.py`).
"""

import importlib.metadata
import os
import re
import shutil
import signal

import pytest
import yaml
from packaging.requirements import Requirement

from memformer import Memformer, Session
from memformer.data import ByteTokenizer, save_tokenizer
from memformer.utils.ownership import owned_folder
from tests.cli.calls import call, call_json, refused
from tests.helpers import tiny_model

pytestmark = pytest.mark.usefixtures("without_report")


@pytest.fixture
def train(base, tmp_path):
    """Arguments of a run in a new folder."""
    return ["train", base / "config.yaml", "--folder", tmp_path / "new", "--training.sample_tokens", "0"]


@pytest.fixture
def too_fast(train, monkeypatch):
    """Arguments of a run whose every update is finite only while its weights are small."""
    monkeypatch.setattr("memformer.training.loop.clip_gradients", gradient_norm_of_small_weights)
    options = {"learning_rate": "1000", "max_skipped_in_a_row": "2", "evaluate_every": "9"}
    return [*train, *(f"--training.{name}={value}" for name, value in options.items())]


def gradient_norm_of_small_weights(model, limit):
    return 1.0 if model.embedding.weight.abs().max() < 100 else float("inf")


def test_too_high_a_learning_rate_before_the_first_checkpoint(too_fast):
    """A run that diverged before its first checkpoint can be run again with a lower learning rate."""
    argv = [*too_fast, "--training.num_updates", "6", "--training.save_every", "9"]
    message = refused(*argv)
    assert message.endswith("No checkpoint was saved; run the command again with a lower training.learning_rate")
    assert call_json(*argv, "--training.learning_rate", "0.01")["num_tokens"] > 0


def test_too_high_a_learning_rate_after_a_good_checkpoint(too_fast, tmp_path):
    """A run that diverged after a good checkpoint can be resumed with a lower learning rate."""
    argv = [*too_fast, "--training.num_updates", "6", "--training.save_every", "2"]
    low = ["--training.learning_rate", "0.01"]
    call_json(*argv, *low, "--training.num_updates", "2")
    message = refused(*argv, "--resume")
    checkpoint = tmp_path / "new" / "checkpoints" / "update-000000002"
    assert f"Continue from {checkpoint} with --resume and a lower training.learning_rate" in message
    assert call_json(*argv, "--resume", *low)["num_tokens"] > 0


def test_too_high_a_learning_rate_with_a_broken_checkpoint(too_fast, tmp_path):
    """A run whose checkpoint has broken weights cannot be resumed, and the message does not advise it."""
    argv = [*too_fast, "--training.num_updates", "6", "--training.save_every", "1"]
    message = refused(*argv)
    checkpoint = tmp_path / "new" / "checkpoints" / "update-000000001"
    advice = f"No update was made after {checkpoint} either; start a new run with another --folder and a lower"
    assert advice in message
    low = ["--training.learning_rate", "0.01"]
    assert "start a new run with another --folder" in refused(*argv, "--resume", *low)
    assert call_json(*argv, "--folder", tmp_path / "other", *low)["num_tokens"] > 0


def test_too_high_a_learning_rate_found_by_an_evaluation(train, tmp_path):
    """A run whose weights are found to be broken by an evaluation gets the same advice, which works."""
    argv = [*train, "--training.num_updates", "6", "--training.save_every", "2", "--training.evaluate_every", "3"]
    low = ["--training.learning_rate", "0.01"]
    call_json(*argv, *low, "--training.num_updates", "2")
    message = refused(*argv, "--resume", "--training.learning_rate", "1e30")
    assert message.startswith("update 3: the negative log-likelihood is not finite")
    checkpoint = tmp_path / "new" / "checkpoints" / "update-000000002"
    assert f"Continue from {checkpoint} with --resume and a lower training.learning_rate" in message
    assert call_json(*argv, "--resume", *low)["num_tokens"] > 0


def test_a_run_folder_as_config_with_another_tokenizer(train, tmp_path):
    """The vocabulary size, which cannot be given, is derived again for a new run with a run's config."""
    bpe = ["--data.tokenizer.kind", "bpe", "--data.tokenizer.vocab_size", "270"]
    call_json(*train, *bpe, "--training.num_updates", "1")
    assert Memformer.from_pretrained(tmp_path / "new" / "best").vocab_size > 256
    as_bytes = ["--data.tokenizer.kind", "bytes", "--data.tokenizer.vocab_size", "null"]
    call_json("train", tmp_path / "new", "--folder", tmp_path / "other", *as_bytes)
    assert Memformer.from_pretrained(tmp_path / "other" / "best").vocab_size == 256
    assert "the run began with data.tokenizer.kind: bpe" in refused("train", tmp_path / "new", "--resume", *as_bytes)


def test_a_vocabulary_size_that_contradicts_the_tokenizer_can_be_left_out(base, train, tmp_path):
    """The config is valid without model.vocab_size."""
    config = yaml.safe_load((base / "config.yaml").read_text())
    config["training"]["num_updates"] = 1
    for vocab_size in ({"vocab_size": 300}, {}):
        config["model"] = {key: value for key, value in config["model"].items() if key != "vocab_size"} | vocab_size
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        argv = ["train", tmp_path / "config.yaml", *train[2:]]
        if vocab_size:
            assert "leave it out" in refused(*argv)
    assert call(*argv)[0] == 0


def test_a_run_without_weights(copied):
    """Where there is no checkpoint either, the message does not advise to load it."""
    shutil.rmtree(copied / "best")
    for checkpoint in (copied / "checkpoints").iterdir():
        checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}-mine"))
    assert refused("generate", copied).endswith("has no evaluated weights yet, and no checkpoint")


def test_a_folder_in_use_or_with_other_files_can_be_exchanged_for_another(train, tmp_path):
    """Another --folder is accepted where one is in use, and where it holds other files."""
    with owned_folder(tmp_path / "new", option="--folder"):
        assert "or choose another --folder" in refused(*train)
        other = ["--folder", tmp_path / "other", "--training.num_updates", "1"]
        assert call(*train, *other)[0] == 0
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "letter").write_text("")
    assert "choose an empty or a new folder" in refused(*train)
    (tmp_path / "empty").mkdir()
    assert call(*train, "--folder", tmp_path / "empty", "--training.num_updates", "1")[0] == 0


@pytest.mark.parametrize("fraction", ["0.05", "0.4"])
@pytest.mark.parametrize("number", [0, 1])
def test_too_many_lanes(train, tmp_path, number, fraction):
    """Either of the two limits that the message names makes enough documents for the lanes."""
    (tmp_path / "texts").mkdir()
    for name, size in (("a", 4000), ("b", 90), ("c", 700)):
        (tmp_path / "texts" / name).write_bytes(bytes(range(97, 107)) * (size // 10))
    argv = [*train, "--data.train.path", tmp_path / "texts", "--data.validation_fraction", fraction]
    argv += ["--training.num_lanes", "16", "--training.num_updates", "1"]
    message = refused(*argv)
    advice = re.search(r"set (training\.\w+) to at most (\d+), or, .*, (data\.\w+) to at most (\d+)", message).groups()
    key, value = advice[2 * number : 2 * number + 2]
    assert call(*argv, f"--{key}", value)[0] == 0


def test_a_single_document_can_be_cut_into_pieces(train, tmp_path):
    """With data.max_document_tokens, a part of a single document can be held out."""
    (tmp_path / "text").write_bytes(b"abcdefghi " * 100)
    argv = [*train, "--data.train.path", tmp_path / "text", "--training.num_updates", "1"]
    assert "set data.max_document_tokens to at most 500 to cut documents up" in refused(*argv)
    assert call(*argv, "--data.max_document_tokens", "50")[0] == 0


def test_text_in_another_encoding_can_be_converted(train, tmp_path):
    """Text that is not UTF-8 is refused, and read when it was converted."""
    (tmp_path / "texts").mkdir()
    files = [tmp_path / "texts" / name for name in "abcdef"]
    argv = [*train, "--data.train.path", tmp_path / "texts", "--training.num_updates", "1"]
    for file in files:
        file.write_bytes("né pas".encode("latin-1") * 30)
    assert refused(*argv).endswith("it is binary or in another encoding; convert it to UTF-8 first")
    for file in files:
        file.write_text(file.read_text("latin-1"), "utf-8")
    assert call(*argv)[0] == 0


def test_a_damaged_cache_can_be_deleted(train, tmp_path):
    """Damaged token ids are built again after their folder was deleted."""
    argv = [*train, "--data.cache", tmp_path / "cache", "--training.num_updates", "1"]
    call_json(*argv)
    (folder,) = (tmp_path / "cache").iterdir()
    tokens = folder / "tokens.bin"
    for content in (tokens.read_bytes()[:-1], tokens.read_bytes()[:-1] + b"\xff"):
        tokens.write_bytes(content)
        message = refused(*argv, "--folder", tmp_path / "other")
        assert message.startswith(f"{folder}/")
        assert message.endswith("delete the folder to build it again")
    shutil.rmtree(folder)
    assert call(*argv, "--folder", tmp_path / "other")[0] == 0


def test_a_saved_model_is_evaluated_on_given_data_and_gets_a_tokenizer(run_folder, base, tmp_path):
    """A folder from save_pretrained needs --data.kind and --data.path, and save_tokenizer completes it."""
    text = ["--data.kind", "text", "--data.path", base / "texts"]
    message = refused("evaluate", run_folder / "best")
    assert message.endswith("has no held-out documents of its own; give --data.kind and --data.path")
    assert call("evaluate", run_folder / "best", *text)[0] == 0
    assert "give a run folder" in refused("retention", run_folder / "best")
    tiny_model(vocab_size=300).save_pretrained(tmp_path / "model")
    assert "memformer.data.save_tokenizer writes one" in refused("generate", tmp_path / "model")
    tiny_model(vocab_size=256).save_pretrained(tmp_path / "model")
    save_tokenizer(ByteTokenizer(), tmp_path / "model")
    assert call("generate", tmp_path / "model", "--max_new_tokens", "1")[0] == 0


@pytest.mark.parametrize("extra", ["digits", "datasets"])
def test_the_extras_that_messages_name_exist(extra):
    """`pip install 'memformer-lm[...]'` installs what a kind of data needs."""
    requirements = [Requirement(text) for text in importlib.metadata.requires("memformer-lm")]
    names = {each.name for each in requirements if each.marker and each.marker.evaluate({"extra": extra})}
    assert {"digits": "scikit-learn", "datasets": "datasets"}[extra] in names


def test_a_value_that_was_left_out_has_its_default(base, train, tmp_path):
    """A key without a value can be left out."""
    config = yaml.safe_load((base / "config.yaml").read_text())
    config["training"]["num_lanes"] = None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    argv = ["train", tmp_path / "config.yaml", *train[2:], "--training.num_updates", "1"]
    assert "num_lanes (null)" in (message := refused(*argv))
    assert message.endswith("must have a value; leave it out for the default")
    del config["training"]["num_lanes"]
    config["data"]["max_document_tokens"] = 20
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert call(*argv)[0] == 0


def test_two_prompts_can_be_one(run_folder):
    """Of --prompt and --prompt_file, one alone is accepted."""
    argv = ["generate", run_folder, "--max_new_tokens", "0", "--prompt", "a"]
    assert "give only one of them" in refused(*argv, "--prompt_file", run_folder / "config.yaml")
    assert call(*argv)[0] == 0


@pytest.mark.parametrize("argv", [["train", "--promt", "3"], ["generate", "--promt", "x"], ["evaluate", "--zzzzzzzz"]])
def test_the_help_or_option_that_a_message_names_exists(argv, base, run_folder):
    """The option that is named instead of an unknown one, and the help, exist."""
    target = base / "config.yaml" if argv[0] == "train" else run_folder
    message = refused(argv[0], target, *argv[1:])
    suggested = re.search(r"did you mean (--[\w.]+)\?|see (--help)", message)
    option = suggested[1] or suggested[2]
    assert option in call(argv[0], "--help")[1]


def test_an_interrupted_generation_goes_on_with_the_option_that_is_named(run_folder, tmp_path, monkeypatch):
    """After an interrupt while tokens are generated, --load_session continues."""
    logits = Session.next_token_logits

    def signal_and_return_logits(session):
        if session.num_tokens == [3]:
            os.kill(os.getpid(), signal.SIGTERM)
        return logits(session)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "next_token_logits", signal_and_return_logits)
        _, _, error = call("generate", run_folder, "--save_session", tmp_path / "state")
    option = error.strip().rpartition(", continue with ")[2].split()
    assert option == ["--load_session", str(tmp_path / "state")]
    assert call("generate", run_folder, *option, "--max_new_tokens", "1")[0] == 0
