"""Models of this library in EleutherAI's lm-evaluation-harness (extra `eval`).

`from memformer.lm_eval import MemformerLM` registers the model `memformer` with the harness. `python -m
memformer.lm_eval` is the harness's own command line with this model and a task pack. No other package of this library
imports this one.
"""

from typing import TYPE_CHECKING, Any

from memformer.lm_eval.versions import check_lm_eval

if TYPE_CHECKING:
    from memformer.lm_eval.backend import MemformerLM

__all__ = ["MemformerLM"]


def __getattr__(name: str) -> Any:
    # Not imported above, so that the command can say in one sentence that the harness is missing.
    if name != "MemformerLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_lm_eval()
    from memformer.lm_eval.backend import MemformerLM

    return MemformerLM
