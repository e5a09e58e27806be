"""The training loop: updates, logging, evaluation and checkpoints; a run can be stopped and resumed at any update."""

import dataclasses
import math
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from memformer.errors import CheckpointError, InputError
from memformer.evaluation.likelihood import Result
from memformer.models import LanguageModel, Memformer, load_model
from memformer.rollout import Rollout
from memformer.training.best_weights import forget_best, save_if_best
from memformer.training.checkpoint import (
    TrainingState,
    checkpoint_name,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from memformer.training.config import RunConfig
from memformer.training.distributed_tensors import is_sharded
from memformer.training.engine import ReplayEngine
from memformer.training.logs import LoggedValues, RunLog, open_log
from memformer.training.mining import check_mining, is_written
from memformer.training.optimizer import clip_gradients, learning_rate_at, make_optimizer, writer_weights
from memformer.training.processes import Processes, check_processes
from memformer.training.replay import RolloutHooks, RolloutResult, backpropagate
from memformer.training.run_data import RunData
from memformer.training.run_folder import BEST, CHECKPOINTS, RESULT_FILE, SAMPLES, newest_checkpoint
from memformer.training.samples import write_sample
from memformer.training.sharding import (
    disable_gradient_sync,
    gather_model,
    reshard,
    save_optimizer_state,
    shard,
    sum_gradients_in_next_backward,
)
from memformer.training.time_left import TimeLeft
from memformer.utils.files import user_path, write_json
from memformer.utils.machine import device_memory_explained, peak_memory_bytes
from memformer.utils.progress import ProgressBar, print_warning
from memformer.utils.signals import Interrupted, signals_noted

_MEMORY_EXPLAINED = partial(
    device_memory_explained,
    "Lower training.readout_timesteps first, then training.num_lanes or training.rollout_length",
)
_NOTHING_SKIPPED = {"num_skipped": 0, "num_skipped_in_a_row": 0}


def train(
    config: RunConfig, data: RunData, model: LanguageModel, *, resume: bool = False, processes: Processes | None = None
) -> Result | None:
    """Train to the end of the run; return the evaluation of the best weights on all held-out data.

    With several processes, only the first one evaluates; the others return None.

    Args:
        config: The run config.
        data: The training and held-out data.
        model: The model on the run's device, with initial weights; they are replaced when resuming.
        resume: Whether to continue from the newest undamaged checkpoint in the run folder.
        processes: The processes that train together. None: this process only.

    Raises:
        InputError: Too many consecutive updates had a loss or gradient that is not finite, the data does not fit the
            model, or the device has too little memory.
        CheckpointError: There is no undamaged checkpoint to resume from, or it belongs to another run.
        SaveError: A checkpoint cannot be written.
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint was saved.
    """
    with _MEMORY_EXPLAINED():
        return _Trainer(config, data, model, resume=resume, processes=processes or Processes()).run()


class _Trainer:
    def __init__(
        self, config: RunConfig, data: RunData, model: LanguageModel, *, resume: bool, processes: Processes
    ) -> None:
        check_processes(config, processes)
        check_mining(config, model)
        self.config, self.processes = config, processes
        self.lanes = processes.lanes_of(config.training.num_lanes)
        self.all_stop = False
        self.folder = user_path(config.folder)
        self.data, self.model = data, model
        self.stream = data.make_stream(model, config)
        self.time_left = TimeLeft(
            config.training,
            periodic_tokens=data.evaluation_tokens(model, config.training, is_final=False),
            final_tokens=data.evaluation_tokens(model, config.training, is_final=True),
        )
        memory = model.initial_memory(config.training.num_lanes).detach().clone()
        if processes.count > 1 and config.training.sharding != "none":
            assert isinstance(model, Memformer)  # checked by RunConfig
            shard(model, frees_weights=config.training.sharding == "weights")
        self.state = TrainingState(
            model=model,
            optimizer=make_optimizer(model, config.training),
            memory=memory,
            progress={
                "num_updates": 0,
                "num_tokens": 0,
                "seconds": 0.0,
                "best_score": None,
                "evaluation_tokens": config.training.evaluation_tokens,
                "num_processes": processes.count,
                **_NOTHING_SKIPPED,
            },
        )
        if processes.rank:
            # All processes start from the same weights, but draw different dropout masks.
            torch.manual_seed(config.seed + processes.rank)
        self.resumed_from = self._resume() if resume else None
        self.newest_checkpoint, self.made_update_since_checkpoint = self.resumed_from, False
        self.state.memory = self.state.memory[self.lanes]
        if config.training.compiled:
            assert isinstance(model, Memformer)
            model.compile()
        self.engine = self._make_engine()

    def _make_engine(self) -> ReplayEngine | None:
        """Return the engine that launches replay as CUDA graphs; None if it runs operation by operation."""
        training, device = self.config.training, self.model.device
        training.check_device(device)
        suits = device.type == "cuda" and training.method == "replay" and training.sharding == "none"
        return ReplayEngine(self.model, say=print_warning) if suits and training.engine != "eager" else None

    @property
    def num_updates(self) -> int:
        """Number of completed updates."""
        num_updates: int = self.state.progress["num_updates"]
        return num_updates

    def _resume(self) -> Path:
        checkpoint = newest_checkpoint(self.folder, warn=print_warning)
        load_checkpoint(checkpoint, self.state, rank=self.processes.rank)
        before = self.state.progress.get("num_processes", 1)
        if before != self.processes.count and self.processes.is_first:
            print_warning(
                f"the run had {before} processes and resumes with {self.processes.count}: lanes are redistributed; "
                "weights, memory and documents continue exactly, dropout masks do not"
            )
        # Old checkpoints lack the counters.
        self.state.progress = {**_NOTHING_SKIPPED, **self.state.progress, "num_processes": self.processes.count}
        num_read = partial(self.data.evaluation_tokens, self.model, is_final=False)
        warning = forget_best(self.folder, self.state.progress, self.config.training, num_read)
        if warning and self.processes.is_first:
            print_warning(warning)
        self.stream.load_state(self.state.progress["stream"])
        return checkpoint

    def run(self) -> Result | None:
        training = self.config.training
        progress = self.state.progress
        with self._open_log() as log:
            if self.resumed_from is not None:
                log.say(f"resuming from {self.resumed_from}, update {self.num_updates}")
                if self.num_updates >= training.num_updates:
                    log.say(f"training.num_updates ({training.num_updates}) is reached: nothing is left to train")
            if self.engine is not None:
                log.say("replay runs as CUDA graphs (training.engine)")
            if training.num_updates < training.warmup_updates:
                log.say(
                    f"training.warmup_updates ({training.warmup_updates}) is above training.num_updates "
                    f"({training.num_updates}): the learning rate does not reach its peak before the end"
                )
            if self.processes.is_first and self.num_updates < training.num_updates:
                # The run is not finished, and its best weights may change.
                (self.folder / RESULT_FILE).unlink(missing_ok=True)
            with signals_noted() as signals:
                while self.num_updates < training.num_updates:
                    started = time.monotonic()
                    values = self._update(log, signals.received)
                    progress["num_updates"] += 1
                    seconds = time.monotonic() - started
                    progress["seconds"] += seconds
                    self.time_left.add_update(seconds, num_tokens=self.num_read_tokens)
                    is_last = self.num_updates == training.num_updates
                    if values is not None and (is_last or self.num_updates % training.log_every == 0):
                        values["tokens_per_second"] = progress["num_tokens"] / progress["seconds"]
                        values.update(seconds=progress["seconds"], num_tokens=progress["num_tokens"])
                        values["peak_memory_bytes"] = peak_memory_bytes(self.model.device)
                        log.update(self.num_updates, values)
                    log.advance(self.num_updates, seconds_left=self.time_left.seconds(self.num_updates))
                    if is_last or self.num_updates % training.evaluate_every == 0:
                        whole, started = self._whole_model(), time.monotonic()
                        if whole is not None:
                            reading_seconds = self._evaluate(whole, log)
                            seconds = time.monotonic() - started
                            self.time_left.add_evaluation(seconds, reading_seconds=reading_seconds)
                        self.processes.wait_for_all()
                    # All ranks stop together, using the signal count summed over processes in this update.
                    stops = bool(signals.received) if self.processes.count == 1 else self.all_stop
                    # After a skipped update the weights may be broken; they must not replace a good checkpoint.
                    is_due = self.num_updates % training.save_every == 0 and not progress["num_skipped_in_a_row"]
                    if is_last or stops or is_due:
                        # Flush the log first: a run resumed from this checkpoint does not repeat the earlier log lines.
                        log.flush()
                        checkpoint = self._save()
                        if stops:
                            number = signals.received[0] if signals.received else signal.SIGTERM
                            raise Interrupted(number, f"continue with --resume from {checkpoint}")
            # All training state is saved, so a signal may stop the process at once here; --resume repeats this part.
            return self._conclude(log) if self.processes.is_first else None

    def _open_log(self) -> RunLog:
        if not self.processes.is_first:
            return RunLog()
        total, done = self.config.training.num_updates, self.num_updates
        return open_log(self.folder, total_updates=total, num_updates=done, config=self.config)

    def _update(self, log: RunLog, received: list[int]) -> LoggedValues | None:
        """Make one optimizer step and return its log values; None if it was skipped or there were no targets.

        Raises:
            InputError: Too many consecutive updates were skipped.
        """
        training, model = self.config.training, self.model
        rollouts = [next(self.stream) for _ in range(training.rollouts_per_update)]
        learning_rate = learning_rate_at(self.num_updates, training)
        for group in self.state.optimizer.param_groups:
            group["lr"] = learning_rate
        self.num_read_tokens = sum(rollout.count_input_tokens() for rollout in rollouts)
        total = sum(rollout.count_target_tokens() for rollout in rollouts)
        model.train()
        nll = 0.0
        disable_gradient_sync(model)
        for number, rollout in enumerate(rollouts, start=1):
            own = rollout if self.processes.count == 1 else rollout.select_rows(self.lanes)
            count = own.count_target_tokens()
            is_last = number == len(rollouts)
            share = count / max(total, 1)
            result = self._backpropagate(own, gradient_scale=share, is_last=is_last)
            nll += float(result.loss) * count
        reshard(model)
        squares = result.memory_grad_norms.double().square().tolist()
        nll, num_signals, *squares = self.processes.sum_up(model, [nll, float(len(received)), *squares])
        self.all_stop = num_signals > 0
        if total == 0:
            # A rollout of a recall episode may contain no question. Its memory is carried on, but there is no gradient.
            self.state.optimizer.zero_grad(set_to_none=True)
            return None
        loss = nll / total
        gradient_norm = clip_gradients(model, training.max_gradient_norm)
        reason = None
        if not math.isfinite(loss + gradient_norm):
            reason = f"loss {loss} nats per token, gradient norm {gradient_norm}; both must be finite"
        if reason is None:
            self.state.optimizer.step()
            self.state.progress["num_tokens"] += total
            self.stream.observe(loss, is_written=partial(is_written, self.model, self.state.memory))
        self.state.optimizer.zero_grad(set_to_none=True)
        self._count(reason, log)
        if reason is not None:
            return None
        return {
            "bits_per_token": loss / math.log(2),
            "gradient_norm": gradient_norm,
            "learning_rate": learning_rate,
            # From the last rollout of the update; they show how far back in time gradients reach.
            "memory_gradient_norms": [math.sqrt(square) for square in squares],
        }

    def _count(self, reason: str | None, log: RunLog) -> None:
        """Update the counters of skipped updates; `reason` is None if the update was made.

        Raises:
            InputError: Too many consecutive updates were skipped.
        """
        progress, number = self.state.progress, self.num_updates + 1
        if reason is None:
            progress["num_skipped_in_a_row"] = 0
            self.made_update_since_checkpoint = True
            return
        progress["num_skipped"] += 1
        progress["num_skipped_in_a_row"] += 1
        if progress["num_skipped_in_a_row"] > self.config.training.max_skipped_in_a_row:
            raise InputError(
                f"update {number}: {reason}. {progress['num_skipped_in_a_row']} updates in a row were skipped "
                f"and changed no weights (training.max_skipped_in_a_row is "
                f"{self.config.training.max_skipped_in_a_row}). {self._advice_on_broken_weights()}"
            )
        log.skipped(number, reason, num_skipped=progress["num_skipped"])

    def _advice_on_broken_weights(self) -> str:
        if self.newest_checkpoint is None:
            return "No checkpoint was saved; run the command again with a lower training.learning_rate"
        if self.made_update_since_checkpoint:
            return f"Continue from {self.newest_checkpoint} with --resume and a lower training.learning_rate"
        return (
            f"No update was made after {self.newest_checkpoint} either; start a new run with another --folder and a "
            "lower training.learning_rate"
        )

    def _backpropagate(self, rollout: Rollout, *, gradient_scale: float, is_last: bool) -> RolloutResult:
        """Add the gradients of a rollout and carry the memory on."""
        training = self.config.training
        is_mixed = training.precision == "bfloat16"
        with torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=is_mixed):
            options: dict[str, Any] = {
                "memory": self.state.memory,
                "readout_timesteps": training.readout_timesteps,
                "gradient_scale": gradient_scale,
                "hooks": RolloutHooks(
                    **writer_weights(self.num_updates, self.config, num_processes=self.processes.count),
                    before_last_backward=partial(sum_gradients_in_next_backward, self.model) if is_last else None,
                ),
            }
            if self.engine is not None:
                result = self.engine.backpropagate(rollout, **options)
            else:
                result = backpropagate(self.model, rollout.to(self.model.device), method=training.method, **options)
        # A lane whose new memory is not finite keeps its previous memory; other lanes are not affected.
        is_finite = result.memory.isfinite().all(dim=-1).all(dim=-1)
        self.state.memory = torch.where(is_finite[:, None, None], result.memory, self.state.memory)
        return result

    def _save(self) -> Path:
        processes = self.processes
        self.state.progress["stream"] = self.stream.state()
        checkpoint = self.folder / CHECKPOINTS / checkpoint_name(self.num_updates)
        processes.check_agreement(self.model)
        memory = processes.gather_lanes(self.state.memory)
        randomness = processes.gather_randomness(self.model.device)
        optimizer_state = None
        if is_sharded(self.model):
            optimizer_state = checkpoint.with_name(f".{checkpoint.name}.optimizer_state")
            save_optimizer_state(optimizer_state, self.model, self.state.optimizer)
        model = self._whole_model()
        if model is not None:
            whole = dataclasses.replace(self.state, model=model, memory=memory)
            save_checkpoint(checkpoint, whole, randomness=randomness, optimizer_state=optimizer_state)
            # After skipped updates the weights may be broken: older checkpoints are kept as well.
            if not self.state.progress["num_skipped_in_a_row"]:
                prune_checkpoints(checkpoint, keep=self.config.training.keep_checkpoints)
        processes.wait_for_all()
        self.newest_checkpoint, self.made_update_since_checkpoint = checkpoint, False
        return checkpoint

    def _whole_model(self) -> LanguageModel | None:
        """Return the unsharded model in the first process, None in the others; all processes must call this."""
        if is_sharded(self.model):
            return gather_model(self.model)
        return self.model if self.processes.is_first else None

    def _evaluate(self, model: LanguageModel, log: RunLog) -> float:
        """Evaluate on a part of the held-out data, save the weights if they are the best so far, write a sample.

        The seconds that the evaluation itself took are returned.

        Raises:
            InputError: The weights are broken.
        """
        started = time.monotonic()
        try:
            result = self.data.evaluate(model, self.config.training, is_final=False)
        except InputError as error:
            raise InputError(f"update {self.num_updates}: {error}. {self._advice_on_broken_weights()}") from error
        seconds = time.monotonic() - started
        log.evaluation(self.num_updates, result)
        save_if_best(self.folder, model, self.data.tokenizer, result, progress=self.state.progress)
        sample = write_sample(
            model,
            self.data.tokenizer,
            self.folder / SAMPLES / checkpoint_name(self.num_updates),
            num_tokens=self.config.training.sample_tokens,
            seed=self.config.seed,
        )
        if sample is not None:
            log.sample(self.num_updates, sample)
        log.flush()
        return seconds

    def _conclude(self, log: RunLog) -> Result:
        """Evaluate the best weights on all held-out data.

        Raises:
            CheckpointError: They were deleted.
        """
        log.say("evaluating the best weights on all held-out data")
        log.end_updates()
        if not (self.folder / BEST).exists():
            raise CheckpointError(
                f"{self.folder / BEST} is missing, so there are no best weights to evaluate; with a higher "
                "training.num_updates, the run chooses them again"
            )
        best = load_model(self.folder / BEST, device=self.model.device)
        total = self.data.evaluation_tokens(best, self.config.training, is_final=True)
        with ProgressBar("evaluating", total, unit="token") as progress:
            result = self.data.evaluate(best, self.config.training, is_final=True, progress=progress.advance_to)
        write_json(self.folder / RESULT_FILE, result.to_dict())
        return result
