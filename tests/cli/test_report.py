"""`memformer report` rewrites the page of a run, with the memory and other runs."""

import json
import re
import shutil

import yaml

from tests.cli.calls import call_json, refused


def sentence_of(folder):
    """The sentence below or in place of the picture of the memory."""
    page = (folder / "summary.html").read_text()
    assert page.count("<svg") in {2, 3}
    (part,) = re.findall("<h2>The memory</h2>(.*?)<h2>", page, flags=re.DOTALL)
    (sentence,) = re.findall("<p>(.*?)</p>", part)
    assert ("<svg" in part) == sentence.startswith("How much of itself each slot keeps")
    return sentence


def test_report_is_written_again_as_training_has_written_it(copied, run_folder):
    assert "timesteps of the held-out documents" in sentence_of(run_folder)
    (copied / "summary.html").unlink()
    assert call_json("report", copied) == {"summary": str(copied / "summary.html")}
    assert sentence_of(copied) == sentence_of(run_folder).replace(str(run_folder), str(copied))


def test_a_run_on_images_has_a_picture_of_the_memory(digits):
    assert "the first 48 timesteps of the held-out documents. White lines separate documents." in sentence_of(digits[0])


def test_what_prevents_the_picture_is_told_in_the_page(copied):
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["data"]["train"]["path"] = "/no/such/folder"
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    call_json("report", copied)
    assert "There is no picture of the memory: " in (sentence := sentence_of(copied))
    assert "/no/such/folder" in sentence
    shutil.rmtree(copied / "best")
    call_json("report", copied)
    assert re.fullmatch(r"There is no picture of the memory: .*best.*\.", sentence_of(copied))


def test_a_model_without_slots_gets_a_sentence(base, tmp_path):
    options = ("--model_type", "lstm", "--folder", tmp_path / "lstm", "--training.num_updates", "1")
    call_json("train", base / "config.yaml", *options)
    before = sentence_of(tmp_path / "lstm")
    assert before.startswith("There is no picture of the memory: the model is an LSTM, whose memory has no slots")
    call_json("report", tmp_path / "lstm")
    assert sentence_of(tmp_path / "lstm") == before


def test_other_runs_are_drawn_beside_the_run(copied, run_folder, digits):
    call_json("report", copied, "--with", run_folder, digits[0])
    page = (copied / "summary.html").read_text()
    assert {"held out, bits per byte", "held out, bits per pixel"} <= set(re.findall("<text[^>]*>([^<]*)</text>", page))
    assert "the held-out data of the runs differs" in page


def test_folders_that_are_no_runs_are_refused_in_one_sentence(copied, run_folder, tmp_path):
    before = (copied / "summary.html").read_text()
    end = "is not the folder of a trained run: it has no config.yaml"
    assert refused("report", copied, "--with", run_folder, "/no/such") == f"/no/such {end}"
    assert refused("report", copied, "--with", copied / "best") == f"{copied / 'best'} {end}"
    assert refused("report", tmp_path / "none") == f"{tmp_path / 'none'} has no log.jsonl; a report needs a trained run"
    log = copied / "log.jsonl"
    log.write_text(json.dumps({"kind": "training", "update": 1}) + "\n")
    assert "lacks a value" in refused("report", run_folder, "--with", copied)
    assert (copied / "summary.html").read_text() == before
