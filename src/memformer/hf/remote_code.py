"""Code in a model's folder by which transformers finds this library's classes, with `trust_remote_code=True`."""

import os
from collections.abc import Mapping
from pathlib import Path

_FILE = "modeling_memformer.py"
_CODE = '''"""Loaded by transformers with trust_remote_code=True; the models are those of the package memformer-lm."""

try:
    from memformer.hf import {names}
except ImportError as error:
    raise ImportError("this model needs the package memformer-lm: pip install 'memformer-lm[hf]'") from error
'''


def auto_map_of(*, config: str, model: str, causal_model: str) -> dict[str, str]:
    """Return the `auto_map` of a config: in which file of its folder transformers finds the classes of these names."""
    classes = {"AutoConfig": config, "AutoModel": model, "AutoModelForCausalLM": causal_model}
    return {auto: f"{Path(_FILE).stem}.{name}" for auto, name in classes.items()}


def write_remote_code(folder: str | os.PathLike[str], auto_map: Mapping[str, str]) -> None:
    """Write the file that an `auto_map` of `auto_map_of` names, if it is one; it imports the classes from here."""
    start = f"{Path(_FILE).stem}."
    names = {reference.removeprefix(start) for reference in auto_map.values() if reference.startswith(start)}
    if names:
        (Path(folder) / _FILE).write_text(_CODE.format(names=", ".join(sorted(names))), encoding="utf-8")
