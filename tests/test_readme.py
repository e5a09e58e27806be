"""The README: its Python runs as it stands, its commands run on a small text, and it names only what exists."""

import math
import re
import shlex
from pathlib import Path

import pytest

from memformer import Session
from memformer.cli.run_config import parse_run_config
from tests.cli.calls import call, make_text

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# The first command would train for an hour; the sizes are no part of what it shows.
SMALL = """--threads 1 --data.cache cache --data.max_document_tokens 100 --training.num_updates 2 --training.num_lanes 2
--training.rollout_length 2 --training.sample_tokens 5 --model.d_model 16 --model.num_heads 2 --model.d_ff 16
--model.num_encoder_layers 1 --model.num_decoder_layers 1 --model.segment_length 8 --training.warmup_updates 0"""


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 120
    in_code = False
    for line in lines:
        in_code ^= line.startswith("```")
        assert in_code or line.startswith(("    ", "|", "```")) or len(line) <= 100, line


def test_the_python_example_trains_what_a_session_is_asked_for(tmp_path, monkeypatch, capsys):
    """The example trains the first token of a document too, which a new session predicts from [BOS]."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(README)
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    log_probabilities = Session(names["model"]).next_token_logits().log_softmax(dim=-1)[0]
    first = [-float(log_probabilities[document[0]]) for document in names["documents"]]
    assert sum(first) / len(first) < math.log(256) - 1
    assert (tmp_path / "my-model" / "config.json").is_file()
    assert (tmp_path / "stream.safetensors").is_file()
    assert len(capsys.readouterr().out.splitlines()) == 2


def commands(text):
    """The command lines of the indented blocks, without their comments."""
    lines = re.findall(r"^ {4}((?:memformer|cat|make|pip|uv) .*)$", text, flags=re.MULTILINE)
    return [line.partition("#")[0].strip() for line in lines]


def test_every_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "my_book.txt").write_text("".join(make_text(seed) for seed in range(20)))
    for name in ("old.log", "new.log"):
        (tmp_path / name).write_text(make_text(21) * 25)
    run = 0
    for line in commands(README):
        if line.startswith("make "):
            assert f"\n{line.split()[1]}:" in MAKEFILE, line
            continue
        if line.startswith(("pip ", "uv ")):
            assert line == "pip install -c constraints.txt ."  # what `make setup` does, with the development tools
            continue
        if line.startswith("cat "):
            piped, line = line.removeprefix("cat ").split(" | ")
            line = line.replace("--prompt_file -", f"--prompt_file {piped}")
        argv = shlex.split(line)[1:]
        if argv[0] == "train" and "--help" not in argv:
            small = SMALL if "--model_type" not in argv else re.sub(r"--model.num_(en|de)coder_layers 1", "", SMALL)
            argv += shlex.split(small) if "--resume" not in argv else ["--training.num_updates", "3"]
        if argv[0] == "retention":
            argv += ["--delays", "1"]
        if argv[0] == "reproduce":
            argv += ["--help"]
        if argv[0] == "generate" and "--max_new_tokens" not in argv:
            argv += ["--max_new_tokens", "3"]
        status, out, error = call(*argv)
        assert status == 0, f"{line}: {error}"
        assert out
        run += 1
    assert run >= 8


@pytest.mark.parametrize("target", ["demo", "demo-text"])
def test_the_demonstrations_are_valid_commands(target):
    (recipe,) = re.findall(rf"^{target}: setup\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    lines = [line.strip() for line in recipe.splitlines() if line.strip().startswith("$(BIN)/memformer")]
    assert len(lines) == 2
    config = re.match(r"\$\(BIN\)/memformer train (\S+) ", lines[0])[1]
    parse_run_config([str(ROOT / config)])


def test_every_experiment_is_a_valid_config():
    configs = sorted((ROOT / "experiments").rglob("*.yaml"))
    assert configs
    for file in configs:
        config, _ = parse_run_config([str(file)])
        assert Path(config.folder) == Path("runs") / file.relative_to(ROOT / "experiments").with_suffix("")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs", "experiments", "benchmarks"])
def test_every_file_that_is_named_exists(document):
    path = ROOT / document
    for file in [path] if path.is_file() else sorted(path.rglob("*.md")):
        text = file.read_text(encoding="utf-8")
        named = set(re.findall(r"(?<![\w/.])(?:src|tests|benchmarks|experiments|docs)/[\w/.-]+\.\w+", text))
        assert [name for name in named if not (ROOT / name).exists()] == [], file
