"""Config of the Memformer with a classification head."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from memformer.errors import InputError
from memformer.models.config import MemoryEncoderConfig

LabelUnit = Literal["document", "segment"]
Pooling = Literal["mean", "last", "memory"]


@dataclass(frozen=True, kw_only=True)
class MemformerClassificationConfig(MemoryEncoderConfig):
    """Config of a `MemformerForSequenceClassification`: the Memformer's encoder and memory, and no decoder.

    Args:
        num_labels: Number of labels L. Labels are 0 to L-1.
        label_unit: What has a label: "document", after its last segment, or "segment", every segment of a document.
        pooling: What the head reads after a segment. "mean": the mean hidden state of the segment's tokens. "last": the
            hidden state of the last token. "memory": the mean memory slot, after the segment was written to it.

    Raises:
        InputError: A value is out of range, or two values contradict each other.
        InputTypeError: A value has the wrong type.
    """

    model_type: ClassVar[str] = "memformer_classification"

    num_labels: int = 2
    label_unit: LabelUnit = "document"
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integers(num_labels=2)
        if self.pooling == "memory" and not self.num_slots:
            raise InputError("pooling is memory, but num_slots is 0: there is no slot to read")

    @property
    def pooled_width(self) -> int:
        """Width of the state that the head reads: D, or with `pooling: memory` the width W of a slot."""
        return self.memory_width if self.pooling == "memory" else self.d_model
