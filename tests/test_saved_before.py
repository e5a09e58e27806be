"""Runs, checkpoints, sessions and models saved by version 0.1 (commit 266f754) load and give the same results."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from memformer import CheckpointError, InputError, Memformer, MemformerConfig, load_model
from memformer.cli.run_config import read_config
from memformer.utils.renames import KEYS, REMOVED, TENSORS, VALUES
from tests.cli.calls import call, call_json, refused

SAVED = Path(__file__).parent / "saved" / "0.1"
EXPECTED = json.loads((SAVED / "expected.json").read_text(encoding="utf-8"))
WORDS = [
    "the",
    "slot",
    "keeps",
    "what",
    "the",
    "segment",
    "tells",
    "and",
    "forgets",
    "the",
    "rest",
    "of",
    "it",
    "slowly",
    "while",
    "the",
    "reader",
    "looks",
    "on",
]


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A copy of the saved files and of the training text; it is made the working directory."""
    shutil.copytree(SAVED, tmp_path, dirs_exist_ok=True)
    lines = [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(9)) + "." for i in range(120)]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_same_result(found, expected):
    # Rounding differs between processors.
    assert found["num_tokens"] == expected["num_tokens"]
    for kind in ("with_memory", "memory_erased"):
        assert found[kind]["bits_per_byte"] == pytest.approx(expected[kind]["bits_per_byte"], rel=1e-5)


def test_a_run_is_evaluated(saved):
    assert_same_result(call_json("evaluate", "text-run"), EXPECTED["evaluate"])


def test_a_recall_run_is_evaluated(saved):
    points = call_json("evaluate", "fact-run")["points"]
    assert [point["accuracy"] for point in points] == EXPECTED["fact_accuracy"]


def test_a_recall_model_writes_the_same_memory(saved):
    """Its answers are those of chance, which say little about the memory."""
    model = load_model("fact-run/best").eval()
    memory = model.initial_memory(1)
    with torch.no_grad():
        for segment in (torch.arange(8 * model.segment_length) % model.vocab_size).view(8, 1, -1):
            _, memory = model.encode(segment, memory=memory)
    assert memory.sum(dim=-1).flatten().tolist() == pytest.approx(EXPECTED["fact_memory"], abs=1e-4)


def test_a_checkpoint_is_resumed_with_its_optimizer_and_memory(saved):
    result = call_json("train", "text-run", "--resume", "--training.num_updates", "9")
    assert_same_result(result, EXPECTED["resumed_to_update_9"])
    # Resuming has rewritten the config with the current names.
    status, _, error = call("evaluate", "text-run")
    assert (status, error) == (0, "")


def test_a_session_goes_on(saved):
    options = ("--load_session", "text-run.session", "--max_new_tokens", "12", "--seed", "3")
    assert call_json("generate", "text-run", *options)["token_ids"] == EXPECTED["session_continued_with_seed_3"]


@pytest.mark.parametrize("load", [Memformer.from_pretrained, load_model])
def test_a_model_is_loaded_without_a_warning(saved, load):
    model = load("text-run/best")
    assert model.config.free_slot_bias == 2.0
    assert model.memory_writer.free_slot_bias.item() == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize("command", ["evaluate", "retention"])
def test_old_names_in_a_run_give_no_warning(saved, command):
    """The library wrote them, and will always read them."""
    status, _, error = call(command, "text-run")
    assert status == 0
    assert "warning" not in error


def test_old_keys_of_a_config_file_warn_once_with_the_new_name(saved):
    (saved / "old.yaml").write_text(
        "folder: new\nmodel: {d_model: 8, num_heads: 2, segment_length: 8, place_embedding: true}\n"
        "data: {train: {kind: text, path: text.txt}, cache: cache, max_document_tokens: 512}\n"
        "training: {num_updates: 1, num_lanes: 2, sharding: moments}\n"
    )
    status, _, error = call("train", "old.yaml", "--training.write_price", "0", "--training.warmup_updates", "0")
    assert status == 0, error
    warnings = "\n".join(line for line in error.splitlines() if "warning" in line)
    for note in (
        "model.place_embedding is now model.position_embedding",
        "training.sharding: moments is now optimizer_state",
        "--training.write_price is now --training.write_penalty",
    ):
        assert warnings.count(note) == 1
    config = (saved / "new" / "config.yaml").read_text()
    assert "position_embedding: true" in config
    assert "sharding: optimizer_state" in config
    assert "place_embedding" not in config


def test_a_config_that_a_run_wrote_means_the_decoder_of_that_time(saved):
    shutil.copy(saved / "text-run" / "config.yaml", saved / "copied.yaml")
    for path in ("text-run", "text-run/config.yaml", "copied.yaml"):
        assert read_config(Path(path), warn=lambda _: None)["model"]["decoder_attention"] == "separate"
    mine = saved / "mine"
    mine.mkdir()
    (mine / "config.yaml").write_text("model: {d_model: 8}")
    for path in (mine, mine / "config.yaml"):
        assert read_config(path)["model"] == {"d_model": 8}


def test_old_keys_of_a_config_object_warn_with_the_new_name():
    with pytest.warns(FutureWarning, match="model.free_slot_eagerness is now model.free_slot_bias"):
        config = MemformerConfig.from_dict({"free_slot_eagerness": 1.5, "embedding_dropout": None})
    assert config.free_slot_bias == 1.5


def test_an_old_and_its_new_key_together_are_refused():
    with pytest.raises(InputError, match=r"model.free_slot_eagerness and model.free_slot_bias are both given"):
        MemformerConfig.from_dict({"free_slot_eagerness": 1.5, "free_slot_bias": 1.5})


def test_a_removed_option_is_refused(saved):
    assert refused("train", "text-run", "--model.decoder_reads_memory", "true") == (
        "--model.decoder_reads_memory was removed in version 0.2: "
        "the decoder attends to the encoder's hidden states only"
    )


def test_a_model_that_needs_a_removed_option_is_refused(saved):
    file = saved / "text-run" / "best" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "decoder_reads_memory": True}))
    with pytest.raises(CheckpointError, match=r"decoder_reads_memory \(True\) was removed in version 0.2"):
        load_model(saved / "text-run" / "best")


def test_every_new_name_exists():
    from memformer.training.config import TrainingConfig

    present = {"model": MemformerConfig.__dataclass_fields__, "training": TrainingConfig.__dataclass_fields__}
    for section, keys in KEYS.items():
        assert set(keys.values()) <= present[section].keys()
        assert not keys.keys() & present[section].keys()
    for section, key in REMOVED:
        assert key not in present[section]
    assert all(KEYS.get(section, {}).get(key, key) in present[section] for section, key in VALUES)
    assert all("free_slot" in name or "position" in name for name in TENSORS.values())
