"""HTML page of an inspection: one file with its data and plotly.js, which needs no network."""

import base64
import json
import math
from typing import Any

import jinja2
import numpy as np

from memformer.errors import InputError
from memformer.evaluation.inspection_results import Array, Inspection
from memformer.utils.words import counted

_LARGEST_WEIGHT = (1 << 16) - 1


def check_can_render() -> None:
    """Check that Plotly is installed, before a long computation.

    Raises:
        InputError: It is not.
    """
    _plotly()


def render_page(inspection: Inspection, *, title: str, source: str) -> str:
    """Return the page as HTML; it is self-contained and requests nothing.

    Args:
        inspection: The data.
        title: Name of the run.
        source: Sentence that says what was read.

    Raises:
        InputError: Plotly is not installed.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("memformer.evaluation"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("inspection.html.jinja").render(
        title=title,
        source=source,
        selection=inspection.selection,
        probes=_describe_probes(inspection),
        totals=_totals(inspection),
        kinds=inspection.kind_rows(),
        data=json_in_html(inspection.to_dict(_packed)),
        plotly=_plotly(),
    )


def json_in_html(value: Any) -> str:
    """Return a value as JSON that can stand in a script element: no text in it can end the element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs  # optional
    except ImportError as error:
        raise InputError("the page needs the extra: pip install 'memformer-lm[inspect]'; --json does not") from error
    return str(get_plotlyjs())


def _packed(array: Array) -> dict[str, Any]:
    """Return weights, from 0 to 1, as 16-bit numbers in base64 with their shape."""
    numbers = (np.clip(array, 0, 1) * _LARGEST_WEIGHT).round().astype("<u2")
    return {"shape": list(array.shape), "data": base64.b64encode(numbers.tobytes()).decode("ascii")}


def _totals(inspection: Inspection) -> list[tuple[str, str, str]]:
    rows = (
        ("with memory", inspection.nll),
        ("memory erased before every segment", inspection.nll_erased),
        ("memory gain (erased minus with memory)", inspection.nll_erased - inspection.nll),
    )
    scale = 1 / (max(1, inspection.num_tokens) * math.log(2))
    return [(label, f"{nats:,.2f}", f"{nats * scale:.4f}") for label, nats in rows]


def _describe_probes(inspection: Inspection) -> str:
    if not inspection.num_probes:
        return "Half-lives were not measured."
    of_slots = (
        "" if inspection.num_probed_slots == len(inspection.slots) else f" of {inspection.num_probed_slots} slots"
    )
    times = counted(inspection.num_probes, "time")
    return f"Half-lives{of_slots} were measured {times}, over at most {inspection.probe_timesteps} timesteps each."
