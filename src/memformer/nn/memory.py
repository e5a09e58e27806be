"""The memory: how it is read, written and forgotten (arXiv 2010.06891v2, sections 3.2-3.4)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from memformer.errors import InputError
from memformer.nn.attention import AttentionRecord, CrossAttention, merge_heads, split_heads
from memformer.nn.entmax import REACH, Normalizer, normalize_scores
from memformer.nn.linear import Linear, linear
from memformer.nn.matching import match_slots
from memformer.nn.positions import Frame
from memformer.shapes import Hidden, Memory

WrittenShare = Float[Tensor, "B H K 1"]

# A token whose best score is this far below being written pays nothing.
_MARGIN = 1.0


@dataclass
class WritePressure:
    """How much the tokens of one timestep press to be written, filled by `Memformer.encode` when it is passed in.

    Attributes:
        total: Scalar with gradient, summed over tokens and averaged over the writer's heads: ln(1 + e), where e is how
            far the score of the slot that wants a token most lies above the highest one that writes nothing, plus a
            margin of 1; 0 for a token that is clearly refused. Unlike what is written it has a gradient where a write
            is whole; and with the logarithm one whole write costs less than two halves.
    """

    total: Tensor | None = None


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
    content exactly. Computed in the memory's dtype, whatever the autocast. Departures, each off by default:

    - In place of the softmax a sparse relative of it, whose weights can be exactly 0, so that a slot can keep its
      content exactly.
    - Slots compete for tokens: head by head, a token can be taken by one slot only and a slot takes one token only,
      matched by how far the slot's score of the token exceeds its score of itself. So a free slot is found without
      disturbing full ones, a fact does not fill the whole memory, and facts told in one segment find a slot each. With
      `sharing`, tokens that want the same slot most all look at it: they compete with each other too, and few slots
      are written, but facts told together may be mixed. Here slots do interfere. (Slot attention, arXiv 2006.15055,
      has a softmax over slots instead: too soft here, where many free slots are alike and would all take the first
      fact.)
    - A free slot scores itself lower, by a learned number times its cosine with its terminal state of forgetting, so
      that facts go where nothing is written yet.

    Args:
        width: Model width D.
        num_heads: Number of heads H, a divisor of `width`.
        temperature: tau; below 1 sharpens.
        normalizer: What turns scores into weights.
        competition: Whether slots compete for tokens.
        sharing: Whether several tokens that want the same slot most share it, in place of choosing again.
        free_slot_eagerness: By how much a free slot scores itself lower, at initialisation. 0 leaves it out.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        temperature: float,
        normalizer: Normalizer = "softmax",
        competition: bool = False,
        sharing: bool = False,
        free_slot_eagerness: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = temperature
        self.normalizer = normalizer
        self.competition = competition
        self.sharing = sharing
        self.free_slot_eagerness = (
            nn.Parameter(torch.tensor(float(free_slot_eagerness))) if free_slot_eagerness else None
        )
        self.query = Linear(width, width, bias=False)
        self.key = Linear(width, width, bias=False)
        self.value = Linear(width, width, bias=False)

    def forward(
        self,
        memory: Memory,
        *,
        hidden: Hidden,
        terminal: Float[Tensor, "slots D"],
        padding_mask: Bool[Tensor, "B S"] | None = None,
        record: AttentionRecord | None = None,
        pressure: WritePressure | None = None,
    ) -> tuple[Memory, WrittenShare]:
        """Return m', the slots after looking, not on the sphere yet, and the share of each that is not its own.

        Args:
            memory: The slots.
            hidden: The segment's tokens.
            terminal: Each slot's terminal state of forgetting, or the one of all: what a free slot looks like.
            padding_mask: True at padding.
            record: Filled with the weights, (B, H, K, 1 + S), the slot's own first.
            pressure: Filled with how much the tokens press to be written.

        Raises:
            InputError: `pressure` is given and the normalizer is the softmax, where every token is written.
        """
        reach = REACH[self.normalizer]
        if pressure is not None and reach == math.inf:
            raise InputError(
                f"write_normalizer ({self.normalizer!r}) writes every token: a price on writing needs a sparse one"
            )
        with torch.autocast(memory.device.type, enabled=False):
            hidden = hidden.to(memory.dtype)
            query = self._project(memory, self.query) / (
                math.sqrt(memory.shape[-1] / self.num_heads) * self.temperature
            )
            own_score = (query * self._project(memory, self.key)).sum(dim=-1, keepdim=True)  # (B, H, K, 1)
            if self.free_slot_eagerness is not None:
                free_slot = split_heads(terminal.to(memory.dtype)[None], self.num_heads)
                freedom = F.cosine_similarity(split_heads(memory, self.num_heads), free_slot, dim=-1)[..., None]
                own_score = own_score - self.free_slot_eagerness * freedom
            token_scores = query @ self._project(hidden, self.key).mT  # (B, H, K, S)
            if padding_mask is not None:
                token_scores = token_scores.masked_fill(padding_mask[:, None, None, :], float("-inf"))
            if pressure is not None:
                most = (token_scores - own_score).amax(dim=-2)  # (B, H, S), of the slot that wants the token most
                pressure.total = F.relu(most + reach + _MARGIN).log1p().sum() / self.num_heads
            if self.competition:
                matching = match_slots(token_scores - own_score, least=-reach, sharing=self.sharing)
                token_scores = token_scores.masked_fill(~matching, float("-inf"))
            weights = normalize_scores(torch.cat([own_score, token_scores], dim=-1), self.normalizer)
            if record is not None:
                record.writer = weights.detach()
            kept = weights[..., :1] * split_heads(memory, self.num_heads)
            return merge_heads(kept + weights[..., 1:] @ self._project(hidden, self.value)), 1 - weights[..., :1]

    def _project(self, x: Tensor, projection: Linear) -> Tensor:
        return split_heads(linear(x, projection.weight.to(x.dtype)), self.num_heads)


class MemoryNormalization(nn.Module):
    """Biased memory normalization: forgetting, and the way back to the sphere (v2, section 3.4).

        m_i <- radius (m_i' + v_i) / ||m_i' + v_i|| ;  M_0: m_i = radius v_i / ||v_i||

    Departure: the radius is sqrt(D) instead of 1 (RMS 1, the scale LayerNorm gives to activations), the same model up
    to a rescaling of V_x and v_i. With radius 1 a written value outweighs the slot at once.

    Args:
        num_slots: Number of slots K.
        width: Model width D.
        forgetting_speeds: ||v_i|| / radius of the first and the last slot at initialisation; log-uniform between.
        exchangeable: One v for all slots. Departure: in the paper every slot has its own.
        forgetting: False leaves v_i out of the update; it still is the initial state.
        only_when_written: Scale v_i by the share of the slot (head by head) that its writer replaced. Departure: in the
            paper every slot is pulled at every timestep; here one that looks only at itself is kept for ever.
        log_speeds: Learn v_i as a direction and the logarithm of its length. Departure: the paper learns the vector;
            there a few steps of an optimizer like Adam, all of one size, make slow slots forget as fast as the others.
    """

    def __init__(
        self,
        num_slots: int,
        *,
        width: int,
        forgetting_speeds: tuple[float, float],
        exchangeable: bool = False,
        forgetting: bool = True,
        only_when_written: bool = False,
        log_speeds: bool = False,
    ) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.radius = math.sqrt(width)
        self.forgetting = forgetting
        self.only_when_written = only_when_written
        self.forgetting_speeds = forgetting_speeds
        num_vectors = 1 if exchangeable else num_slots
        self.slot_bias = nn.Parameter(torch.empty(num_vectors, width))
        self.log_speed = nn.Parameter(torch.empty(num_vectors)) if log_speeds else None
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

    def forgetting_vectors(self) -> Float[Tensor, "vectors D"]:
        """Return v_i of every slot, or the one v of all."""
        if self.log_speed is None:
            return self.slot_bias
        return self.radius * self.log_speed.exp()[:, None] * F.normalize(self.slot_bias, dim=-1)

    def forward(self, memory: Memory, *, written: WrittenShare) -> Memory:
        """Return the slots, pulled towards their terminal states, on the sphere; both arguments are the writer's."""
        if self.forgetting:
            forgetting = self.forgetting_vectors().to(memory.dtype)
            if self.only_when_written:
                forgetting = merge_heads(written * split_heads(forgetting[None], written.shape[1]))
            memory = memory + forgetting
        return self.radius * F.normalize(memory, dim=-1)

    def initial_memory(self, batch_size: int) -> Memory:
        """Return M_0, the terminal state of forgetting, for each row; at least float32."""
        slot_bias = self.slot_bias.to(torch.promote_types(self.slot_bias.dtype, torch.float32))
        return (self.radius * F.normalize(slot_bias, dim=-1)).expand(batch_size, self.num_slots, -1)
