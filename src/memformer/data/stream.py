"""What a run trains on: rollouts without end, with a cursor that a checkpoint can hold."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from memformer.rollout import Rollout


class RolloutStream(Iterator[Rollout]):
    """Rollouts that are a pure function of a seed and a cursor."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the cursor, as JSON values, from which `load_state` continues."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where the stream that gave `state` was.

        Raises:
            CheckpointError: It is of another stream, or damaged; the stream stays where it was.
        """

    def observe(self, loss: float) -> None:
        """Note the loss of an update, in nats per target token; documents do not depend on it."""
