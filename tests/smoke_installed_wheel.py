"""Installs the built wheel into a folder of its own and uses it from outside the source tree."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

CODE = """
import pathlib, sys, torch, memformer
assert "site" in memformer.__file__, memformer.__file__
assert (pathlib.Path(memformer.__file__).parent / "py.typed").is_file()
from memformer.cli.main import main
model = memformer.Memformer(memformer.MemformerConfig(d_model=16, num_heads=2, d_ff=32, segment_length=8, num_slots=4))
tokens = torch.ones(2, 1, 8, dtype=torch.int64)
rollout = memformer.Rollout(inputs=tokens, targets=tokens)
assert memformer.backpropagate(model, rollout).num_tokens == 16
assert len(memformer.Session(model).generate(10, seed=0)) == 10
pathlib.Path("text.txt").write_text("to be or not to be, " * 40)
assert main(["train", "run.yaml", "--threads", "1"]) == 0
assert main(["evaluate", "run"]) == 0
assert main(["generate", "run", "--max_new_tokens", "5"]) == 0
assert pathlib.Path("run/summary.html").is_file()
from memformer.reproduction.tables import tables_folder, read_table
assert "site" in str(tables_folder())
assert len(read_table(tables_folder() / "table1").rows) == 18
assert main(["reproduce", "table9"]) == 2
"""
CONFIG = """
folder: run
model: {d_model: 16, num_heads: 2, d_ff: 32, num_encoder_layers: 1, num_decoder_layers: 1, segment_length: 8}
data: {train: {kind: text, path: text.txt}, max_document_tokens: 100, validation_fraction: 0.2, cache: cache}
training: {num_updates: 2, num_lanes: 2, rollout_length: 2, evaluation_tokens: 100, sample_tokens: 5}
"""


def main() -> None:
    (wheel,) = Path(sys.argv[1]).glob("*.whl")
    with tempfile.TemporaryDirectory() as folder:
        site, work = Path(folder) / "site", Path(folder) / "work"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
        subprocess.run(pip, check=True)
        work.mkdir()
        (work / "run.yaml").write_text(CONFIG)
        environment = {**os.environ, "PYTHONPATH": str(site)}
        subprocess.run([sys.executable, "-c", CODE], check=True, cwd=work, env=environment)
    print(f"{wheel.name} works when installed")


if __name__ == "__main__":
    main()
