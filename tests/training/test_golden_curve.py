"""The loss curve equals a committed one."""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from memformer.cli.main import main
from tests.training.runs import config_file, logged, run_config, write_documents

pytestmark = pytest.mark.usefixtures("without_report")
GOLDEN_CURVE = Path(__file__).with_name("golden_curve.json")


def test_the_golden_curve_is_reproduced(tmp_path):
    """After an intended change of the curve, `python -m tests.training.test_golden_curve` writes the new one."""
    golden = json.loads(GOLDEN_CURVE.read_text(encoding="utf-8"))
    if golden["torch"] != torch.__version__.partition("+")[0]:
        pytest.skip(f"the curve was made with torch {golden['torch']}, this is torch {torch.__version__}")
    assert golden_curve(tmp_path) == pytest.approx(golden["bits_per_token"], rel=golden["tolerance"])


def golden_curve(base):
    write_documents(base / "texts")
    assert main(["train", config_file(run_config(base, num_updates=40, evaluate_every=40, save_every=40))]) == 0
    return [line[1] for line in logged(base / "run")[0]]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        curve = golden_curve(Path(name))
    GOLDEN_CURVE.write_text(
        json.dumps({"torch": torch.__version__.partition("+")[0], "tolerance": 1e-3, "bits_per_token": curve}, indent=2)
        + "\n",
        encoding="utf-8",
    )
