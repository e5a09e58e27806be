"""Run folders: one process owns a folder, and files of the user are neither overwritten nor deleted."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from memformer import InputError
from memformer.cli.main import main
from memformer.training import processes as processes_module
from memformer.training.checkpoint import check_checkpoint
from memformer.training.optimizer import learning_rate_at
from memformer.training.processes import Processes
from memformer.training.report import _read_samples
from memformer.training.run_folder import check_run_folder, newest_checkpoint
from memformer.utils.ownership import owned_folder
from tests.training.runs import checkpoint_of, config_file, logged, run_config

pytestmark = pytest.mark.usefixtures("without_report")


@pytest.mark.parametrize("options", [[], ["--resume"]], ids=["train", "resume"])
def test_of_two_processes_that_train_into_one_folder_one_is_refused(base, unbroken, monkeypatch, capsys, options):
    """Two processes cannot train into one folder: one goes on, the other is refused."""
    config = run_config(base, f"owned{len(options)}")
    argv, others = ["train", config_file(config)], []
    if options:
        shutil.copytree(unbroken, config.folder)
        argv += ["--resume", "--training.num_updates", "12"]

    def rate_while_another_process_starts(update, training):
        if not others:
            others.append(None)
            others[0] = [main([*argv, *more]) for more in ([], ["--resume"])]
        return learning_rate_at(update, training)

    monkeypatch.setattr("memformer.training.loop.learning_rate_at", rate_while_another_process_starts)
    assert main(argv) == 0
    assert others == [[2, 2]]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memformer: error:")]
    assert len(errors) == 2
    for error in errors:
        assert f"{config.folder} is in use by process {os.getpid()} on " in error
        assert "choose another --folder" in error
    log = logged(base / config.folder)[0]
    assert [line[0] for line in log] == list(range(1, 13 if options else 11))
    assert log[:10] == logged(unbroken)[0]
    assert not (base / config.folder / ".lock").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_data_is_prepared(base, monkeypatch, capsys):
    """An unwritable folder is refused before the data is prepared."""
    monkeypatch.setattr("memformer.cli.train.prepare_data", lambda *args, **kwargs: pytest.fail("too late"))
    assert main(["train", config_file(run_config(base, "unwritable")), "--folder", "/proc/none/run"]) == 2
    assert "/proc/none/run could not be written: " in capsys.readouterr().err


def test_a_refused_run_leaves_no_folder(base, capsys):
    """A run whose data is refused leaves no folder behind."""
    config = run_config(base, "refused")
    for options in (["--data.train.path", str(base / "none")], ["--resume"]):
        assert main(["train", config_file(config), *options]) == 2
        assert not (base / "refused").exists()
    assert "refused/config.yaml cannot be read" in capsys.readouterr().err


def test_a_start_that_was_killed_early_does_not_stand_in_the_way_of_the_next(base, capsys):
    """A process that is killed while it prepares the data leaves a folder with its lock alone."""
    config = run_config(base, "early", num_updates=1)
    folder = Path(config.folder)
    folder.mkdir()
    (folder / ".lock").write_text("process 1 on a machine that was switched off")
    assert main(["train", config_file(config)]) == 0
    assert "warning" not in capsys.readouterr().err
    assert not (folder / ".lock").exists()
    assert newest_checkpoint(folder).name == "update-000000001"


def test_copies_of_checkpoints_survive_a_resumed_run(copied, capsys):
    """A user's copies of checkpoints are neither resumed from nor deleted."""
    copies = [checkpoint_of(copied, 3).with_name(name) for name in ("update-best", "update-000000003-good")]
    for copy in copies:
        shutil.copytree(checkpoint_of(copied, 3), copy)
    options = ["--resume", "--training.num_updates", "11", "--training.keep_checkpoints", "1"]
    assert main(["train", str(copied), *options]) == 0
    assert f"resuming from {checkpoint_of(copied, 10)}, update 10" in capsys.readouterr().err
    assert newest_checkpoint(copied) == checkpoint_of(copied, 11)
    kept = [checkpoint_of(copied, 11), *copies]
    assert sorted((copied / "checkpoints").iterdir()) == sorted(kept)
    for copy in copies:
        check_checkpoint(copy)


def test_a_file_of_the_user_is_not_shown_as_a_sample(tmp_path):
    """Only files with the name of a sample are samples."""
    for name in ("update-000000005.txt", "update-000000010.txt", "update-notes.txt", "update-000000010 (copy).txt"):
        (tmp_path / name).write_text(name)
    samples = _read_samples(tmp_path, updates=range(100))
    assert [sample.text for sample in samples] == ["update-000000005.txt", "update-000000010.txt"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.yaml", "folder: .\n"), ("tokenizer.json", "{}"), ("tokenizer-notes", ""), ("train.log.old", "")],
)
def test_a_folder_with_a_file_of_the_user_is_not_taken_for_a_run(base, tmp_path, capsys, name, content):
    """A user's config or tokenizer is not overwritten by a run."""
    (tmp_path / name).write_text(content)
    assert main(["train", config_file(run_config(base, "foreign")), "--folder", str(tmp_path)]) == 2
    assert f"folder ({tmp_path}) contains '{name}' but no run" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


def test_a_run_that_stopped_before_its_first_checkpoint_can_begin_again(unbroken, tmp_path):
    """The files of a run that stopped early are its own."""
    check_run_folder(tmp_path)
    for name in ("train.log", "config.yaml", "tokenizer_config.json"):  # in the order in which they are written
        shutil.copy(unbroken / "config.yaml", tmp_path / name)
        check_run_folder(tmp_path)
    first, _, rest = (tmp_path / "config.yaml").read_text().partition("\n")
    assert first.startswith("# sha256")
    (tmp_path / "config.yaml").write_text(rest)  # edited by the user
    (tmp_path / "versions.json").write_text("{}")
    check_run_folder(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_of_several_processes_reports_a_refusal_for_all(tmp_path, monkeypatch, rank):
    """Of several processes of one run, the first owns the folder, and all end if it is refused."""
    processes = Processes()
    processes.count, processes.rank = 2, rank
    refusals = []

    def all_reduce(tensor):
        tensor += rank  # the first process was refused
        refusals.append(int(tensor))

    monkeypatch.setattr(processes_module, "dist", SimpleNamespace(all_reduce=all_reduce, get_backend=lambda: "gloo"))

    def own_twice():
        with owned_folder(tmp_path, option="--folder"), owned_folder(tmp_path, option="--folder"):
            pytest.fail("owned by two")

    with pytest.raises(SystemExit if rank else InputError, match="2" if rank else "in use"):
        processes.do_in_first(own_twice)
    assert refusals == [1]
