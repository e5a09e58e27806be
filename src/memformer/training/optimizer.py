"""AdamW with weight decay on matrices only; what changes over a run: the learning rate and the price on writing."""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from memformer.training.config import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW; embeddings, norms, biases and forgetting vectors are not decayed."""
    embedded = {id(parameter) for name, parameter in model.named_parameters() if name.startswith("embedding.")}
    mapping = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.LSTM)]
    decayed = {id(p) for module in mapping for p in module.parameters(recurse=False) if p.ndim > 1} - embedded
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if id(p) in decayed], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,
    )


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients down to a norm, if it is exceeded; return the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def learning_rate_at(update: int, config: TrainingConfig) -> float:
    """Return the learning rate of an update, counted from 0: linear up, then half a cosine down."""
    if update < config.warmup_updates:
        return config.learning_rate * (update + 1) / config.warmup_updates
    span = max(config.num_updates - config.warmup_updates, 1)
    remaining = _half_cosine((update - config.warmup_updates) / span)
    return config.learning_rate * (config.final_learning_rate + (1 - config.final_learning_rate) * remaining)


def write_price_at(update: int, config: TrainingConfig) -> float:
    """Return the price on writing of an update, counted from 0: half a cosine down to 0."""
    return config.write_price * _half_cosine(update / config.num_updates)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
