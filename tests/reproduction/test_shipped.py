"""The digit models shipped with the experiments: they load, sample, and have the documented bits per byte."""

from pathlib import Path

import pytest

from tests.cli.calls import call, call_json, refused

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "experiments" / "models"


def test_it_samples_digits(tmp_path):
    output, model = tmp_path / "digits.png", MODELS / "digits-14x14"
    status, _, error = call("generate", model, "--output", output, "--num_images", "2", "--seed", "0")
    assert status == 0, error
    assert output.read_bytes().startswith(b"\x89PNG")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "scale", "num_images", "bits"),
    [("digits-14x14", {"levels": "8", "downsample": "2"}, 50, 0.62), ("digits-28x28", {}, 12, 0.66)],
)
def test_it_predicts_digits(name, scale, num_images, bits):
    images = ROOT.parent / "shared" / "data" / "mnist" / "t10k-images-idx3-ubyte.gz"
    if not images.exists():
        pytest.skip("MNIST is not beside the checkout")
    source = {"kind": "idx", "path": images, "documents": f":{num_images}", **scale}
    options = [part for key, value in source.items() for part in (f"--data.{key}", value)]
    found = call_json("evaluate", MODELS / name, *options)["with_memory"]["bits_per_byte"]
    assert found == pytest.approx(bits, abs=0.05)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--seed", "4"], "--seed cannot be an option of every run: every run has its own seed (see --seeds)"),
        (["--folder=x"], "--folder cannot be an option of every run: every run has its own folder"),
        (["--resume"], "--resume cannot be an option of every run: runs that were begun are continued anyway"),
    ],
)
@pytest.mark.parametrize("table", ["v1", "headline"])
def test_options_that_differ_between_runs_are_refused(table, option, message, tmp_path):
    assert message in refused("reproduce", table, "--folder", tmp_path, "--", "--training.num_updates", "1", *option)
    assert not list(tmp_path.iterdir())
