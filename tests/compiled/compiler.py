"""Detects the C++ compiler that torch.compile needs."""

import shutil

import pytest

has_compiler = shutil.which("g++") is not None or shutil.which("clang++") is not None

needs_compiler = pytest.mark.skipif(not has_compiler, reason="torch.compile needs a C++ compiler")
