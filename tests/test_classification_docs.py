"""The examples of docs/classification.md run as they stand."""

import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[1] / "docs" / "classification.md"


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    scope = {}
    for block in blocks:
        exec(block, scope)
    assert scope["label"] in (0, 1)
    assert scope["result"].num_tokens == 2
