"""The training loop: rollouts in, updates out, with everything needed to stop and go on at any update."""

import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from memformer.data import save_tokenizer
from memformer.errors import CheckpointError, InputError
from memformer.evaluation.likelihood import Result
from memformer.models import LanguageModel, Memformer, load_model
from memformer.rollout import Rollout
from memformer.training.checkpoint import (
    TrainingState,
    canonical,
    checkpoint_name,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from memformer.training.config import RunConfig
from memformer.training.logs import LoggedValues, NoLog, RunLog
from memformer.training.optimizer import clip_gradients, learning_rate_at, make_optimizer, write_price_at
from memformer.training.processes import Processes
from memformer.training.replay import RolloutResult, backpropagate
from memformer.training.run_data import RunData
from memformer.training.run_folder import BEST, CHECKPOINTS, RESULT_FILE, SAMPLES, newest_checkpoint
from memformer.training.samples import write_sample
from memformer.training.sharding import (
    free_weights,
    gather_model,
    is_sharded,
    pile_up_gradients,
    save_moments,
    shard,
    sum_gradients_in_next_backward,
)
from memformer.utils.files import write_json
from memformer.utils.machine import peak_memory_bytes
from memformer.utils.progress import print_warning
from memformer.utils.signals import Interrupted, signals_noted

# Updates that the running mean of the loss goes back, about.
_UPDATES_OF_MEAN = 100
_NOTHING_SKIPPED = {"num_skipped": 0, "num_skipped_in_a_row": 0, "mean_loss": 0.0, "num_in_mean": 0}


def train(
    config: RunConfig, data: RunData, model: LanguageModel, *, resume: bool = False, processes: Processes | None = None
) -> Result | None:
    """Train to the end of the run; return the evaluation of the best weights on all that is held out.

    Of several processes only the first one evaluates; the others return None.

    Args:
        config: The run.
        data: What it trains and is evaluated on.
        model: Fresh weights (replaced when resuming), on the run's device.
        resume: Go on from the newest whole checkpoint in the run folder.
        processes: Those that train together; None for this one alone.

    Raises:
        InputError: In too many updates in a row loss or gradient is not finite, or the data does not fit the model.
        CheckpointError: There is nothing to resume from, or it is of another run.
        SaveError: A checkpoint cannot be written.
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint was saved.
    """
    return _Trainer(config, data, model, resume=resume, processes=processes or Processes()).run()


class _Trainer:
    def __init__(
        self, config: RunConfig, data: RunData, model: LanguageModel, *, resume: bool, processes: Processes
    ) -> None:
        if processes.count > 1 and config.training.write_price:
            raise InputError("training.write_price needs the loss of all lanes at once: train in one process")
        self.config = config
        self.processes = processes
        self.lanes = processes.lanes_of(config.training.num_lanes)
        self.all_stop = False
        self.folder = Path(config.folder)
        self.data = data
        self.model = model
        self.stream = data.make_stream(model, config)
        memory = model.initial_memory(config.training.num_lanes).detach().clone()
        if processes.count > 1 and config.training.sharding != "none":
            assert isinstance(model, Memformer)  # the config sees to it
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
                "num_processes": processes.count,
                **_NOTHING_SKIPPED,
            },
        )
        if processes.rank:
            # The weights are everybody's; what dropout draws is not.
            torch.manual_seed(config.seed + processes.rank)
        self.resumed_from = self._resume() if resume else None
        self.state.memory = self.state.memory[self.lanes]
        if config.training.compiled:
            assert isinstance(model, Memformer)
            model.compile()

    @property
    def num_updates(self) -> int:
        """Updates done."""
        num_updates: int = self.state.progress["num_updates"]
        return num_updates

    def _resume(self) -> Path:
        checkpoint = newest_checkpoint(self.folder, warn=print_warning)
        load_checkpoint(checkpoint, self.state, rank=self.processes.rank)
        before = self.state.progress.get("num_processes", 1)
        if before != self.processes.count and self.processes.is_first:
            print_warning(
                f"the run had {before} processes and goes on with {self.processes.count}: lanes are shared out anew, "
                "weights, memory and documents go on exactly; what dropout draws does not"
            )
        self.state.progress["num_processes"] = self.processes.count
        self.state.progress = {**_NOTHING_SKIPPED, **self.state.progress}  # of a run begun before updates were skipped
        self.stream.load_state(self.state.progress["stream"])
        return checkpoint

    def run(self) -> Result | None:
        training = self.config.training
        progress = self.state.progress
        make_log = RunLog if self.processes.is_first else NoLog
        with make_log(self.folder, total_updates=training.num_updates, num_updates=self.num_updates) as log:
            if self.resumed_from is not None:
                log.say(f"going on from {self.resumed_from}, update {self.num_updates}")
                if self.num_updates >= training.num_updates:
                    log.say(f"training.num_updates ({training.num_updates}) is reached: nothing is left to train")
            if training.num_updates <= training.warmup_updates:
                log.say(
                    f"training.warmup_updates ({training.warmup_updates}) is not below training.num_updates "
                    f"({training.num_updates}): the learning rate never gets to its full height"
                )
            with signals_noted() as signals:
                while self.num_updates < training.num_updates:
                    started = time.monotonic()
                    values = self._update(log, signals.received)
                    progress["num_updates"] += 1
                    progress["seconds"] += time.monotonic() - started
                    log.advance(self.num_updates)
                    is_last = self.num_updates == training.num_updates
                    if values is not None and (is_last or self.num_updates % training.log_every == 0):
                        values["tokens_per_second"] = progress["num_tokens"] / progress["seconds"]
                        values["seconds"] = progress["seconds"]
                        values["num_tokens"] = progress["num_tokens"]
                        values["peak_memory_bytes"] = peak_memory_bytes(self.model.device)
                        log.update(self.num_updates, values)
                    if is_last or self.num_updates % training.evaluate_every == 0:
                        whole = self._whole_model()
                        if whole is not None:
                            self._evaluate(whole, log)
                        self.processes.wait_for_all()
                    # Several processes stop together: by what all of them knew in the update.
                    stops = bool(signals.received) if self.processes.count == 1 else self.all_stop
                    if is_last or stops or self.num_updates % training.save_every == 0:
                        # First the log: a run that goes on from the checkpoint does not make its lines again.
                        log.flush()
                        checkpoint = self._save()
                        if stops:
                            number = signals.received[0] if signals.received else signal.SIGTERM
                            raise Interrupted(number, f"go on with --resume from {checkpoint}")
            # Everything is saved: from here on an interrupt may act at once, and --resume comes back here.
            return self._conclude(log) if self.processes.is_first else None

    def _update(self, log: RunLog, received: list[int]) -> LoggedValues | None:
        """Make one optimizer step and return what to log about it; None if it was skipped or nothing was to predict.

        Raises:
            InputError: Too many updates in a row were skipped.
        """
        training, model = self.config.training, self.model
        rollouts = [next(self.stream) for _ in range(training.rollouts_per_update)]
        learning_rate = learning_rate_at(self.num_updates, training)
        for group in self.state.optimizer.param_groups:
            group["lr"] = learning_rate
        num_tokens = [rollout.count_target_tokens() for rollout in rollouts]
        total = sum(num_tokens)
        model.train()
        nats = 0.0
        pile_up_gradients(model)
        for number, rollout in enumerate(rollouts, start=1):
            own = rollout if self.processes.count == 1 else rollout.select_rows(self.lanes)
            count = own.count_target_tokens()
            is_last = number == len(rollouts)
            share = count / max(total, 1)
            result = self._backpropagate(own.to(model.device), gradient_scale=share, is_last=is_last)
            nats += float(result.loss) * count
        free_weights(model)
        squares = result.memory_grad_norms.double().square().tolist()
        nats, num_signals, *squares = self.processes.sum_up(model, [nats, float(len(received)), *squares])
        self.all_stop = num_signals > 0
        if total == 0:
            # A part of a recall episode may ask nothing: the memory has moved on, and there is nothing to learn.
            self.state.optimizer.zero_grad(set_to_none=True)
            return None
        loss = nats / total
        limit = training.max_gradient_norm or math.inf
        gradient_norm = clip_gradients(model, limit)
        reason = self._reason_to_skip(loss, gradient_norm)
        if reason is None:
            self.state.optimizer.step()
            self.state.progress["num_tokens"] += total
            self.stream.observe(loss)
        self.state.optimizer.zero_grad(set_to_none=True)
        self._count(loss, reason, log)
        if reason is not None:
            return None
        return {
            "bits_per_token": loss / math.log(2),
            "gradient_norm": gradient_norm,
            "learning_rate": learning_rate,
            # Of the last rollout of the update: how far back in time gradient reaches.
            "memory_gradient_norms": [math.sqrt(square) for square in squares],
        }

    def _reason_to_skip(self, loss: float, gradient_norm: float) -> str | None:
        """Return what is wrong with an update, if anything is."""
        if not math.isfinite(loss) or not math.isfinite(gradient_norm):
            return f"loss {loss} nats per token, gradient norm {gradient_norm}; both must be finite"
        factor, mean = self.config.training.skip_above, self.state.progress["mean_loss"]
        is_settled = self.state.progress["num_in_mean"] >= _UPDATES_OF_MEAN
        if factor is not None and is_settled and loss > factor * mean:
            return f"loss {loss:.4g} nats per token is more than {factor} times the running mean, {mean:.4g}"
        return None

    def _count(self, loss: float, reason: str | None, log: RunLog) -> None:
        """Note that an update was made or, for a reason, skipped.

        Raises:
            InputError: Too many in a row were skipped.
        """
        progress, number = self.state.progress, self.num_updates + 1
        if reason is None:
            progress["num_skipped_in_a_row"] = 0
            progress["num_in_mean"] += 1
            progress["mean_loss"] += (loss - progress["mean_loss"]) / min(progress["num_in_mean"], _UPDATES_OF_MEAN)
            return
        progress["num_skipped"] += 1
        progress["num_skipped_in_a_row"] += 1
        if progress["num_skipped_in_a_row"] > self.config.training.max_skipped_in_a_row:
            raise InputError(
                f"update {number}: {reason}. {progress['num_skipped_in_a_row']} updates in a row were as bad (the run "
                f"allows {self.config.training.max_skipped_in_a_row}) and changed no weights. Try a lower "
                "training.learning_rate, then --resume"
            )
        log.skipped(number, reason, num_skipped=progress["num_skipped"])

    def _backpropagate(self, rollout: Rollout, *, gradient_scale: float, is_last: bool) -> RolloutResult:
        """Add a rollout's gradient, and move the memory on."""
        training = self.config.training
        with torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=training.precision == "bfloat16"):
            result = backpropagate(
                self.model,
                rollout,
                memory=self.state.memory,
                method=training.method,
                readout_timesteps=training.readout_timesteps,
                gradient_scale=gradient_scale,
                write_price=write_price_at(self.num_updates, training),
                write_price_below=math.inf if training.write_price_below is None else training.write_price_below,
                before_last_backward=partial(sum_gradients_in_next_backward, self.model) if is_last else None,
            )
        # A lane whose memory broke goes on with the one before; the others do not notice.
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
        moments = None
        if is_sharded(self.model):
            moments = checkpoint.with_name(f".{checkpoint.name}.moments")
            save_moments(moments, self.model, self.state.optimizer)
        model = self._whole_model()
        if model is not None:
            whole = dataclasses.replace(self.state, model=model, memory=memory)
            save_checkpoint(checkpoint, whole, randomness=randomness, moments=moments)
            prune_checkpoints(checkpoint, keep=self.config.training.keep_checkpoints)
        processes.wait_for_all()
        return checkpoint

    def _whole_model(self) -> LanguageModel | None:
        """Return the model with all its weights in the first process, None in the others; all must call it."""
        if is_sharded(self.model):
            return gather_model(self.model)
        return self.model if self.processes.is_first else None

    def _evaluate(self, model: LanguageModel, log: RunLog) -> None:
        """Evaluate on some of what is held out, keep the weights if they are the best so far, write a sample."""
        result = self.data.evaluate(model, self.config.training, is_final=False)
        log.evaluation(self.num_updates, result)
        best = self.state.progress["best_score"]
        # Of equals the later: where every answer is right the score says no more, and training went on.
        if best is None or not math.isfinite(best) or result.score <= best:
            self.state.progress["best_score"] = result.score
            model.save_pretrained(self.folder / BEST)
            # So that this folder alone is a model to give away.
            save_tokenizer(self.data.tokenizer, self.folder / BEST)
        sample = write_sample(
            model,
            self.data.tokenizer,
            self.folder / SAMPLES / f"update-{self.num_updates:09d}",
            num_tokens=self.config.training.sample_tokens,
            seed=self.config.seed,
        )
        if sample is not None:
            log.sample(self.num_updates, sample)
        log.flush()

    def _conclude(self, log: RunLog) -> Result:
        """Evaluate the best weights on all that is held out."""
        log.say("evaluating the best weights on all that is held out")
        best = load_model(self.folder / BEST, device=self.model.device)
        result = self.data.evaluate(best, self.config.training, is_final=True)
        write_json(self.folder / RESULT_FILE, result.to_dict())
        return result


def check_same_run(saved: dict[str, Any], config: RunConfig) -> None:
    """Check that a run can go on under a config: the model, the data and the seed must be those it began with.

    Raises:
        CheckpointError: They are not; the message names the first difference.
    """
    asked = canonical(config.to_dict())
    fixed = ["seed", "model_type", "model", "data"]
    lanes = ("num_lanes",)
    for key, before, now in _differences(saved, asked):
        top, _, rest = key.partition(".")
        if (top in fixed and key != "data.cache") or (top == "training" and rest in lanes):
            raise CheckpointError(
                f"the run began with {key}: {before}, now it is {now}; it cannot go on as the same run"
            )


def _differences(saved: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(saved.keys() | asked.keys(), key=str):  # a key of YAML may be a number
        before, now = saved.get(key), asked.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, prefix=f"{prefix}{key}.")
        elif before != now:
            yield f"{prefix}{key}", before, now
