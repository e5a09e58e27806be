"""The command as a person meets it: what it prints, what it leaves on disk, and how it refuses."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import threading

import matplotlib.image
import pytest
import torch
import yaml

from memformer import Memformer, Session
from memformer.cli import generate as generate_command
from memformer.cli.main import main
from memformer.data import load_tokenizer, save_tokenizer
from tests.cli.calls import call, call_json, make_text, refused
from tests.helpers import tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Documents and a config of a tiny run on them; never written to."""
    base = tmp_path_factory.mktemp("cli")
    (base / "texts").mkdir()
    for seed in range(8):
        (base / "texts" / f"{seed}.txt").write_text(make_text(seed))
    (base / "library").mkdir()
    for seed in range(9):
        (base / "library" / f"module_{seed}.py").write_text((make_text(seed) * 9)[: 100 + seed])
    (base / "texts.jsonl").write_text("".join(json.dumps({"body": make_text(seed)}) + "\n" for seed in range(8)))
    config = {
        "folder": str(base / "run"),
        "threads": 1,
        "device": "cpu",
        "model": {
            "d_model": 16,
            "num_heads": 2,
            "d_ff": 32,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "segment_length": 8,
            "num_slots": 3,
        },
        "data": {
            "train": {"kind": "text", "path": str(base / "texts")},
            "validation_fraction": 0.2,
            "cache": str(base / "cache"),
        },
        "training": {
            "num_updates": 4,
            "num_lanes": 4,
            "rollout_length": 2,
            "learning_rate": 0.02,
            "warmup_updates": 0,
            "log_every": 2,
            "evaluate_every": 2,
            "sample_tokens": 8,
            "save_every": 2,
        },
    }
    (base / "config.yaml").write_text(yaml.safe_dump(config))
    return base


@pytest.fixture(scope="module")
def trained(base):
    """Folder and printed result of the run; never written to."""
    result = call_json("train", base / "config.yaml", "--training.learning_rate", "0.03", "--model.num_slots=2")
    return base / "run", result


@pytest.fixture(scope="module")
def run_folder(trained):
    return trained[0]


@pytest.fixture
def copied(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "copied")


@pytest.fixture(scope="module")
def digits(base):
    folder = base / "digits"
    argv = ["train", base / "config.yaml", "--folder", folder, "--training.num_updates", "2"]
    argv += ["--data.train.kind", "digits", "--data.train.path", "null", "--data.train.documents", ":40"]
    return folder, call_json(*argv)


def test_a_run_leaves_all_of_its_folder(run_folder):
    assert sorted(path.name for path in run_folder.iterdir()) == [
        "best",
        "checkpoints",
        "config.yaml",
        "evaluation.json",
        "log.jsonl",
        "samples",
        "summary.html",
        "tensorboard",
        "tokenizer_config.json",
        "versions.json",
    ]
    assert sorted(path.name for path in (run_folder / "best").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    assert sorted(path.name for path in (run_folder / "samples").iterdir()) == [
        "update-000000002.txt",
        "update-000000004.txt",
    ]
    assert "<svg" in (run_folder / "summary.html").read_text()
    assert json.loads((run_folder / "versions.json").read_text())["torch"].startswith(torch.__version__.split("+")[0])


def test_options_change_the_config_of_the_run(base, run_folder):
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert config["training"]["learning_rate"] == 0.03
    assert config["model"]["num_slots"] == 2
    assert config["model"]["d_model"] == 16
    assert Memformer.from_pretrained(run_folder / "best").config.num_slots == 2


def test_the_printed_result_is_the_one_on_disk(trained):
    folder, result = trained
    assert result == {"run": str(folder), **json.loads((folder / "evaluation.json").read_text())}
    assert result["num_bytes"] > 0
    assert result["memory_gain_bits_per_byte"] == pytest.approx(
        result["memory_erased"]["bits_per_byte"] - result["with_memory"]["bits_per_byte"]
    )


def test_without_json_a_table_is_printed(base, tmp_path):
    status, out, err = call("train", base / "config.yaml", "--folder", tmp_path / "r", "--training.num_updates", "1")
    assert status == 0
    assert "bits/byte" in out
    assert "memory erased" in out
    assert f"{tmp_path / 'r' / 'summary.html'}" in out
    assert "parameters; training on" in err


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "jsonl",
            ["--data.train.kind", "jsonl", "--data.train.path", "{base}/texts.jsonl", "--data.train.text_key=body"],
        ),
        (
            "python",
            [
                "--data.train.kind=python",
                "--data.train.path=null",
                "--data.train.documents=1:7",
            ],
        ),
        ("bpe", ["--data.tokenizer.kind", "bpe", "--data.tokenizer.vocab_size", "280"]),
        ("word", ["--data.tokenizer.kind", "word"]),
    ],
)
def test_train_evaluate_and_generate(base, tmp_path, monkeypatch, name, options):
    # The real standard library takes seconds to look through; reading it is tested with the sources.
    monkeypatch.setattr("memformer.data.text.standard_library", lambda: base / "library")
    folder = tmp_path / name
    options = [option.replace("{base}", str(base)) for option in options]
    argv = ["train", base / "config.yaml", "--folder", folder, *options]
    trained = call_json(*argv, "--training.num_updates", "2")
    assert trained["num_tokens"] > 0
    if name == "python":
        # One of documents 1 to 6 is held out; document s has 100 + s bytes.
        assert trained["num_tokens"] in range(101, 107)
    evaluated = call_json("evaluate", folder, "--num_lanes", "3")
    for key in ("num_tokens", "num_bytes"):
        assert evaluated[key] == trained[key]
    # The number of lanes changes the order of float32 sums only.
    assert evaluated["with_memory"] == pytest.approx(trained["with_memory"], rel=1e-5)
    assert (trained["num_tokens"] == trained["num_bytes"]) == (name in {"jsonl", "python"})
    generated = call_json("generate", folder, "--prompt", "the cat sat", "--max_new_tokens", "12", "--seed", "1")
    assert len(generated["token_ids"]) == 12
    assert generated["text"]
    if name == "bpe":
        # The same file and options go on, whatever the tokenizer made of vocab_size.
        assert call_json(*argv, "--training.num_updates", "3", "--resume")["num_tokens"] == trained["num_tokens"]


def test_a_run_on_images(digits, tmp_path):
    folder, result = digits
    assert result["num_tokens"] == 8 * 64
    assert matplotlib.image.imread(folder / "samples" / "update-000000002.png").shape[:2] == (184, 184)
    assert 'src="data:image/png' in (folder / "summary.html").read_text()
    drawn = call_json("generate", folder, "--num_images", "5", "--output", tmp_path / "grid.png", "--seed", "3")
    assert drawn["output"] == str(tmp_path / "grid.png")
    images = torch.tensor(drawn["images"])
    assert images.shape == (5, 8, 8)
    assert 0 <= images.min() <= images.max() <= 16
    grid = matplotlib.image.imread(tmp_path / "grid.png")
    # 2 rows and 3 columns of 8x8 pixels with a border between and around them, each pixel a square of 4.
    assert grid.shape[:2] == (4 * (2 * 9 + 1), 4 * (3 * 9 + 1))
    first_image = torch.from_numpy(grid[4:36:4, 4:36:4, 0])
    assert torch.equal((first_image * 255).round().long(), images[0] * 255 // 16)


def test_evaluate_prints_a_table(run_folder):
    status, out, _ = call("evaluate", run_folder)
    assert status == 0
    assert "bits/byte" in out
    assert str(run_folder / "best") in out


def test_the_last_evaluation_is_on_the_test_documents(base, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(make_text(99) * 3)
    options = ["--data.test.kind", "text", "--data.test.path", other, "--folder", tmp_path / "run"]
    result = call_json("train", base / "config.yaml", *options)
    assert result["num_tokens"] == other.stat().st_size
    assert call_json("evaluate", tmp_path / "run")["with_memory"] == result["with_memory"]
    given = call_json("evaluate", tmp_path / "run", "--data.kind", "text", "--data.path", other)
    assert given["with_memory"] == result["with_memory"]
    options = ["--data.recall.task", "fact", "--data.test.kind", "text", "--data.test.path", other]
    assert "data.recall and data.test are both given" in refused("train", base / "config.yaml", *options)


def test_best_and_last_weights(copied):
    folder = copied
    best = call_json("evaluate", folder)
    # Break the best weights only, in a way that is seen.
    weights = folder / "best"
    model = Memformer.from_pretrained(weights)
    with torch.no_grad():
        model.embedding.weight.mul_(3)
    model.save_pretrained(weights)
    last = call_json("evaluate", folder, "--checkpoint", "last")
    assert last["weights"] == str(folder / "checkpoints" / "update-000000004")
    assert best["weights"] == str(weights)
    assert call_json("evaluate", folder)["with_memory"] != best["with_memory"]
    assert last["with_memory"]["bits_per_byte"] == pytest.approx(best["with_memory"]["bits_per_byte"], abs=0.5)


def test_a_damaged_last_checkpoint_is_skipped_with_a_warning(copied):
    (copied / "checkpoints" / "update-000000004" / "manifest.json").write_text("{}")
    status, out, err = call("evaluate", copied, "--checkpoint", "last")
    assert status == 0
    assert "update-000000002" in out
    assert "memformer: warning: skipped a damaged checkpoint: " in err


def test_evaluate_on_other_data_and_on_a_saved_model(run_folder, tmp_path, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text(make_text(99) * 3)
    options = ["--data.kind", "text", "--data.path", other]
    of_run = call_json("evaluate", run_folder, *options)
    assert of_run["num_tokens"] == other.stat().st_size
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "saved"
    Memformer.from_pretrained(run_folder / "best").save_pretrained(folder)
    save_tokenizer(load_tokenizer(run_folder), folder)
    of_saved = call_json("evaluate", folder, *options)
    assert of_saved["with_memory"] == of_run["with_memory"]
    assert of_saved["weights"] == str(folder)
    assert "has no held-out documents of its own; give --data.kind and --data.path" in refused("evaluate", folder)


def test_the_best_weights_alone_are_a_model_to_use(run_folder, tmp_path):
    options = ["--prompt", "the cat", "--seed", "5", "--max_new_tokens", "12"]
    expected = call_json("generate", run_folder, *options)["token_ids"]
    assert call_json("generate", run_folder / "best", *options)["token_ids"] == expected
    Memformer.from_pretrained(run_folder / "best").save_pretrained(tmp_path / "bare")
    status, out, err = call("generate", tmp_path / "bare", *options, "--json")
    assert status == 0
    assert json.loads(out)["token_ids"] == expected
    assert f"memformer: warning: {tmp_path / 'bare'} has no tokenizer: its 256 token ids are taken for bytes" in err
    tiny_model().save_pretrained(tmp_path / "other")
    message = refused("generate", tmp_path / "other")
    assert "has no tokenizer for its vocabulary of 11 tokens; memformer.data.save_tokenizer writes one" in message


def generate(run_folder, *options, num=12):
    return call_json("generate", run_folder, "--max_new_tokens", num, *options)


def test_generated_text_goes_to_stdout_and_nothing_else(run_folder):
    options = ["--prompt", "the cat", "--seed", "5"]
    expected = generate(run_folder, *options)
    status, out, err = call("generate", run_folder, "--max_new_tokens", "12", *options)
    assert (status, out, err) == (0, expected["text"] + "\n", "")
    assert expected["prompt_tokens"] == 7
    assert generate(run_folder, *options) == expected
    assert generate(run_folder, "--prompt", "the cat", "--seed", "6")["token_ids"] != expected["token_ids"]


def test_a_prompt_is_the_same_from_everywhere(run_folder, tmp_path, monkeypatch):
    prompt = "the cat sat on a mat; é\n"
    (tmp_path / "prompt.txt").write_text(prompt, encoding="utf-8")
    expected = generate(run_folder, "--prompt", prompt, "--temperature", "0")
    assert expected["prompt_tokens"] == 25
    assert generate(run_folder, "--prompt_file", tmp_path / "prompt.txt", "--temperature", "0") == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    assert generate(run_folder, "--prompt_file", "-", "--temperature", "0") == expected
    assert generate(run_folder, "--temperature", "0")["prompt_tokens"] == 0


@pytest.mark.parametrize(
    ("prompt", "num_tokens"),
    [("null", 4), ("123", 3), ("[1, 2", 5), ("'a'", 3), ("{b: 1}", 6), (" a ", 3), ("\udcff", 1)],
)
def test_a_prompt_is_text_whatever_it_looks_like(run_folder, prompt, num_tokens):
    assert generate(run_folder, "--prompt", prompt, num=0)["prompt_tokens"] == num_tokens


def test_a_session_goes_on_as_one_longer_stream(run_folder, tmp_path):
    greedy = ["--temperature", "0"]
    whole = generate(run_folder, "--prompt", "the cat sat on", *greedy, num=22)
    first = generate(run_folder, "--prompt", "the cat", "--save_session", tmp_path / "a", num=0)
    assert first["token_ids"] == []
    middle = ["--load_session", tmp_path / "a", "--prompt", " sat on", "--save_session", tmp_path / "b"]
    second = generate(run_folder, *middle, *greedy, num=13)
    third = generate(run_folder, "--load_session", tmp_path / "b", *greedy, num=9)
    assert second["token_ids"] + third["token_ids"] == whole["token_ids"]
    assert first["state_bytes"] == third["state_bytes"] == whole["state_bytes"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_reading_saves_its_session(run_folder, tmp_path, monkeypatch, number):
    prompt, state = "the cat sat on a mat", tmp_path / "state"
    whole = generate(run_folder, "--prompt", prompt, "--temperature", "0")["token_ids"]
    feed = Session.feed

    def feed_and_signal(session, part):
        feed(session, part)
        if session.num_tokens == [8]:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(generate_command, "_PIECE_TOKENS", 4)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "feed", feed_and_signal)
        status, out, err = call("generate", run_folder, "--prompt", prompt, "--save_session", state, "--json")
    assert (status, out) == (128 + number, "")
    assert f"stopped by {number.name}; 8 tokens read and 0 generated; their session is {state}" in err
    rest = ["--load_session", state, "--prompt", prompt[8:], "--temperature", "0"]
    assert generate(run_folder, *rest)["token_ids"] == whole


def test_a_signal_while_waiting_for_input_or_generating_saves_the_session(run_folder, tmp_path, monkeypatch):
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as waiting:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(waiting))
        os.write(writer, b"the cat")
        timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        status, _, err = call("generate", run_folder, "--prompt_file", "-", "--save_session", tmp_path / "a")
        timer.join()
        os.close(writer)
    assert status == 130
    assert "7 tokens read and 0 generated" in err
    next_token_logits = Session.next_token_logits

    def ask_and_signal(session):
        if session.num_tokens == [10]:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_token_logits(session)

    monkeypatch.setattr(Session, "next_token_logits", ask_and_signal)
    options = ["--load_session", tmp_path / "a", "--save_session", tmp_path / "b", "--max_new_tokens", "50"]
    status, _out, err = call("generate", run_folder, *options)
    assert status == 143
    assert "0 tokens read and 4 generated" in err
    assert Session.load(tmp_path / "b", model=Memformer.from_pretrained(run_folder / "best")).num_tokens == [11]


def test_a_run_goes_on_where_it_is_whatever_its_config_calls_it(copied, run_folder, tmp_path, monkeypatch):
    before = {file.name for file in (run_folder / "checkpoints").iterdir()}
    moved = copied.rename(tmp_path / "moved")
    result = call_json("train", moved, "--resume", "--training.num_updates", "6")
    assert result["run"] == str(moved)
    assert (moved / "checkpoints" / "update-000000006").is_dir()
    assert {file.name for file in (run_folder / "checkpoints").iterdir()} == before
    monkeypatch.chdir(tmp_path)
    assert call_json("train", "moved", "--resume", "--training.num_updates", "8")["run"] == "moved"
    status, _, err = call("train", moved, "--resume", "--training.num_updates", "3", "--training.warmup_updates", "3")
    assert status == 0
    assert "training.num_updates (3) is reached: nothing is left to train" in err
    assert "training.warmup_updates (3) is not below training.num_updates (3)" in err


def test_a_folder_of_something_else_is_not_filled_with_a_run(base, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / ".hidden").write_text("")
    (tmp_path / "letters" / "dear.txt").write_text("Dear")
    message = refused("train", base / "config.yaml", "--folder", tmp_path / "letters")
    assert message.endswith("letters holds 'dear.txt' and no run; choose an empty folder or a new name for the run")
    message = refused("train", base / "config.yaml", "--folder", tmp_path / "letters" / "dear.txt")
    assert message.endswith("dear.txt is a file; a run needs a folder")
    assert sorted(file.name for file in (tmp_path / "letters").iterdir()) == [".hidden", "dear.txt"]


def test_report_is_written_again(copied):
    (copied / "summary.html").unlink()
    assert call_json("report", copied) == {"summary": str(copied / "summary.html")}
    assert "<svg" in (copied / "summary.html").read_text()


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--help"], "memformer train CONFIG.yaml"),
        (["train", "--help"], "memformer train experiments/text.yaml --data.train.path my_book.txt"),
        (["evaluate", "--help"], "memformer evaluate runs/demo --data.kind text --data.path my_notes.txt --json"),
        (["generate", "--help"], "cat chapters/*.txt | memformer generate runs/demo --prompt_file -"),
        (["report", "--help"], "memformer report runs/demo"),
        (["--version"], "memformer 0."),
    ],
)
def test_help(argv, shown):
    status, out, err = call(*argv)
    assert (status, err) == (0, "")
    assert shown in out


def test_help_of_train_has_every_option_with_its_documentation():
    out = " ".join(call("train", "--help")[1].split())
    assert "--model.num_slots" in out
    assert "Memory slots K (paper: k)." in out
    assert "--data.train.documents" in out
    assert "--training.rollouts_per_update" in out


def test_no_command_at_all():
    status, out, err = call()
    assert (status, out) == (2, "")
    assert err.startswith("usage: memformer COMMAND")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config .*bad\.yaml cannot be read: No such file"),
        (b"a: [1", r"config .*bad\.yaml is not YAML: "),
        (b"\xff\xfe", r"config .*bad\.yaml is not YAML: "),
        (b"!!python/object:os.system {}", r"config .*bad\.yaml is not YAML: "),
        (b"- 1\n- 2\n", r"config .*bad\.yaml holds a list; it must be a mapping"),
        (b"", r"config .*bad\.yaml holds a NoneType; it must be a mapping"),
        (b"modle: {}\n", r"unknown key 'modle' in .*bad\.yaml; did you mean 'model'\?"),
        (b"model: {num_slotz: 3}\n", r"unknown key 'num_slotz' in .*bad\.yaml, model; did you mean 'num_slots'\?"),
        (b"data: {train: {knd: text}}\n", r"unknown key 'knd' in .*, data, train; did you mean 'kind'\?"),
        (b"data: {validation: {pth: x}}\n", r"unknown key 'pth' in .*, data, validation; did you mean 'path'\?"),
        (b"model: {num_slots: many}\n", r"model\.num_slots.*many"),
        (b"model: 7\n", r"model \(7\) in .*bad\.yaml must be a mapping"),
        (b"training:\n", r"training \(None\) in .*bad\.yaml must be a mapping"),
        (b"training: {num_lanes: }\n", r"^num_lanes \(null\) in .*bad\.yaml, training must have a value; leave it out"),
        (b"folder:\n", r"^folder \(null\) in .*bad\.yaml must have a value"),
        (b"seed: 0x_\n", r"config .*bad\.yaml is not YAML: a value in it is malformed: invalid literal"),
        (b"seed: " + b"7" * 5000, r"config .*bad\.yaml is not YAML: a value in it is malformed: Exceeds the limit"),
        (b"seed: !!bool x\n", r"config .*bad\.yaml is not YAML: a value in it is malformed: 'x'"),
        (b"seed: !!timestamp x\n", r"config .*bad\.yaml is not YAML: a value in it is malformed"),
        (b"seed: 2020-99-99\n", r"config .*bad\.yaml is not YAML: a value in it is malformed: month must be"),
        (b"[" * 5000, r"config .*bad\.yaml is not YAML: a value in it is malformed: maximum recursion depth"),
        (b"data: {validation: {kind: text}}\n", r"^path \(None\) must be given for kind 'text'$"),
    ],
)
def test_refused_configs(tmp_path, content, message):
    file = tmp_path / "bad.yaml"
    if content is not None:
        file.write_bytes(content)
    error = refused("train", file)
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--resumee"], ["unknown option --resumee; did you mean --resume?"]),
        (["--model.num_slotz", "3"], ["unknown option --model.num_slotz; did you mean --model.num_slots?"]),
        (["--training.num_updats=3"], ["unknown option --training.num_updats; did you mean --training.num_updates?"]),
        (
            ["--data.validation.knd=text"],
            ["unknown option --data.validation.knd; did you mean --data.validation.kind?"],
        ),
        (["--model.num_slots", "many"], ["model.num_slots", "many"]),
        (["--model.num_slots", "-1"], ["num_slots (-1) must be at least 0"]),
        (["--training.learning_rate", "-1"], ["training.learning_rate (-1.0) must be at least 0 and finite"]),
        (["--training.method", "magic"], ["training.method", "magic"]),
        (["--model.num_slots"], ["model.num_slots", "expected one argument"]),
        (["--data.tokenizer.kind", "bpe"], ["vocab_size (None) must be given and at least 257 for kind 'bpe'"]),
        (["--seed", "99999999999999999999"], ["seed (99999999999999999999) must be from 0"]),
        (["--threads", "0"], ["threads (0) must be from 1 to 65536"]),
        (["--threads", "9999999999"], ["threads (9999999999) must be from 1 to 65536"]),
        (["--device", "gpu"], ["device ('gpu') must be auto, cpu, cuda"]),
        (["--device", "mps"], ["device ('mps') must be auto, cpu, cuda"]),
        (["--device", "meta"], ["device ('meta') must be auto, cpu, cuda"]),
        (["surplus"], ["surplus"]),
        (["--resume"], ["{new}/config.yaml cannot be read"]),
        (["--model.vocab_size", "300"], ["model.vocab_size (300) contradicts the data's tokenizer of 256 tokens"]),
        (["--data.train.path", "/no/such/file"], ["path (/no/such/file) does not exist"]),
        (["--data.train.path", "{bad}/empty.txt"], ["{bad}/empty.txt is empty"]),
        (
            ["--data.train.path", "{bad}/short", "--training.num_lanes", "1"],
            ["holds 4 tokens; at least one segment of 8"],
        ),
        (["--data.train.path", "{bad}/short/a"], ["has 1 document; holding some out needs at least 2"]),
        (["--training.num_lanes", "30"], ["has 6 documents for 30 lanes", "data.max_document_tokens"]),
        (
            ["--data.train.path", "{bad}/latin", "--data.tokenizer.kind=bpe", "--data.tokenizer.vocab_size=300"],
            ["{bad}/latin/a.txt", "UTF-8"],
        ),
        (["--data.cache", "{bad}/empty.txt/cache"], ["{bad}/empty.txt/cache could not be written"]),
        (["--folder", "{bad}/empty.txt"], ["{bad}/empty.txt is a file; a run needs a folder"]),
    ],
    ids=lambda value: " ".join(value[:2]) if value and value[0].startswith("--") else "",
)
def test_refused_training(base, tmp_path, options, parts):
    bad, new = tmp_path / "bad", tmp_path / "new"
    (bad / "short").mkdir(parents=True)
    (bad / "latin").mkdir()
    (bad / "empty.txt").write_bytes(b"")
    (bad / "short" / "a").write_bytes(b"abcd")
    (bad / "short" / "b").write_bytes(b"abcd")
    for name in "ab":
        (bad / "latin" / f"{name}.txt").write_bytes("né pas".encode("latin-1") * 10)
    fill = {"{bad}": str(bad), "{new}": str(new)}
    options, parts = ([_filled(text, fill) for text in texts] for texts in (options, parts))
    error = refused("train", base / "config.yaml", "--folder", new, *options)
    for part in parts:
        assert part in error
    assert not (new / "checkpoints").exists()


def _filled(text, values):
    for name, value in values.items():
        text = text.replace(name, value)
    return text


@pytest.mark.parametrize("argv", [["train"], ["train", "--resume"], ["train", "--model.num_slots", "3"]])
def test_train_without_a_config(argv):
    assert "needs a config first" in refused(*argv)


@pytest.mark.parametrize("command", ["evaluate", "generate", "report"])
def test_commands_without_a_run(command, tmp_path):
    assert "required: run" in refused(command)
    assert str(tmp_path / "none") in refused(command, tmp_path / "none")
    assert str(tmp_path) in refused(command, tmp_path)


def test_an_unknown_command():
    known = "train, evaluate, retention, generate, report, reproduce"
    assert refused("trian") == f"unknown command 'trian'; the commands are {known}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_lanes", "0"], "num_lanes (0) must be at least 1"),
        (["--nmu_lanes", "1"], "unknown option --nmu_lanes; did you mean --num_lanes?"),
        (["--data.knd", "text"], "unknown option --data.knd; did you mean --data.kind?"),
        (["--data.kind", "text"], "path (None) must be given for kind 'text'"),
        (["--data.kind", "digits"], "data of kind 'digits' does not fit the run's tokenizer of kind 'bytes'"),
        (["--data.kind", "text", "--data.path", "/no/such"], "path (/no/such) does not exist"),
        (["--checkpoint", "worst"], "worst"),
        (["--threads", "0"], "threads (0) must be from 1 to 65536"),
    ],
)
def test_refused_evaluation(run_folder, options, message):
    assert message in refused("evaluate", run_folder, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature (-1.0) must be at least 0"),
        (["--temperature", "hot"], "temperature"),
        (["--top_p", "2"], "top_p (2.0) must be above 0 and at most 1"),
        (["--top_k", "0"], "top_k (0) must be at least 1"),
        (["--max_new_tokens", "-1"], "max_new_tokens (-1) must be at least 0"),
        (["--seed", "-1"], "seed (-1) must be from 0"),
        (["--seed", "99999999999999999999"], "seed (99999999999999999999) must be from 0"),
        (["--prompt_file", "/no/such"], "prompt file /no/such cannot be read: No such file"),
        (["--prompt", "a", "--prompt_file", "b"], "--prompt and --prompt_file are both given"),
        (["--load_session", "/no/such"], "/no/such does not exist"),
        (["--output", "x.png"], "--output has no meaning for a run on text"),
        (["--num_images", "2"], "--num_images has no meaning for a run on text"),
        (["--save_session", "/proc/none/s", "--max_new_tokens", "0"], "/proc/none/s could not be written"),
        # Before the prompt is read, which may take hours.
        (["--save_session", "/", "--prompt_file", "/no/such"], "/ could not be written: Is a directory"),
        (["--save_session", "/dev/null/s"], "/dev/null/s could not be written: Not a directory"),
        (["--promt", "a"], "unknown option --promt; did you mean --prompt?"),
    ],
)
def test_refused_generation(run_folder, options, message):
    assert message in refused("generate", run_folder, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a"], "--prompt has no meaning for a run on images"),
        (["--load_session", "s"], "--load_session has no meaning for a run on images"),
        (["--max_new_tokens", "9"], "--max_new_tokens has no meaning for a run on images"),
        (["--num_images", "0"], "num_images (0) must be at least 1"),
        (["--num_images", "1", "--output", "/proc/none/x.png"], "/proc/none/x.png could not be written"),
    ],
)
def test_refused_drawing(digits, options, message):
    assert message in refused("generate", digits[0], *options)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("best/model.safetensors", b"damaged", ["best/model.safetensors is damaged"]),
        ("best/model.safetensors", None, ["best/model.safetensors does not exist"]),
        ("best/config.json", b"{", ["best/config.json is not readable JSON"]),
        (
            "best/config.json",
            b'{"model_type": "bert"}',
            ["best/config.json: model_type ('bert') must be one of memformer, lstm"],
        ),
        ("best/config.json", b'{"model_type": "memformer", "num_slotz": 3}', ["'num_slotz'", "mean 'num_slots'?"]),
        ("best/config.json", b'{"model_type": "memformer", "num_slots": -3}', ["num_slots (-3) must be at least 0"]),
        ("best/config.json", b'{"model_type": "memformer"}', ["best/model.safetensors"]),
        ("tokenizer_config.json", b"{", ["tokenizer_config.json cannot be read"]),
        ("tokenizer_config.json", None, ["tokenizer_config.json cannot be read"]),
        ("config.yaml", b"a: [1\n", ["config.yaml is not YAML"]),
        ("config.yaml", b"[]", ["config.yaml does not hold a config"]),
        ("config.yaml", b"modle: {}\n", ["unknown key 'modle'"]),
    ],
)
def test_damaged_runs(copied, name, content, parts):
    if content is None:
        (copied / name).unlink()
    else:
        (copied / name).write_bytes(content)
    error = refused("evaluate", copied)
    for part in parts:
        assert part in error


def test_the_config_of_a_run_is_what_was_written_or_said_to_be_changed(copied):
    file = copied / "config.yaml"
    first, *lines = file.read_text().splitlines(keepends=True)
    assert first.startswith("# sha256 of the lines below; to change them by hand, delete this line: ")
    changed = "".join(lines).replace("warmup_updates: ", "warmup_updates: 1")
    for content in (first + changed, first + "".join(lines[:-3])):
        file.write_text(content)
        for argv in (("evaluate", copied), ("generate", copied), ("report", copied), ("train", copied, "--resume")):
            error = refused(*argv)
            assert "config.yaml is damaged or was changed" in error
            assert "if they were changed by hand, delete the first line" in error
    file.write_text(changed)
    assert call("evaluate", copied)[0] == 0


def test_a_run_without_its_best_weights(copied):
    shutil.rmtree(copied / "best")
    assert "holds no evaluated model yet; try the last checkpoint" in refused("evaluate", copied)
    assert call("evaluate", copied, "--checkpoint", "last")[0] == 0


def test_a_tokenizer_of_another_run(copied, digits):
    shutil.copy(digits[0] / "tokenizer_config.json", copied)
    assert "has a tokenizer of 17 tokens, its model a vocabulary of 256" in refused("generate", copied)


def test_sessions_of_another_model_and_damaged_ones(run_folder, tmp_path):
    config = Memformer.from_pretrained(run_folder / "best").config
    other = Memformer(type(config)(**{**vars(config), "num_slots": 5}))
    Session(other).save(tmp_path / "other")
    assert "belongs to another model" in refused("generate", run_folder, "--load_session", tmp_path / "other")
    (tmp_path / "damaged").write_bytes((tmp_path / "other").read_bytes()[:-20])
    assert "damaged is damaged" in refused("generate", run_folder, "--load_session", tmp_path / "damaged")


def test_output_that_nobody_reads_any_more_is_no_traceback(run_folder, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    errors = (tmp_path / "errors").open("w")
    # Closing a pipe that nobody reads fails as well; what is left in its buffer is lost, as it should be.
    out = os.fdopen(writer, "w")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        assert main(["generate", str(run_folder), "--max_new_tokens", "3"]) == 141
    with contextlib.suppress(BrokenPipeError):
        out.close()
    assert (tmp_path / "errors").read_text() == ""
    assert errors.closed  # so that the interpreter's own complaint at its exit is not seen either
