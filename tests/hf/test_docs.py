"""The examples of docs/huggingface.md run as they stand."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra hf")

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8"))
    names = {}
    for example in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
        exec(compile(example, "huggingface.md", "exec"), names)
    out = capsys.readouterr().out
    assert "pip install" in out
    assert (tmp_path / "my-model" / "tokenizer.json").is_file()
    assert names["last"].shape == (1, 9)
    assert names["then"].cache.session.num_tokens == [len("pip") + 23]
    assert names["session"].num_tokens == [len("pip install") + 20]
