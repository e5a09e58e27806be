"""The scripts that train over seeds: they train, resume, reuse and refuse runs as `memformer reproduce` does."""

import importlib.util
import json
import lzma
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from memformer.reproduction import child_processes, runs
from tests.cli.calls import make_text
from tests.training.jobs import forked

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
COMMON = "device: cpu\nthreads: 1\nmodel: {d_model: 8, num_heads: 2, segment_length: 8, num_slots: 2}\n"
TRAINING = "training: {num_updates: 2, num_lanes: 2, rollout_length: 3, sample_tokens: 0, evaluation_tokens: 64}\n"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Return a function that runs a script's `main` with options; results are written below the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(child_processes, "subprocess", SimpleNamespace(Popen=forked, STDOUT=subprocess.STDOUT))
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_LOOKS", 0.01)

    def run(name, *options):
        spec = importlib.util.spec_from_file_location(Path(name).stem, EXPERIMENTS / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.__dict__.update({"ROOT": tmp_path} if hasattr(module, "ROOT") else {"__file__": str(tmp_path / "x.py")})
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        module.main()

    return run


def test_seeds(script, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_text(make_text(number))
    (tmp_path / "tiny.yaml").write_text(f"{COMMON}{TRAINING}data: {{train: {{path: texts}}}}\n")
    script("seeds.py", "tiny.yaml", "--seeds", 0, 1, "--jobs", 2)
    assert capsys.readouterr().out.count("\n| ") == 2
    found = json.loads((tmp_path / "results" / "tiny.json").read_text())
    bits = [run["with_memory"]["bits_per_byte"] for run in found["runs"].values()]
    assert found["bits_per_byte"]["mean"] == pytest.approx(sum(bits) / 2)
    assert found["bits_per_byte"]["high"] == max(bits)
    script("seeds.py", "tiny.yaml", "--seeds", 0, 1)
    assert "2 of 2 runs are finished" in capsys.readouterr().err
    script("token_positions.py", "runs/tiny-seed-0", "--tokens", 64, "--json")
    assert len(json.loads(capsys.readouterr().out)["runs/tiny-seed-0"]) == 8
    with pytest.raises(
        SystemExit, match=r"^seeds.py: error: runs/tiny-seed-0 cannot be reused: .*training.learning_rate"
    ):
        script("seeds.py", "tiny.yaml", "--training.learning_rate", 0.5)
    # It trained to the end, and then did not find the results.
    with pytest.raises(SystemExit, match=r"^seeds.py: error: --folder cannot be an option of every run"):
        script("seeds.py", "tiny.yaml", "--name", "other", "--folder", "x")
    with pytest.raises(SystemExit, match=r"^seeds.py: error: 1 of 1 runs failed; runs/other-seed-0/train.log says: "):
        script("seeds.py", "tiny.yaml", "--name", "other", "--seeds", 0, "--data.train.path", "nowhere")


def test_too_short_documents_are_named(script, tmp_path):
    (tmp_path / "words").mkdir()
    for number in range(8):
        (tmp_path / "words" / f"{number}.txt").write_text("a cat")
    (tmp_path / "short.yaml").write_text(f"{COMMON}{TRAINING}data: {{train: {{path: words}}}}\n")
    script("seeds.py", "short.yaml", "--seeds", 0)
    with pytest.raises(SystemExit, match=r"^runs/short-seed-0 was trained on documents shorter than a segment"):
        script("token_positions.py", "runs/short-seed-0", "--json")
    with lzma.open(tmp_path / "books.jsonl.xz", "wt") as file:
        for number in range(8):
            book = {"author": "AB"[number % 2], "title": str(number), "text": "word " * (300 if number < 6 else 2000)}
            file.write(json.dumps(book) + "\n")
    with pytest.raises(SystemExit, match="^A has 2000 words in the book held out; 2048 are needed"):
        script("authors.py", "books.jsonl.xz")


def test_retention(script, tmp_path, capsys):
    (tmp_path / "fact.yaml").write_text(f"{COMMON}{TRAINING}data: {{recall: {{task: fact, max_distance: 1}}}}\n")
    options = ("fact.yaml", "--variants", "config", "--distances", 1, "--num_episodes", 2)
    script("retention/compare.py", *options, "--seeds", 0)
    script("retention/compare.py", *options, "--seeds", 1, "--training.learning_rate", 0.5)
    assert "| config, num_facts 1" in capsys.readouterr().out
    found = json.loads((tmp_path / "experiments" / "results" / "retention-fact.json").read_text())
    first, second = found["variants"]["config"]["runs"]
    assert (first["seed"], first["options"]) == (0, [])
    assert (second["seed"], second["options"]) == (1, ["--training.learning_rate", "0.5"])
    assert first["measured_at_commit"]
    assert second["measured_at_commit"]
    with pytest.raises(SystemExit, match=r"^compare.py: error: memformer retention .*seed-0 failed"):
        script("retention/compare.py", *options, "--seeds", 0, "--num_episodes", 0)
    with pytest.raises(SystemExit, match=r"^compare.py: error: .*seed-0 cannot be reused: .*training.learning_rate"):
        script("retention/compare.py", *options, "--seeds", 0, "--training.learning_rate", 0.5)
