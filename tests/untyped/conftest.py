"""Compile in the test process: the workers that torch would start import torch first, which takes longer."""

import os

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
