"""The memory: how it is read, written and forgotten (arXiv 2010.06891v2, sections 3.2-3.4)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from memformer.config import Normalizer
from memformer.nn.attention import AttentionRecord, CrossAttention, merge_heads, split_heads
from memformer.nn.entmax import normalize_scores
from memformer.nn.positions import Frame
from memformer.shapes import Hidden, Memory


class MemoryReader(nn.Module):
    """Cross-attention from tokens (queries) to memory slots (keys and values), v2 Eq. 1-3.

    Every token sees every slot, so there is no mask. Time O(S*K*D) a layer. Departure: none.

    Args:
        width: Model width D.
        num_heads: Number of heads H, a divisor of `width`.
        dropout: Probability of dropping an attention weight in training.
    """

    def __init__(self, width: int, *, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = CrossAttention(width, num_heads=num_heads, dropout=dropout, bias=False)

    def forward(
        self, hidden: Float[Tensor, "B Q D"], *, slots: Memory, record: AttentionRecord | None = None
    ) -> Float[Tensor, "B Q D"]:
        """Return what every token reads; `slots` are the memory after its LayerNorm."""
        frame = Frame()
        key, value = self.attention.project(slots, frame=frame)
        weights = None if record is None else record.reader
        return self.attention(hidden, key=key, value=value, frame=frame, record=weights)


class MemoryWriter(nn.Module):
    """Slot attention: every slot looks at itself and at the segment's tokens, never at another slot.

        q_i, k_i = m_i W_Q, m_i W_K ;  K_x, V_x = x W_K, x W_V
        a_i = softmax([q_i.k_i ; q_i K_x^T] / (sqrt(D/H) tau)) ;  m_i' = a_i [m_i ; V_x]

    The slot's own value is m_i itself and there is no output projection: a slot that looks only at itself keeps its
    content exactly. Computed in the memory's dtype, whatever the autocast. Departure: in place of the softmax a sparse
    relative of it may stand, whose weights can be exactly 0, so that a slot can keep its content exactly.

    Args:
        width: Model width D.
        num_heads: Number of heads H, a divisor of `width`.
        temperature: tau; below 1 sharpens.
        normalizer: What turns scores into weights.
    """

    def __init__(self, width: int, *, num_heads: int, temperature: float, normalizer: Normalizer = "softmax") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = temperature
        self.normalizer = normalizer
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)

    def forward(
        self,
        memory: Memory,
        *,
        hidden: Hidden,
        padding_mask: Bool[Tensor, "B S"] | None = None,
        record: AttentionRecord | None = None,
    ) -> Memory:
        """Return m', the slots after looking; they are not on the sphere yet."""
        with torch.autocast(memory.device.type, enabled=False):
            hidden = hidden.to(memory.dtype)
            query = self._project(memory, self.query) / (
                math.sqrt(memory.shape[-1] / self.num_heads) * self.temperature
            )
            own_score = (query * self._project(memory, self.key)).sum(dim=-1, keepdim=True)  # (B, H, K, 1)
            token_scores = query @ self._project(hidden, self.key).mT  # (B, H, K, S)
            if padding_mask is not None:
                token_scores = token_scores.masked_fill(padding_mask[:, None, None, :], float("-inf"))
            weights = normalize_scores(torch.cat([own_score, token_scores], dim=-1), self.normalizer)
            if record is not None:
                record.writer = weights.detach()
            kept = weights[..., :1] * split_heads(memory, self.num_heads)
            return merge_heads(kept + weights[..., 1:] @ self._project(hidden, self.value))

    def _project(self, x: Tensor, projection: nn.Linear) -> Tensor:
        return split_heads(F.linear(x, projection.weight.to(x.dtype)), self.num_heads)


class MemoryNormalization(nn.Module):
    """Biased memory normalization: forgetting, and the way back to the sphere (v2, section 3.4).

        m_i <- radius (m_i' + v_i) / ||m_i' + v_i|| ;  M_0: m_i = radius v_i / ||v_i||

    Departure: the radius is sqrt(D) instead of 1 (RMS 1, the scale LayerNorm gives to activations), the same model up
    to a rescaling of V_x and v_i. With radius 1 a written value outweighs the slot at once.

    Args:
        num_slots: Number of slots K.
        width: Model width D.
        forgetting_speeds: ||v_i|| / radius of the first and the last slot at initialisation; log-uniform between.
        forgetting: False leaves v_i out of the update; it still is the initial state.
        log_speeds: Learn v_i as a direction and the logarithm of its length. Departure: the paper learns the vector;
            there a few steps of an optimizer like Adam, all of one size, make slow slots forget as fast as the others.
    """

    def __init__(
        self,
        num_slots: int,
        *,
        width: int,
        forgetting_speeds: tuple[float, float],
        forgetting: bool = True,
        log_speeds: bool = False,
    ) -> None:
        super().__init__()
        self.radius = math.sqrt(width)
        self.forgetting = forgetting
        self.forgetting_speeds = forgetting_speeds
        self.slot_bias = nn.Parameter(torch.empty(num_slots, width))
        self.log_speed = nn.Parameter(torch.empty(num_slots)) if log_speeds else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the slots' directions at random, and give them their speeds."""
        first, last = (math.log(speed) for speed in self.forgetting_speeds)
        log_speeds = torch.linspace(first, last, self.slot_bias.shape[0])
        with torch.no_grad():
            self.slot_bias.normal_()
            if self.log_speed is not None:
                self.log_speed.copy_(log_speeds)
            else:
                self.slot_bias.copy_(self.radius * log_speeds.exp()[:, None] * F.normalize(self.slot_bias, dim=-1))

    def forgetting_vectors(self) -> Float[Tensor, "K D"]:
        """Return v_i of every slot."""
        if self.log_speed is None:
            return self.slot_bias
        return self.radius * self.log_speed.exp()[:, None] * F.normalize(self.slot_bias, dim=-1)

    def forward(self, memory: Memory) -> Memory:
        """Return the slots, pulled towards their terminal states, on the sphere."""
        if self.forgetting:
            memory = memory + self.forgetting_vectors().to(memory.dtype)
        return self.radius * F.normalize(memory, dim=-1)

    def initial_memory(self, batch_size: int) -> Memory:
        """Return M_0, the terminal state of forgetting, for each row; at least float32."""
        slot_bias = self.slot_bias.to(torch.promote_types(self.slot_bias.dtype, torch.float32))
        return (self.radius * F.normalize(slot_bias, dim=-1)).expand(batch_size, -1, -1)
