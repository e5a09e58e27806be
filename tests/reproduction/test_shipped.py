"""The digit model shipped with the experiments: it loads, samples, and has the documented bits per byte."""

from pathlib import Path

import pytest

from tests.cli.calls import call, call_json

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "experiments" / "models" / "digits-14x14"


def test_it_samples_digits(tmp_path):
    status, _, error = call("generate", MODEL, "--output", tmp_path / "digits.png", "--num_images", "2", "--seed", "0")
    assert status == 0, error
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.data
def test_it_predicts_digits():
    images = ROOT.parent / "shared" / "data" / "mnist" / "t10k-images-idx3-ubyte.gz"
    if not images.exists():
        pytest.skip("MNIST is not beside the checkout")
    source = {"kind": "idx", "path": images, "levels": "8", "downsample": "2", "documents": ":50"}
    options = [part for name, value in source.items() for part in (f"--data.{name}", value)]
    assert call_json("evaluate", MODEL, *options)["with_memory"]["bits_per_byte"] == pytest.approx(0.62, abs=0.05)
