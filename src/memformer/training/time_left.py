"""Estimate of the remaining time of a run, which includes its evaluations."""

from memformer.training.config import TrainingConfig

# Weight of the earlier updates for each new one. About the last twenty count, so that the estimate follows the load of
# the machine, and an hour in which the computer was asleep is soon forgotten.
_WEIGHT_OF_EARLIER = 0.95


class TimeLeft:
    """Remaining time of a run: updates, periodic evaluations, and the final evaluation on all held-out data.

    Until an evaluation has been timed, reading a held-out token is assumed to take as long as reading one in training.

    Args:
        training: The run's training config.
        periodic_tokens: Tokens of a periodic evaluation.
        final_tokens: Tokens of the final evaluation.
    """

    def __init__(self, training: TrainingConfig, *, periodic_tokens: int, final_tokens: int) -> None:
        self._num_updates = training.num_updates
        self._evaluate_every = training.evaluate_every
        self._periodic_tokens = periodic_tokens
        self._final_tokens = final_tokens
        self._evaluations = 0
        self._timed_updates = 0
        self._updates = self._tokens = self._update_seconds = self._reading_seconds = self._evaluation_seconds = 0.0

    def add_update(self, seconds: float, *, num_tokens: int) -> None:
        """Record the time of an update that read this number of tokens; few of a recall task are predicted.

        The first update counts only until there is a second: it also warms up the device, or compiles the model.
        """
        self._timed_updates += 1
        if self._timed_updates == 2:
            self._updates = self._tokens = self._update_seconds = 0.0
        self._updates = _WEIGHT_OF_EARLIER * self._updates + 1
        self._tokens = _WEIGHT_OF_EARLIER * self._tokens + num_tokens
        self._update_seconds = _WEIGHT_OF_EARLIER * self._update_seconds + seconds

    def add_evaluation(self, seconds: float, *, reading_seconds: float) -> None:
        """Record the time of a periodic evaluation, and how much of it was for reading held-out tokens.

        The rest is for the best weights and the sample, of which the final evaluation has none.
        """
        self._evaluations += 1
        self._evaluation_seconds += seconds
        self._reading_seconds += reading_seconds

    def seconds(self, num_updates: int) -> float:
        """Return the remaining time in seconds after this number of updates, before an evaluation that is due then."""
        if not self._updates:
            return 0.0
        per_update = self._update_seconds / self._updates
        reading = evaluation = self._update_seconds / max(self._tokens, 1) * self._periodic_tokens
        if self._evaluations:
            reading = self._reading_seconds / self._evaluations
            evaluation = self._evaluation_seconds / self._evaluations
        return (
            (self._num_updates - num_updates) * per_update
            + self._num_evaluations_from(num_updates) * evaluation
            + reading * self._final_tokens / self._periodic_tokens
        )

    def _num_evaluations_from(self, num_updates: int) -> int:
        # There is one after every `evaluate_every` updates, and one after the last update.
        return -(-self._num_updates // self._evaluate_every) - (num_updates - 1) // self._evaluate_every
