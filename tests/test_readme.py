"""The README's example runs as it stands, and names only what exists."""

import re
from pathlib import Path

from memformer.cli.run_config import parse_run_config

ROOT = Path(__file__).parents[1]


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "my-model" / "config.json").is_file()
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_every_experiment_is_a_valid_config():
    configs = sorted((ROOT / "experiments").glob("*.yaml"))
    assert configs
    for file in configs:
        config, _ = parse_run_config([str(file)])
        assert config.folder == f"runs/{file.stem}"


def test_every_file_that_is_named_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"(?:src|tests|benchmarks|experiments|docs)/[\w/.-]+\.\w+", text)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
