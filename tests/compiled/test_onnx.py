"""Exported graphs, run by onnxruntime for any number of rows, compute what a session does."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

from memformer import InputError, InputTypeError, Session
from memformer.generation import onnx_export
from memformer.generation.onnx_export import DECODING_STEP_FILE, SIZES_FILE, TIMESTEP_FILE, export_onnx
from tests.cli.calls import call, refused
from tests.helpers import SEGMENT_LENGTH, VARIANTS, VOCAB_SIZE, tiny_model
from tests.models.baselines import tiny_baseline
from tests.models.classifiers import tiny_classifier

S = SEGMENT_LENGTH
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "onnx.md"
MEMFORMERS = {
    "default": {},
    "options": {
        **VARIANTS["separate attention"],
        "convolution_kernel": 3,
        "write_normalizer": "entmax15",
        "write_competition": True,
        "forgetting_when_written": True,
        "free_slot_bias": 1.0,
        "adaptive_cutoffs": (4, 8),
    },
}


def make(**changes):
    return tiny_model(num_encoder_layers=1, num_decoder_layers=2, **changes).float().eval()


class Graphs:
    """The exported graphs of a model, run as a program without PyTorch runs them."""

    def __init__(self, folder):
        self.sizes = json.loads((folder / SIZES_FILE).read_text())
        self.graphs = {file.name: onnxruntime.InferenceSession(file) for file in folder.glob("*.onnx")}

    def zeros(self, name, rows):
        shape = list(self.sizes["shapes"][name])
        shape[name.startswith("cached")] = rows
        return np.zeros(shape, self.sizes["dtype"])

    def run(self, file, inputs):
        graph = self.graphs[file]
        names = [output.name for output in graph.get_outputs()]
        return dict(zip(names, graph.run(None, inputs), strict=True))

    def begin(self, rows):
        segment = np.full((rows, S), self.sizes["bos_token_id"])
        padding_mask = np.arange(S) >= np.ones((rows, 1))
        return self.read(segment, self.zeros("memory", rows), padding_mask=padding_mask, reset=np.ones(rows, bool))

    def read(self, segment, memory, *, padding_mask=None, reset=None):
        rows = len(segment)
        inputs = {
            "segment": segment,
            "padding_mask": np.zeros((rows, S), bool) if padding_mask is None else padding_mask,
            "memory": memory,
            "reset": np.zeros(rows, bool) if reset is None else reset,
        }
        return self.run(TIMESTEP_FILE, inputs)


def exported(folder, **changes):
    """A model, and the folder of its graphs as the command writes it."""
    model = make(**changes).half()  # is exported in single precision
    model.save_pretrained(folder / "model")
    model.float()
    status, out, error = call("export", folder / "model", "--onnx", folder / "exported" / "graphs", "--json")
    assert status == 0, error
    # Each takes seconds, so the command says what it does.
    assert error.splitlines() == [f"exporting {TIMESTEP_FILE}", f"exporting {DECODING_STEP_FILE}"]
    found = json.loads(out)
    assert found["files"] == [DECODING_STEP_FILE, SIZES_FILE, TIMESTEP_FILE]
    return model, Path(found["folder"])


# One test for each model, because an export takes seconds.
@pytest.mark.parametrize("changes", MEMFORMERS.values(), ids=MEMFORMERS.keys())
def test_steps_and_the_example_of_the_documentation_equal_a_session(changes, tmp_path, monkeypatch):
    model, folder = exported(tmp_path, **changes)
    assert_steps_equal(model, folder)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(encoding="utf-8"), flags=re.DOTALL)
    names = {}
    exec(compile(example, DOCUMENTATION.name, "exec"), names)
    assert names["generated"] == Session(model).generate(3 * S, temperature=0)


def assert_steps_equal(model, folder):
    """Assert that the graphs compute, for any number of rows, what a session does."""
    graphs = Graphs(folder)
    for rows in (1, 3):
        texts = torch.randint(0, VOCAB_SIZE, (rows, 2 * S + 2))
        session = Session(model, batch_size=rows)
        state = graphs.begin(rows)
        for start in range(0, texts.shape[1], S):
            segment = texts[:, start : start + S]
            caches = {name: graphs.zeros(name, rows) for name in ("cached_keys", "cached_values")}
            tokens = np.full((rows, 1), graphs.sizes["bos_token_id"])
            past = {key: value for key, value in state.items() if key != "next_memory"}
            for position in range(segment.shape[1]):
                inputs = {"tokens": tokens, "positions": np.full((rows, 1), position), **past, **caches}
                found = graphs.run(DECODING_STEP_FILE, inputs)
                caches = {name: found[f"next_{name}"] for name in caches}
                np.testing.assert_allclose(found["logits"], session.next_token_logits(), rtol=1e-4, atol=1e-5)
                tokens = segment[:, position : position + 1].numpy()
                session.feed(tokens.tolist() if rows > 1 else tokens[0].tolist())
            if segment.shape[1] == S:
                state = graphs.read(segment.numpy(), state["next_memory"])
                np.testing.assert_allclose(state["next_memory"], session.memory, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["transformer-xl", "recurrent memory", "associative", "compressive", "compressive, uneven"]
)
def test_a_timestep_of_a_baseline_equals_the_model(name, tmp_path):
    # A Compressive Transformer's graph in double precision is refused by onnxruntime.
    dtype = torch.float64 if name.startswith("compressive") else torch.float16
    model = tiny_baseline(name).to(dtype).eval()
    graphs = Graphs(export_onnx(model, tmp_path / "graphs"))
    assert list(graphs.graphs) == [TIMESTEP_FILE]
    # The graph has single precision, and the model keeps its own.
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    model.float()
    rows, length = 3, model.segment_length
    segments = torch.randint(0, VOCAB_SIZE, (2, rows, length))
    reset = torch.tensor([True, False, True])
    memory = torch.rand(rows, *model.memory_shape)
    for segment in segments:
        inputs = {
            "segment": segment.numpy(),
            "padding_mask": np.zeros((rows, length), bool),
            "memory": memory.numpy(),
            "reset": reset.numpy(),
        }
        found = graphs.run(TIMESTEP_FILE, inputs)
        with torch.no_grad():
            hidden, memory = model.encode(segment, memory=model.reset_memory(memory, reset))
            logits = model.decode(segment, hidden=hidden)
        np.testing.assert_allclose(found["logits"], logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["next_memory"], memory, rtol=1e-4, atol=1e-5)
        reset = torch.zeros_like(reset)


def test_what_cannot_be_exported_is_refused_in_one_sentence(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "exists already; choose an empty" in refused("export", tmp_path / "model", "--onnx", tmp_path / "full")
    assert "give either --hf or --onnx" in refused("export", tmp_path / "model")
    message = refused("export", tmp_path / "model", "--onnx", tmp_path / "other", "--license", "mit")
    assert "--license belongs to --hf" in message
    with pytest.raises(InputError, match=r"positions \('relative'\) must be 'rotary' to export"):
        export_onnx(make(positions="relative"), tmp_path / "other")
    with pytest.raises(InputError, match=r"a model of type lstm cannot be exported to ONNX"):
        export_onnx(tiny_baseline("lstm"), tmp_path / "other")
    with pytest.raises(InputTypeError, match=r"model is of class MemformerFor\w+; it must be a LanguageModel"):
        export_onnx(tiny_classifier(), tmp_path / "other")
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None)
    message = refused("export", tmp_path / "model", "--onnx", tmp_path / "other")
    assert "needs onnx and onnxscript: pip install 'memformer-lm[onnx]'" in message
    assert not (tmp_path / "other").exists()
