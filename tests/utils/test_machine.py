"""Dependence on the machine: missing modules, a package of the same name, peak memory, devices."""

import re
import subprocess
import sys
import types
import warnings

import pytest
import torch

from memformer import InputError, TransformerXL, TransformerXLConfig, build_model, load_model
from memformer.utils.machine import choose_device, peak_memory_bytes


def run(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **kwargs)


def test_the_command_can_be_imported_without_the_resource_module():
    done = run(
        "import sys; sys.modules['resource'] = None; from memformer.cli.main import main; sys.exit(main(['-h']))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: memformer")


def test_peak_memory_is_read_from_psutil_on_windows(monkeypatch):
    class Process:
        def memory_info(self):
            return types.SimpleNamespace(peak_wset=123 << 20)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "psutil", types.SimpleNamespace(Process=Process))
    assert peak_memory_bytes(torch.device("cpu")) == 123 << 20


def test_peak_memory_grows_with_allocated_tensors():
    """Not with what the process has held that began this one: on Linux, `getrusage` begins with its peak."""
    measure = (
        "import torch; from memformer.utils.machine import peak_memory_bytes; cpu = torch.device('cpu'); "
        "before = peak_memory_bytes(cpu); held = torch.ones(1 << 26); print(peak_memory_bytes(cpu) - before)"
    )
    large = "held = b'1' * (1 << 30)"
    done = run(f"import subprocess, sys; {large}; subprocess.run([sys.executable, '-c', {measure!r}], check=True)")
    assert done.returncode == 0, done.stderr
    assert 0.9 < int(done.stdout) / (4 << 26) < 1.2  # of 256 MiB


def test_another_distribution_of_the_same_import_name_is_named(tmp_path):
    (tmp_path / "memformer-0.3.1.dist-info").mkdir()
    (tmp_path / "memformer-0.3.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: memformer\nVersion: 0.3.1\n"
    )
    done = run(f"import sys; sys.path.append({str(tmp_path)!r}); import memformer")
    assert done.returncode == 0, done.stderr
    assert "the distribution memformer 0.3.1 is installed together with memformer-lm" in done.stderr
    assert "memformer 0.3.1" not in run("import memformer").stderr


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps"])
def test_unknown_devices_are_refused(name):
    with pytest.raises(InputError, match=r"must be auto, cpu, cuda, cuda:0"):
        choose_device(name)


TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)


def test_a_driver_that_is_too_old_is_said_in_one_sentence(monkeypatch, capsys):
    def init():
        raise RuntimeError(TOO_OLD)

    def is_available():
        warnings.warn(f"CUDA initialization: {TOO_OLD} (Triggered internally at CUDAFunctions.cpp:109.)", stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert choose_device("auto").type == "cpu"
    sentence = r"The NVIDIA driver on your system is too old (found version 11040)"
    assert capsys.readouterr().err == f"memformer: warning: the CPU is used: CUDA initialization: {sentence}\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=re.escape(f"device ('cuda') is not available: {sentence}") + "$"):
        choose_device("cuda")


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch built without CUDA")
def test_a_torch_without_cuda_is_said_in_one_sentence():
    with pytest.raises(InputError, match=r"device \('cuda'\) is not available: Torch not compiled with CUDA enabled$"):
        choose_device("cuda")


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch built without CUDA")
def test_models_on_devices_that_this_machine_lacks_are_refused(tmp_path):
    build_model(TransformerXLConfig(vocab_size=8, num_layers=1, d_model=8, num_heads=2)).save_pretrained(tmp_path)
    for load in (load_model, TransformerXL.from_pretrained):
        for device in ("cuda:9", torch.device("cuda")):
            with pytest.raises(InputError, match=r"device \('cuda(:9)?'\) is not available: Torch not compiled"):
                load(tmp_path, device=device)
        with pytest.raises(InputError, match=r"device \('gpu'\) is not known: Expected one of cpu, cuda"):
            load(tmp_path, device="gpu")
