"""Kept shares are those of an inspection, for any rollouts; the picture has their colours."""

import base64
import io
import re

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from memformer import InputError, Rollout
from memformer.data import corpus_from_arrays
from memformer.evaluation.inspection import inspect_memory
from memformer.evaluation.kept_shares import KeptShares, draw_kept_shares, read_kept_shares
from memformer.evaluation.plots import to_svg
from tests.data.streams import one_lane
from tests.evaluation.corpora import documents
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, tiny_model
from tests.models.baselines import tiny_baseline

CORPUS = corpus_from_arrays(documents([3 * SEGMENT_LENGTH + 1, 2, 5 * SEGMENT_LENGTH]), VOCAB_SIZE)
STARTS = [0, 4, 5]  # of a document of n tokens, ceil(n / S) timesteps


def shares_of(num_timesteps, num_slots):
    shares = np.linspace(0, 1, num_timesteps * num_slots).reshape(num_timesteps, num_slots)
    return KeptShares(shares, [0], "a text")


def read(model, *, rollout_length=3, most=99):
    stream = one_lane(model, CORPUS, rollout_length)
    return read_kept_shares(model, stream, max_timesteps=most, description="texts")


@pytest.mark.parametrize(
    "make", [tiny_model, lambda: tiny_baseline("recurrent memory")], ids=["slots", "memory tokens"]
)
def test_shares_are_those_of_an_inspection(make):
    model = make()
    model.train()
    expected = inspect_memory(model, one_lane(model, CORPUS))
    for rollout_length in (1, 3, 20):
        found = read(model, rollout_length=rollout_length)
        np.testing.assert_allclose(found.shares, [timestep.kept for timestep in expected.timesteps], atol=1e-12)
        assert found.starts == STARTS
    assert model.training


@pytest.mark.parametrize("most", [1, 4, 5, 8])
def test_only_the_first_timesteps_are_read(most):
    model, taken = tiny_model(), 0

    def counted():
        nonlocal taken
        for rollout in one_lane(model, CORPUS, 2):
            taken += rollout.num_timesteps
            yield rollout

    found = read_kept_shares(model, counted(), max_timesteps=most, description="texts")
    np.testing.assert_array_equal(found.shares, read(model).shares[:most])
    assert found.starts == [start for start in STARTS if start < most]
    assert taken <= most + 1


def test_the_picture_has_one_pixel_per_slot_and_timestep_in_the_colour_of_its_share():
    kept = read(tiny_model())
    svg = to_svg(draw_kept_shares(kept))
    images = [
        matplotlib.image.imread(io.BytesIO(base64.b64decode(data)), format="png")
        for data in re.findall(r"data:image/png;base64,([^\"]+)", svg)
    ]
    picture, scale = sorted(images, key=lambda image: image.shape[:2] == (64, 1))
    np.testing.assert_allclose(picture, matplotlib.colormaps["viridis"](kept.shares.T), atol=1 / 250)
    np.testing.assert_allclose(scale[:, 0], matplotlib.colormaps["viridis"](np.linspace(1, 0, 64)), atol=1 / 250)


def test_streams_that_cannot_be_read_are_refused():
    model = tiny_model()
    one = next(one_lane(model, CORPUS))
    rows = Rollout(inputs=one.inputs.repeat(1, 2, 1), targets=one.targets.repeat(1, 2, 1))
    for stream, message in (
        ([], "the stream has no timestep"),
        ([rows], "a rollout has 2 rows; the stream must have 1"),
    ):
        with pytest.raises(InputError, match=message):
            read_kept_shares(model, stream, max_timesteps=3, description="texts")
    with pytest.raises(InputError, match="num_slots is 0: the model has no memory to inspect"):
        read(tiny_model(num_slots=0))
