"""Files that change while a run is prepared: what the run records is what it was trained on."""

import pytest

import memformer.cli.train as command
from memformer import InputError
from memformer.cli.main import main
from memformer.training.run_data import prepare_data
from memformer.training.run_inputs import UnchangedInputs
from tests.training.runs import config_file, run_config, write_documents


@pytest.fixture
def config(tmp_path):
    write_documents(tmp_path / "texts")
    return run_config(tmp_path, num_updates=1, warmup_updates=0, sample_tokens=0)


def test_a_file_that_grows_is_refused(config, tmp_path):
    files = UnchangedInputs(config.data)
    with (tmp_path / "texts" / "3.txt").open("a") as file:
        file.write("one more line\n")
    with pytest.raises(InputError, match=r"data\.train: .*3\.txt changed while it was read; train on a copy of it"):
        files.check()


def test_a_new_file_in_the_folder_is_refused(config, tmp_path):
    files = UnchangedInputs(config.data)
    (tmp_path / "texts" / "9.txt").write_text("a log that was rotated")
    with pytest.raises(InputError, match=r"9\.txt changed while it was read"):
        files.check()


def test_a_new_name_of_a_file_changes_nothing(config, tmp_path):
    files = UnchangedInputs(config.data)
    (tmp_path / "backup").hardlink_to(tmp_path / "texts" / "3.txt")
    files.check()


def test_a_file_that_is_gone_is_refused(config, tmp_path):
    files = UnchangedInputs(config.data)
    (tmp_path / "texts" / "3.txt").unlink()
    with pytest.raises(InputError, match=r"3\.txt changed while it was read"):
        files.check()


def test_a_log_that_grows_leaves_no_run_behind(config, tmp_path, monkeypatch, capsys):
    """The line comes after the tokens were read, and before the file is recorded."""

    def prepare(*args, **kwargs):
        data = prepare_data(*args, **kwargs)
        with (tmp_path / "texts" / "0.txt").open("a") as file:
            file.write("a new line\n")
        return data

    monkeypatch.setattr(command, "prepare_data", prepare)
    assert main(["train", config_file(config), "--folder", str(tmp_path / "run")]) == 2
    assert "0.txt changed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()
