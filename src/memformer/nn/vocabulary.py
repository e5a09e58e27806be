"""Tied input and output embeddings, and an adaptive variant for large vocabularies."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memformer.errors import InputError
from memformer.nn.linear import linear

# Largest number of logits held at once: 1 GiB in float32. Above it, logits are computed in parts and twice, which is
# slower (benchmarks/vocabulary.py).
_MOST_LOGITS = 1 << 28
# Columns of logits are padded to a multiple of this on CUDA.
_ALIGNMENT = 64

Tokens = Int64[Tensor, "B Q"]
Features = Float[Tensor, "B Q D"]


class TiedEmbedding(nn.Embedding):
    """Embedding whose first V rows are also the output weights; row V is `[BOS]`, which is never predicted.

    Args:
        vocab_size: Number of token ids V.
        width: Model width D.
        num_special_tokens: Number of rows after `[BOS]`, which are never predicted either.
    """

    def __init__(self, vocab_size: int, width: int, *, num_special_tokens: int = 0) -> None:
        super().__init__(vocab_size + 1 + num_special_tokens, width)
        self.vocab_size = vocab_size

    def reset_parameters(self) -> None:
        """Draw rows with norm near 1."""
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)

    def logits(self, features: Features) -> Float[Tensor, "B Q V"]:
        """Return the next-token logits at each position."""
        return linear(features, _current_weight(self)[: self.vocab_size])

    def nll(self, features: Features, targets: Tokens) -> Float[Tensor, "B Q"]:
        """Return the negative log-likelihood of each target, in at least float32.

        If tokens times vocabulary size is large, logits are computed in parts and recomputed in the backward pass, so
        that they are never all held at once.
        """
        rows_at_once = max(1, _MOST_LOGITS // self.vocab_size)
        parts = zip(features.flatten(0, 1).split(rows_at_once), targets.flatten().split(rows_at_once), strict=True)
        if targets.numel() <= rows_at_once:
            nll = [self._nll(*part) for part in parts]
        else:
            nll = [checkpoint(self._nll, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.cat(nll).view_as(targets)

    def compile_nll(self, **options: Any) -> None:
        """Compile the loss in place with `torch.compile`, so that logits are read and written less often."""
        self._nll = torch.compile(self._nll, **options)  # type: ignore[method-assign]  # of this instance

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without compiled code, which belongs to this instance: a copy computes with its weights."""
        return {name: value for name, value in super().__getstate__().items() if name != "_nll"}

    def _nll(self, features: Float[Tensor, "N D"], targets: Int64[Tensor, " N"]) -> Float[Tensor, " N"]:
        if features.device.type == "cuda" and self.vocab_size % _ALIGNMENT:
            logits = F.linear(features, *self._padded())
        else:
            logits = linear(features, _current_weight(self)[: self.vocab_size])
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")

    def _padded(self) -> tuple[Tensor, Tensor]:
        """Return the output weights with rows up to the next multiple, and biases that exclude all but the first V.

        With an odd number of columns, CUDA's matrix products fall back to old kernels, three times as slow.
        """
        weight = _current_weight(self)
        num_rows, num_columns = weight.shape[0], -(-weight.shape[0] // _ALIGNMENT) * _ALIGNMENT
        weight = F.pad(weight, (0, 0, 0, num_columns - num_rows))
        is_predicted = torch.arange(num_columns, device=weight.device) < self.vocab_size
        excluded = torch.full((), float("-inf"), dtype=weight.dtype, device=weight.device)
        return weight, torch.where(is_predicted, excluded.new_zeros(()), excluded)


class AdaptiveEmbedding(nn.Module):
    """Tied embedding for a large vocabulary sorted by frequency: rare words have narrow vectors and a two-step softmax.

    Words below the first cutoff have vectors of the full width D. The vectors of each further cluster are a quarter as
    wide as those of the cluster before. The first softmax is over the words of the first cluster and one entry for each
    other cluster; for a rare word a second softmax is over its own cluster (arXiv 1609.04309; tied to the embeddings as
    in arXiv 1809.10853). The paper does not say how it handles its vocabulary of 267,735 words.

    Args:
        vocab_size: Number of token ids V, the most frequent first.
        width: Model width D.
        cutoffs: First token id of each cluster after the first, ascending.

    Raises:
        InputError: A cutoff is not below V, or a cluster would have width 0.
    """

    def __init__(self, vocab_size: int, width: int, *, cutoffs: Sequence[int]) -> None:
        super().__init__()
        if cutoffs[-1] >= vocab_size:
            raise InputError(f"adaptive_cutoffs ({list(cutoffs)}) must be below vocab_size ({vocab_size})")
        if width < 4 ** len(cutoffs):
            raise InputError(
                f"adaptive_cutoffs ({list(cutoffs)}) make {len(cutoffs)} clusters of rare words, each a quarter as "
                f"wide as the one before; d_model ({width}) must be at least {4 ** len(cutoffs)}"
            )
        self.clusters = list(pairwise([0, *cutoffs, vocab_size]))
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(width, vocab_size, cutoffs=list(cutoffs), div_value=4.0)
        self.bos = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw vectors with norm near 1 for the words of every cluster."""
        nn.init.normal_(self.bos, std=self.bos.numel() ** -0.5)
        for module in self.softmax.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, tokens: Tokens) -> Features:
        """Return the embeddings of the tokens."""
        embedded = self.bos.expand(*tokens.shape, -1)
        frequent = _current_weight(self.softmax.head)
        for index, (first, end) in enumerate(self.clusters):
            # Every token is looked up in every cluster: shapes do not depend on the tokens, and the device is not
            # synchronized.
            inside = (tokens >= first) & (tokens < end)
            index_in_cluster = (tokens - first).clamp(0, end - first - 1)
            if index == 0:
                vectors = F.embedding(index_in_cluster, frequent)
            else:
                projection, narrow = map(_current_weight, self._typed_tail[index - 1])
                vectors = F.embedding(index_in_cluster, narrow) @ projection
            embedded = torch.where(inside[..., None], vectors, embedded)
        return embedded

    @property
    def _typed_tail(self) -> list[list[nn.Linear]]:
        """Projection and narrow vectors of each cluster of rare words."""
        return [[module for module in tail.children() if isinstance(module, nn.Linear)] for tail in self.softmax.tail]

    def logits(self, features: Features) -> Float[Tensor, "B Q V"]:
        """Return the next-token log-probabilities at each position, in at least float32."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.bos.dtype)
            first = _log_softmax(self.softmax.head(features))
            num_frequent = self.clusters[0][1]
            found = [first[..., :num_frequent]]
            for index, tail in enumerate(self.softmax.tail):
                of_cluster = first[..., num_frequent + index, None]
                found.append(of_cluster + _log_softmax(tail(features)))
        return torch.cat(found, dim=-1)

    def nll(self, features: Features, targets: Tokens) -> Float[Tensor, "B Q"]:
        """Return the negative log-likelihood of each target, in at least float32."""
        with torch.autocast(features.device.type, enabled=False):
            x, ids = features.to(self.bos.dtype).flatten(0, 1), targets.flatten()
            num_frequent = self.clusters[0][1]
            entries, found = ids, []
            for index, ((first, end), tail) in enumerate(zip(self.clusters[1:], self.softmax.tail, strict=True)):
                inside = (ids >= first) & (ids < end)
                entries = torch.where(inside, num_frequent + index, entries)
                # Only words of the cluster take part in its softmax.
                rows = inside.nonzero()[:, 0]
                if len(rows):
                    found.append((rows, _chosen(_log_softmax(tail(x[rows])), ids[rows] - first)))
            log_likelihood = _chosen(_log_softmax(self.softmax.head(x)), entries)
            for rows, in_cluster in found:
                log_likelihood = log_likelihood.index_add(0, rows, in_cluster)
        return -log_likelihood.view_as(targets)

    def compile_nll(self, **options: Any) -> None:
        """Do nothing: the sizes of the clusters' batches depend on the tokens."""


def _current_weight(layer: nn.Embedding | nn.Linear) -> Tensor:
    """Return the weight, computed anew if a hook computes it when the layer is called (pruning, adapters)."""
    if layer._forward_pre_hooks:
        weight = layer.weight
        nothing = weight.new_zeros(0, dtype=torch.int64) if isinstance(layer, nn.Embedding) else weight[:0]
        layer(nothing)
    return layer.weight


def _log_softmax(logits: Float[Tensor, "*rows V"]) -> Float[Tensor, "*rows V"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def _chosen(log_probabilities: Float[Tensor, "N V"], indices: Int64[Tensor, " N"]) -> Float[Tensor, " N"]:
    return log_probabilities.gather(1, indices[:, None])[:, 0]
