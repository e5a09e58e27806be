"""Abstract stream of training rollouts, with a cursor that a checkpoint can store."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from memformer.rollout import Rollout


class RolloutStream(Iterator[Rollout]):
    """An iterator over rollouts that are a pure function of a seed and a cursor."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the cursor as JSON values; `load_state` resumes from it."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resume from a cursor that `state` returned.

        Raises:
            CheckpointError: The cursor belongs to another stream or is damaged; this stream's position is unchanged.
        """

    def observe(self, loss: float, *, is_written: Callable[[Tensor], Tensor] | None = None) -> None:
        """Adapt to the model after an update; most streams do not.

        Args:
            loss: Loss of the update, in nats per target token.
            is_written: Returns for segments (B, S) of which the model, as it is now, would write something, (B,).
        """
