"""Replay as CUDA graphs: the same gradients as `backpropagate`, without waiting for thousands of launches.

Replay consists of three pieces whose shapes never change: one timestep forward, one timestep again with gradient, and
one chunk of the readout. Each is recorded once as a CUDA graph and launched for every timestep or chunk, for any number
of timesteps. (Full back-propagation through time has no such pieces: its graph grows with the rollout.)

Without recording, the pieces run operation by operation, on any device; so the tests hold the same code to the laws of
replay on a CPU.
"""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memformer.errors import InputError
from memformer.rollout import Rollout
from memformer.training.distributed_tensors import is_sharded
from memformer.training.gradients import Gradients
from memformer.training.pieces import (
    NO_HOOKS,
    RolloutHooks,
    RolloutResult,
    check_arguments,
    check_can_replay,
    check_no_cached_weights,
    prepare,
    trainable,
)
from memformer.training.recorded_replay import RecordedReplay
from memformer.training.replay import backpropagate
from memformer.utils.checks import Integer, Number, check_type
from memformer.utils.cuda_graphs import (
    CannotRecord,
    GraphPool,
    RecordingFailed,
    Work,
    out_of_memory_ends_recording,
)

# Each needs memory for its static tensors and graphs; the shapes of a run's rollouts are few.
MOST_SHAPES = 8
# If the model changes before each of more updates than these, recording costs more than it gains.
MOST_CHANGES_IN_A_ROW = 4


class ReplayEngine:
    """Back-propagates rollouts by replay with recorded pieces.

    What cannot be recorded runs operation by operation, with the same result, and is said once.

    Args:
        model: The model.
        records: Whether to record the pieces as CUDA graphs. None: if the model is on a CUDA device.
        say: Called with a sentence when a piece or a shape is not recorded.

    Raises:
        InputError: `records` is True and the model is not on a CUDA device; or the model is sharded.
        InputTypeError: As `backpropagate`, or `records` is not a bool.
    """

    def __init__(
        self, model: nn.Module, *, records: bool | None = None, say: Callable[[str], object] | None = None
    ) -> None:
        self.model = model = trainable(model)
        is_on_cuda = model.device.type == "cuda"
        if records is not None:
            check_type("records", records, bool)
        self.records = is_on_cuda if records is None else records
        if is_sharded(model):
            raise InputError("the model is sharded, and its pieces cannot be recorded; use backpropagate instead")
        if self.records and not is_on_cuda:
            raise InputError(f"records is True, but the model is on {model.device}; CUDA graphs need a CUDA device")
        self._say = say or (lambda sentence: None)
        self._said: set[str] = set()
        self._modules: tuple[nn.Module, ...] = ()
        self._flags: list[tuple[dict[str, Any], str]] = []
        self._identity: tuple[object, ...] = ()
        self._changes_in_a_row = 0
        self._shapes: dict[_Key, RecordedReplay] = {}
        self._gradients: Gradients | None = None
        self._pool: GraphPool | None = None
        self._has_failed = False

    def backpropagate(
        self,
        rollout: Rollout,
        *,
        memory: Tensor | None = None,
        readout_timesteps: Integer = 1,
        gradient_scale: Number = 1.0,
        hooks: RolloutHooks = NO_HOOKS,
    ) -> RolloutResult:
        """Add the gradient of a rollout's loss to the `.grad` of every parameter; see `training.replay.backpropagate`.

        Arguments and result are those of `backpropagate` with the method "replay". The rollout may be on another
        device than the model, best on the CPU: its masks decide which pieces are launched. The `.grad` of a parameter
        is always the same tensor, or None if the loss does not depend on it.

        Raises:
            InputError: As `backpropagate`.
            InputTypeError: As `backpropagate`.
        """
        model = self.model
        check_no_cached_weights()
        check_can_replay(model)
        readout_timesteps, gradient_scale = check_arguments(
            rollout, readout_timesteps=readout_timesteps, gradient_scale=gradient_scale
        )
        options: dict[str, Any] = {
            "readout_timesteps": readout_timesteps,
            "gradient_scale": gradient_scale,
            "hooks": hooks,
        }
        if self._has_failed:
            return backpropagate(model, rollout.to(model.device), memory=memory, **options)
        self._changes_in_a_row = self._changes_in_a_row + 1 if self._has_changed() else 0
        if self._changes_in_a_row > MOST_CHANGES_IN_A_ROW:
            self._give_up("the model has changed before each of the last updates (a flag, a fraction or a hook)")
            return backpropagate(model, rollout.to(model.device), memory=memory, **options)
        if self._changes_in_a_row:
            self._forget()
        aligned, entering = prepare(model, rollout, memory, hooks=hooks)
        key = _Key(
            aligned.batch_size,
            aligned.inputs.shape[2],
            aligned.targets.shape[2],
            aligned.decoder_start_ids is not None,
            aligned.is_filler is not None,
            torch.is_autocast_enabled(model.device.type),
            torch.get_autocast_dtype(model.device.type),
            torch.backends.cuda.matmul.fp32_precision,  # also as set by torch.set_float32_matmul_precision
        )
        if not self._is_usable(key):
            return backpropagate(model, rollout.to(model.device), memory=memory, **options)
        try:
            return self._replay_of(key, aligned, entering).run(aligned, entering, **options)
        except RecordingFailed as error:
            reason = str(error)
        except BaseException:
            self._forget()  # its tensors and counters are those of an unfinished rollout
            raise
        # All pieces are recorded before the first one runs, so nothing has been computed yet. Here, because an error
        # holds what was allocated until it is handled, and what failed may have been memory.
        self._give_up(reason)
        return backpropagate(model, rollout.to(model.device), memory=memory, **options)

    def _give_up(self, reason: str) -> None:
        """Free everything, and compute all later rollouts without graphs."""
        self._has_failed = True
        if self._gradients is not None:
            self._gradients.reached = set()
            self._gradients.detach_unreached()
        self._shapes, self._gradients, self._pool = {}, None, None
        gc.collect()  # pieces that were not recorded refer to their owner
        self._say_once(f"recording CUDA graphs failed; training goes on without them: {reason}")

    def _replay_of(self, key: "_Key", rollout: Rollout, memory: Tensor) -> RecordedReplay:
        """Return the pieces for rollouts of this shape; they are recorded anew for a longer rollout than before.

        Raises:
            RecordingFailed: The device has too little memory.
        """
        capacity = rollout.num_timesteps
        replay = self._shapes.get(key)
        if replay is not None and replay.capacity >= capacity:
            return replay
        if replay is not None:
            # At least twice as long: if every rollout is longer than the last, few of them are recorded.
            capacity = max(capacity, 2 * replay.capacity)
            replay = None
            del self._shapes[key]  # its memory is free before the next is allocated
            if not self._shapes:
                # A pool without graphs cannot be used again while something else is still allocated in it.
                self._pool = self._new_pool()
        with out_of_memory_ends_recording():
            if self._gradients is None:
                self._gradients = Gradients(self.model)
            replay = self._shapes[key] = RecordedReplay(
                self.model, rollout, memory, self._gradients, capacity=capacity, record=self._record
            )
        return replay

    def _is_usable(self, key: "_Key") -> bool:
        if key in self._shapes or len(self._shapes) < MOST_SHAPES:
            return True
        self._say_once(
            f"rollouts have more than {MOST_SHAPES} different shapes; those after the first {MOST_SHAPES} are "
            "computed without CUDA graphs"
        )
        return False

    def _has_changed(self) -> bool:
        """Return whether the pieces must be recorded anew.

        The model has other parameters or modules, these have other modes, flags, fractions (such as a probability of
        dropout) or forward hooks, or a recording has failed elsewhere, after which dropout of earlier graphs is wrong.
        """
        modules = tuple(self.model.modules())
        if modules != self._modules:
            self._modules = modules
            self._flags = [
                (vars(module), name)
                for module in modules
                for name, value in vars(module).items()
                if isinstance(value, (bool, float))
            ]
        identity = (
            modules,
            tuple((p.data_ptr(), p.requires_grad) for p in self.model.parameters()),
            tuple(owner.get(name) for owner, name in self._flags),
            tuple(hook for module in modules for hook in module._forward_pre_hooks.values()),
            tuple(hook for module in modules for hook in module._forward_hooks.values()),
            GraphPool.num_failures,
        )
        changed = identity != self._identity
        self._identity = identity
        return changed

    def _forget(self) -> None:
        self._shapes = {}
        self._gradients = None
        self._pool = self._new_pool()

    def _new_pool(self) -> GraphPool | None:
        return GraphPool(self.model.device) if self.records and self.model.device.type == "cuda" else None

    def _record(self, work: Work, before: Work, name: str) -> Work:
        if self._pool is None:
            return work
        try:
            return self._pool.record(work, before=before)
        except CannotRecord as error:
            self._say_once(f"{name} cannot become a CUDA graph and runs operation by operation: {error}")
            return work

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self._say(sentence)


class _Key(NamedTuple):
    """Shapes and modes for which one set of static tensors and graphs is used."""

    batch_size: int
    input_length: int
    target_length: int
    has_starts: bool
    knows_filler: bool
    is_autocast: bool
    autocast_dtype: torch.dtype
    float32_precision: str
