"""Optimizers with weight decay on matrices only, and the schedules of the learning rate and of the writer's losses."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, overload

import torch
from torch import nn

from memformer.training.config import RunConfig, TrainingConfig
from memformer.training.distributed_tensors import gathered

# The write penalty applies to rollouts with a loss below this, in nats per token: the model has then learned to write.
# Of the thresholds tried (0.01, 0.1, none), this one kept facts in the memory and filler out of it; see
# "A penalty on writing" in experiments/RETENTION.md.
LEARNED_LOSS = 0.1

# The shortfall applies to rollouts with a loss of this or more, in nats per token: there a writer that writes nothing
# has to learn to write again. Without it, some seeds stop writing within 70 updates and stay at chance; applied down to
# `LEARNED_LOSS`, it teaches to write more filler. See "Writers that stop writing" in experiments/RETENTION.md.
HARDLY_LEARNED_LOSS = 1.0
SHORTFALL_WEIGHT = 1.0


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for all other parameters, with one learning rate and one state.

    Muon (`torch.optim.Muon`) makes the singular values of a matrix's step nearly equal. Its steps are scaled to the
    usual size of AdamW's, a fifth of the learning rate and more, so that AdamW's learning rates can be used.

    Args:
        matrices: The matrices that multiply activations.
        groups: Parameter groups of AdamW, with their weight decay.
        config: The training config.
    """

    def __init__(self, matrices: list[nn.Parameter], groups: list[dict[str, Any]], config: TrainingConfig) -> None:
        self._muon = torch.optim.Muon(
            matrices, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], self._adamw.defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: also the two optimizers."""
        return {**super().__getstate__(), "_muon": self._muon, "_adamw": self._adamw}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step of both; return the loss of the closure, which is called before, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.state = self._adamw.state = self.state
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.step()
        self._adamw.step()
        return loss


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a model, without weight decay on embeddings, norms, biases and forgetting vectors."""
    embedded = {id(parameter) for name, parameter in model.named_parameters() if name.startswith("embedding.")}
    mapping = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.LSTM)]
    decayed = {id(p) for module in mapping for p in module.parameters(recurse=False) if p.ndim > 1} - embedded
    parameters = list(model.parameters())
    mapped = [p for p in parameters if id(p) in decayed]
    others = {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0}
    if config.optimizer == "muon":
        matrices = [p for p in mapped if p.ndim == 2]
        rest = [p for p in mapped if p.ndim != 2]
        groups = [{"params": rest, "weight_decay": config.weight_decay}, others]
        return MuonWithAdamW(matrices, groups, config)
    groups = [{"params": mapped, "weight_decay": config.weight_decay}, others]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Clip the gradient norm to `max_norm` in place (0: no clipping); return the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    return float(gathered(norm))


def learning_rate_at(update: int, config: TrainingConfig) -> float:
    """Return the learning rate of an update, counted from 0: linear warm-up, then cosine decay."""
    if update < config.warmup_updates:
        return config.learning_rate * (update + 1) / config.warmup_updates
    span = max(config.num_updates - config.warmup_updates, 1)
    remaining = _half_cosine((update - config.warmup_updates) / span)
    return config.learning_rate * (config.final_learning_rate + (1 - config.final_learning_rate) * remaining)


def write_penalty_at(update: int, config: TrainingConfig, loss: float) -> float:
    """Return the weight of the write penalty.

    Args:
        update: The update, counted from 0. The weight decays to 0 over the run along half a cosine.
        config: The training config.
        loss: The rollout's loss in nats per token. From `LEARNED_LOSS` upwards, the weight is 0.
    """
    if loss >= LEARNED_LOSS:
        return 0.0
    return config.write_penalty * _half_cosine(update / config.num_updates)


def writer_weights(update: int, config: RunConfig, *, num_processes: int) -> dict[str, Callable[[float], float]]:
    """Return the weights of the write penalty and of the shortfall as fields of `RolloutHooks`; none if not needed.

    The shortfall is for sparse writers on recall tasks, whose loss says whether writing is learned. Both depend on the
    loss of the whole rollout, which one of several processes does not have.
    """
    penalty = partial(write_penalty_at, update, config.training)
    if config.writes_sparsely and config.data.recall is not None and num_processes == 1:
        return {"auxiliary_weight": penalty, "shortfall_weight": shortfall_weight_at}
    return {"auxiliary_weight": penalty} if config.training.write_penalty else {}


def shortfall_weight_at(loss: float) -> float:
    """Return the weight of the writer's shortfall: 0 if the loss, in nats per token, is below `HARDLY_LEARNED_LOSS`."""
    return SHORTFALL_WEIGHT if loss >= HARDLY_LEARNED_LOSS else 0.0


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
