"""`python -m memformer.lm_eval`: its own option, and what it gives the harness."""

import importlib.util
import os
import sys

import pytest

from memformer.lm_eval import command, tasks


def test_a_missing_harness_is_named_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.main(["--tasks", "memformer_books"]) == 2
    message = "memformer.lm_eval needs the package lm_eval: pip install 'memformer-lm[eval]'"
    assert capsys.readouterr().err == f"memformer: error: {message}\n"


def test_a_wrong_data_folder_is_refused(capsys):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    assert command.main(["--data", "nowhere"]) == 2
    assert capsys.readouterr().err == "memformer: error: --data (nowhere) is not a folder\n"


def test_an_unknown_task_is_one_sentence(executed, monkeypatch, capsys):
    from lm_eval._cli import HarnessCLI

    def refuse(self, arguments):
        raise ValueError("Tasks not found: nope")

    monkeypatch.setattr(HarnessCLI, "execute", refuse)
    assert command.main(["--model", "memformer", "--model_args", "pretrained=x", "--tasks", "nope"]) == 2
    assert capsys.readouterr().err == "memformer: error: Tasks not found: nope\n"


@pytest.fixture
def executed(monkeypatch):
    """The arguments that the harness's command is executed with."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    import lm_eval.utils
    from lm_eval._cli import HarnessCLI

    seen = []
    monkeypatch.setattr(HarnessCLI, "execute", lambda self, arguments: seen.append(arguments))
    monkeypatch.setattr(lm_eval.utils, "setup_logging", lambda: None)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv(tasks.DATA_VARIABLE, "before")
    return seen


def test_the_harness_gets_the_model_the_pack_and_the_data(executed, tmp_path):
    from lm_eval.api.registry import get_model

    argv = ["--model", "memformer", "--model_args", "pretrained=x", "--tasks", "memformer_books"]
    assert command.main(["--data", str(tmp_path), *argv]) == 0
    assert command.main([*argv, "--include_path", "mine", "--device", "cpu"]) == 0
    assert command.main(["ls", "tasks"]) == 0
    assert executed[0].include_path == [str(command.PACK)]
    assert executed[0].device == "auto"
    assert (executed[1].include_path, executed[1].device) == ([str(command.PACK), "mine"], "cpu")
    assert executed[2].include_path == [str(command.PACK)]
    assert os.environ[tasks.DATA_VARIABLE] == str(tmp_path)
    assert get_model("memformer").__name__ == "MemformerLM"


def test_a_config_of_the_harness_keeps_its_folder_of_tasks_and_its_device(executed, tmp_path):
    (tmp_path / "e.yaml").write_text("model: memformer\ntasks: [my_books]\ninclude_path: mine\n")
    run = ["run", "--config", str(tmp_path / "e.yaml")]
    assert command.main(run) == 0
    assert (executed[0].include_path, executed[0].device) == ([str(command.PACK), "mine"], "auto")
    assert command.main([*run, "--include_path", "other", "--device", "cpu"]) == 0
    assert (executed[1].include_path, executed[1].device) == ([str(command.PACK), "other"], "cpu")
    (tmp_path / "e.yaml").write_text("model: memformer\ntasks: [my_books]\ndevice: cuda:1\n")
    assert command.main(run) == 0
    assert (executed[2].include_path, executed[2].device) == ([str(command.PACK)], None)


def test_the_harness_prints_tables_with_heads():
    """Old versions of a package of the harness leave the heads out, and the harness allows them."""
    make_table = pytest.importorskip("lm_eval.utils", reason="needs the extra eval").make_table
    results = {"results": {"task": {"alias": "task", "acc,none": 0.5}}, "versions": {}, "n-shot": {}}
    head = make_table({**results, "higher_is_better": {"task": {"acc": True}}}).splitlines()[0]
    assert [cell.strip() for cell in head.split("|")[1:3]] == ["Tasks", "Version"]
