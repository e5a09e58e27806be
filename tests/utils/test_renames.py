"""Old names of options are replaced wherever they stand on a command line, and nothing else is."""

import pytest

from memformer import InputError
from memformer.utils.renames import update_options, update_run_config


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--training.write_price", "0.1"], ["--training.write_penalty", "0.1"]),
        (["--training.write_price=0.1"], ["--training.write_penalty=0.1"]),
        (["--training.sharding", "moments"], ["--training.sharding", "optimizer_state"]),
        (["--training.sharding=moments"], ["--training.sharding=optimizer_state"]),
        (["--model.place_embedding", "true", "--resume"], ["--model.position_embedding", "true", "--resume"]),
    ],
)
def test_old_names_are_replaced_and_noted(old, new):
    updated, notes = update_options(old)
    assert updated == new
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--model.decoder_starts_from_last_token", "true"], ["--model.decoder_start_tokens", "1"]),
        (["--model.decoder_starts_from_last_token=No"], ["--model.decoder_start_tokens=0"]),
    ],
)
def test_an_option_whose_values_were_replaced_too_is_noted_twice(old, new):
    updated, notes = update_options(old)
    assert updated == new
    assert len(notes) == 2


@pytest.mark.parametrize(
    "options",
    [
        ["--folder", "moments", "--resume", "--json"],
        ["--data.train.path", "moments", "--data.train.kind=text"],
        ["--model.num_slots=4", "moments"],
        ["--training.sharding", "weights", "moments"],
        [],
    ],
)
def test_other_words_stay(options):
    assert update_options(options) == (options, [])


@pytest.mark.parametrize(("old", "new"), [(True, 1), (False, 0), ("yes", 1), ("False", 0)])
def test_a_switch_that_became_a_number_is_replaced(old, new):
    updated, notes = update_run_config({"model": {"decoder_starts_from_last_token": old, "decoder_attention": "joint"}})
    assert updated["model"] == {"decoder_start_tokens": new, "decoder_attention": "joint"}
    assert len(notes) == 2
    assert update_run_config({"model": {"decoder_start_tokens": True}}) == (
        {"model": {"decoder_start_tokens": True}},
        [],
    )


def test_a_value_that_differs_from_itself_is_not_renamed():
    given = {"model": {"write_temperature": float("nan")}, "training": {"learning_rate": float("nan")}}
    assert update_run_config(given)[1] == []


def test_removed_keys_of_another_section_stay():
    given = {"folder": "x", "data": {"skip_above": 1}, "model": None, "training": {"skip_above": None}}
    assert update_run_config(given) == ({**given, "training": {}}, [])


def test_a_removed_key_with_a_value_is_noted():
    updated, notes = update_run_config({"training": {"skip_above": 3.0}})
    assert updated == {"training": {}}
    assert notes[0].startswith("training.skip_above (3.0) was removed: ")


def test_a_removed_option_is_refused():
    with pytest.raises(InputError, match="--training.skip_above was removed in version 0.2"):
        update_options(["--training.skip_above=3"])
