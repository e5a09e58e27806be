"""Tokens in and out: embeddings that are the output's weights too, and their form for large vocabularies."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memformer.errors import InputError
from memformer.nn.linear import linear

# Logits held at once, 1 GiB in float32: parts are computed twice, and slower (benchmarks/vocabulary.py).
_MOST_LOGITS = 1 << 28

Tokens = Int64[Tensor, "B Q"]
Features = Float[Tensor, "B Q D"]


class TiedEmbedding(nn.Embedding):
    """Embeddings whose first V rows are the output's weights; row V is `[BOS]`, which is never predicted.

    Args:
        vocab_size: Number of token ids V.
        width: Model width D.
        num_special_tokens: Rows after `[BOS]` that are never predicted either.
    """

    def __init__(self, vocab_size: int, width: int, *, num_special_tokens: int = 0) -> None:
        super().__init__(vocab_size + 1 + num_special_tokens, width)
        self.vocab_size = vocab_size

    def reset_parameters(self) -> None:
        """Draw rows of length near 1."""
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)

    def logits(self, features: Features) -> Float[Tensor, "B Q V"]:
        """Return the logits of each next token."""
        return linear(features, self.weight[: self.vocab_size])

    def nats(self, features: Features, targets: Tokens) -> Float[Tensor, "B Q"]:
        """Return the negative log-likelihood of each target, in float32 or better.

        Where tokens times words are many the logits are computed a part at a time, and once more in the backward pass:
        they are never held all at once.
        """
        rows_at_once = max(1, _MOST_LOGITS // self.vocab_size)
        parts = zip(features.flatten(0, 1).split(rows_at_once), targets.flatten().split(rows_at_once), strict=True)
        if targets.numel() <= rows_at_once:
            nats = [self._nats(*part) for part in parts]
        else:
            nats = [checkpoint(self._nats, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.cat(nats).view_as(targets)

    def _nats(self, features: Float[Tensor, "N D"], targets: Int64[Tensor, " N"]) -> Float[Tensor, " N"]:
        logits = self.logits(features[None])[0]
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


class AdaptiveEmbedding(nn.Module):
    """The same for many words, sorted by frequency: narrow embeddings and a softmax in two steps for rare ones.

    Words below the first cutoff have vectors of the full width D, those of each further cluster of a quarter of the
    width before. The softmax is over the first cluster with one entry for each other, and then, for a rare word, over
    its own cluster (arXiv 1609.04309; tied to the embeddings as in arXiv 1809.10853). The paper does not say what it
    did with its 267,735 words.

    Args:
        vocab_size: Number of token ids V, the frequent ones first.
        width: Model width D.
        cutoffs: First ids of the clusters after the first, ascending.

    Raises:
        InputError: A cutoff is not below V, or a cluster would have no width.
    """

    def __init__(self, vocab_size: int, width: int, *, cutoffs: Sequence[int]) -> None:
        super().__init__()
        if cutoffs[-1] >= vocab_size:
            raise InputError(f"adaptive_cutoffs ({list(cutoffs)}) must be below vocab_size ({vocab_size})")
        if width < 4 ** len(cutoffs):
            raise InputError(
                f"adaptive_cutoffs ({list(cutoffs)}) make {len(cutoffs)} clusters of rare words, each of a "
                f"quarter of the width before; d_model ({width}) is too small for so many"
            )
        self.clusters = list(pairwise([0, *cutoffs, vocab_size]))
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(width, vocab_size, cutoffs=list(cutoffs), div_value=4.0)
        self.bos = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw vectors of length near 1 for words of every cluster."""
        nn.init.normal_(self.bos, std=self.bos.numel() ** -0.5)
        for module in self.softmax.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, tokens: Tokens) -> Features:
        """Return the vectors of the tokens."""
        embedded = self.bos.expand(*tokens.shape, -1)
        frequent = self.softmax.head.weight
        for index, (first, end) in enumerate(self.clusters):
            # Every token looks up a word of every cluster: shapes depend on no token, and nothing waits for the device.
            inside = (tokens >= first) & (tokens < end)
            place = (tokens - first).clamp(0, end - first - 1)
            if index == 0:
                vectors = F.embedding(place, frequent)
            else:
                narrow, wide = (module.weight for module in self._typed_tail[index - 1])
                vectors = F.embedding(place, wide) @ narrow
            embedded = torch.where(inside[..., None], vectors, embedded)
        return embedded

    @property
    def _typed_tail(self) -> list[list[nn.Linear]]:
        """The projection and the vectors of every cluster of rare words."""
        return [[module for module in tail.children() if isinstance(module, nn.Linear)] for tail in self.softmax.tail]

    def logits(self, features: Features) -> Float[Tensor, "B Q V"]:
        """Return the log-probabilities of each next token."""
        with torch.autocast(features.device.type, enabled=False):
            log_probabilities = self.softmax.log_prob(self._wide_enough(features).flatten(0, 1))
        return log_probabilities.unflatten(0, features.shape[:-1])

    def nats(self, features: Features, targets: Tokens) -> Float[Tensor, "B Q"]:
        """Return the negative log-likelihood of each target, in float32 or better."""
        with torch.autocast(features.device.type, enabled=False):
            result = self.softmax(self._wide_enough(features).flatten(0, 1), targets.flatten())
        return -result.output.view_as(targets)

    def _wide_enough(self, features: Features) -> Features:
        return features.to(self.bos.dtype)
