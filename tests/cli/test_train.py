"""`memformer train`: output, run folder, resuming, and error messages."""

import json
import re
import shutil

import matplotlib.image
import pytest
import torch
import yaml

from memformer import Memformer
from tests.cli.calls import call, call_json, make_text, refused


def test_a_run_writes_all_files_of_its_folder(run_folder):
    assert sorted(path.name for path in run_folder.iterdir()) == [
        "best",
        "checkpoints",
        "config.yaml",
        "data.json",
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
        "update.json",
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
    # Reading the real standard library takes seconds; it is tested with the sources.
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
        # The same file and options resume, even if the tokenizer has fewer tokens than vocab_size.
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
    # 2 rows and 3 columns of 8x8 pixels, with borders between and around them; each pixel is enlarged to 4x4.
    assert grid.shape[:2] == (4 * (2 * 9 + 1), 4 * (3 * 9 + 1))
    first_image = torch.from_numpy(grid[4:36:4, 4:36:4, 0])
    assert torch.equal((first_image * 255).round().long(), images[0] * 255 // 16)


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


def test_a_file_that_is_both_trained_on_and_held_out_is_warned_of(base, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("train.txt", "valid.txt", "test.txt"):
        (tmp_path / "texts" / name).write_text(make_text(len(name)) * 3)
    shutil.copy(tmp_path / "texts" / "test.txt", tmp_path / "copy.txt")
    options = ["--data.train.path", tmp_path / "texts", "--training.num_updates", "1", "--folder", tmp_path / "run"]
    options += ["--training.num_lanes", "1", "--data.validation.path"]
    errors = call("train", base / "config.yaml", *options, tmp_path / "texts" / "valid.txt")[2]
    shared = (
        f"data.validation: {tmp_path}/texts/valid.txt has the same content as {tmp_path}/texts/valid.txt in data.tr"
    )
    assert errors.count("has the same content as") == errors.count(shared) == 1
    options[5] = tmp_path / "second"
    errors = call("train", base / "config.yaml", *options, tmp_path / "copy.txt")[2]
    assert f"data.validation: {tmp_path}/copy.txt has the same content as {tmp_path}/texts/test.txt in data.t" in errors
    options[5] = tmp_path / "third"
    slices = ["--data.train.documents", ":2", "--data.validation.documents", "2:"]
    errors = call("train", base / "config.yaml", *options, tmp_path / "texts", *slices)[2]
    assert "has the same content as" not in errors


def test_a_moved_run_resumes_in_its_new_folder(copied, run_folder, tmp_path, monkeypatch):
    before = {file.name for file in (run_folder / "checkpoints").iterdir()}
    moved = copied.rename(tmp_path / "moved")
    result = call_json("train", moved, "--resume", "--training.num_updates", "6")
    assert result["run"] == str(moved)
    assert (moved / "checkpoints" / "update-000000006").is_dir()
    assert {file.name for file in (run_folder / "checkpoints").iterdir()} == before
    monkeypatch.chdir(tmp_path)
    assert call_json("train", "moved", "--resume", "--training.num_updates", "8")["run"] == "moved"
    status, _, err = call("train", moved, "--resume", "--training.num_updates", "8", "--training.warmup_updates", "9")
    assert status == 0
    assert "training.num_updates (8) is reached: nothing is left to train" in err
    assert "training.warmup_updates (9) is above training.num_updates (8)" in err


def test_a_refused_resume_leaves_the_run_as_it_was(copied):
    before = (copied / "config.yaml").read_bytes()
    message = refused("train", copied, "--resume", "--training.engine", "graphs", "--training.num_updates", "16")
    assert "training.engine ('graphs') needs a CUDA device" in message
    assert (copied / "config.yaml").read_bytes() == before


def test_a_run_without_its_best_weights_chooses_them_again(copied):
    """Before the training, not after it: no later score may be as good as the one whose weights are gone."""
    updates = yaml.safe_load((copied / "config.yaml").read_text())["training"]["num_updates"]
    shutil.rmtree(copied / "best")
    further = ("--training.num_updates", str(2 * updates), "--training.learning_rate", "1")
    status, _, err = call("train", copied, "--resume", *further, "--training.final_learning_rate", "1")
    assert status == 0
    assert f"{copied / 'best'} is missing; the best weights are chosen from here on" in err
    assert (copied / "best" / "model.safetensors").is_file()


def test_a_run_is_not_resumed_to_an_earlier_end(copied):
    """Its config would name fewer updates than its best weights have."""
    config = (copied / "config.yaml").read_bytes()
    error = refused("train", copied, "--resume", "--training.num_updates", "3")
    assert f"training.num_updates (3) is below the 4 updates that {copied} has made; a run ends at 4 or later" in error
    assert (copied / "config.yaml").read_bytes() == config
    assert (copied / "evaluation.json").exists()


def test_a_folder_with_other_files_is_refused(base, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / ".hidden").write_text("")
    (tmp_path / "letters" / "dear.txt").write_text("Dear")
    message = refused("train", base / "config.yaml", "--folder", tmp_path / "letters")
    assert message.endswith("letters) contains 'dear.txt' but no run; choose an empty or a new folder for the run")
    message = refused("train", base / "config.yaml", "--folder", tmp_path / "letters" / "dear.txt")
    assert message.endswith("dear.txt) is a file; a run needs a folder")
    assert sorted(file.name for file in (tmp_path / "letters").iterdir()) == [".hidden", "dear.txt"]


def test_help_of_train_has_every_option_with_its_documentation():
    out = " ".join(call("train", "--help")[1].split())
    assert "--model.num_slots" in out
    assert "Number of memory slots K (k in the paper)." in out
    assert "--data.train.documents" in out
    assert "--training.rollouts_per_update" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config .*bad\.yaml cannot be read: No such file"),
        (b"a: [1", r"config .*bad\.yaml is not YAML: "),
        (b"\xff\xfe", r"config .*bad\.yaml is not YAML: "),
        (b"!!python/object:os.system {}", r"config .*bad\.yaml is not YAML: "),
        (b"- 1\n- 2\n", r"config .*bad\.yaml holds a list; it must be a mapping"),
        (b"", r"config .*bad\.yaml holds nothing; it must be a mapping"),
        (b"modle: {}\n", r"unknown key 'modle' in .*bad\.yaml; did you mean 'model'\?"),
        (b"model: {num_slotz: 3}\n", r"unknown key 'num_slotz' in .*bad\.yaml, model; did you mean 'num_slots'\?"),
        (b"data: {train: {knd: text}}\n", r"unknown key 'knd' in .*, data, train; did you mean 'kind'\?"),
        (b"data: {validation: {pth: x}}\n", r"unknown key 'pth' in .*, data, validation; did you mean 'path'\?"),
        (b"model: {num_slots: many}\n", r"model\.num_slots.*many"),
        (b"model: 7\n", r"model \(7\) in .*bad\.yaml must be a mapping"),
        (b"training:\n", r"training \(None\) in .*bad\.yaml must be a mapping"),
        (b"training: {num_lanes: }\n", r"^num_lanes \(null\) in .*bad\.yaml, training must have a value; leave it out"),
        (b"folder:\n", r"^folder \(null\) in .*bad\.yaml must have a value"),
        (b"seed: 2020-13-45\n", r"config .*bad\.yaml is not YAML: a value in it is malformed: month must be"),
        (b"seed: " + b"7" * 5000, r"config .*bad\.yaml is not YAML: a value in it is malformed: Exceeds the limit"),
        (b"seed: !!bool x\n", r"config .*bad\.yaml is not YAML: a value in it is malformed: 'x'"),
        (b"seed: !!timestamp x\n", r"config .*bad\.yaml is not YAML: a value in it is malformed"),
        (b"seed: 2020-99-99\n", r"config .*bad\.yaml is not YAML: a value in it is malformed: month must be"),
        (b"[" * 5000, r"config .*bad\.yaml is not YAML: a value in it is malformed: maximum recursion depth"),
        (b"data: {validation: {kind: text}}\n", r"^data\.validation\.path \(None\) must be given for kind 'text'$"),
        (
            b"data: {train: {kind: digits}, tokenizer: {kind: word}}\ntraining: {num_updates: 1}\n",
            r"data\.tokenizer is not read by data\.train\.kind \('digits'\), whose pixels are the tokens; leave it out",
        ),
        (
            b"data: {recall: {task: fact}, tokenizer: {kind: word}}\ntraining: {num_updates: 1}\n",
            r"data\.tokenizer is not read by data\.recall\.task \('fact'\), which generates its own text; leave it out",
        ),
        (
            b"data: {recall: {task: copy}, max_document_tokens: 8}\ntraining: {num_updates: 1}\n",
            r"data\.max_document_tokens is not read by data\.recall\.task \('copy'\)",
        ),
        (
            b"data: {recall: {task: copy}, train: {kind: text, path: x}}\ntraining: {num_updates: 1}\n",
            r"data\.train is not read by data\.recall\.task \('copy'\)",
        ),
        (
            b"data: {train: {kind: digits}, max_document_tokens: 10}\ntraining: {num_updates: 1}\n",
            r"data\.max_document_tokens \(10\) must be a multiple of the 64 pixels of an image",
        ),
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
        (
            ["--model.vocab_size", "300"],
            ["--model.vocab_size cannot be set: it is derived from the tokenizer and the tasks of the data"],
        ),
        (
            ["--data.multitask.recall", "0.1", "--model.adaptive_cutoffs", "[100]"],
            ["data.multitask does not fit model.adaptive_cutoffs ([100]): its tasks add token ids"],
        ),
        (["--data.train.path", "/no/such/file"], ["data.train.path (/no/such/file) does not exist"]),
        (["--data.validation.path", "/no/such/file"], ["data.validation.path (/no/such/file) does not exist"]),
        (["--data.test.path", "{bad}/*.png"], ["data.test.path ({bad}/*.png) matches no file to read"]),
        (["--data.train.path", "{bad}/empty.txt"], ["{bad}/empty.txt is empty"]),
        (
            ["--data.train.path", "{bad}/short", "--training.num_lanes", "1"],
            ["holds 4 tokens; at least one segment of 8"],
        ),
        (["--data.train.path", "{bad}/short/a"], ["has 1 document of 4 tokens; holding some out needs at least 2"]),
        (["--training.num_lanes", "30"], ["has 6 documents for 30 lanes", "data.max_document_tokens"]),
        (
            ["--data.train.path", "{bad}/latin", "--data.tokenizer.kind=bpe", "--data.tokenizer.vocab_size=300"],
            ["{bad}/latin/a.txt", "UTF-8"],
        ),
        (["--data.cache", "{bad}/empty.txt/cache"], ["data.cache ({bad}/empty.txt/cache) could not be written"]),
        (["--folder", "{bad}/empty.txt"], ["folder ({bad}/empty.txt) is a file; a run needs a folder"]),
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


def test_a_vocabulary_in_the_file_that_is_not_the_tokenizers_is_refused(base, tmp_path):
    config = yaml.safe_load((base / "config.yaml").read_text())
    config["model"]["vocab_size"] = 300
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    message = refused("train", tmp_path / "config.yaml", "--folder", tmp_path / "run")
    assert "model.vocab_size (300) contradicts the data's tokenizer of 256 tokens" in message
    assert not (tmp_path / "run" / "checkpoints").exists()
