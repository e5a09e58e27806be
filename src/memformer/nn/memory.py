"""The memory: reader, writer and forgetting (arXiv 2010.06891v2, sections 3.2-3.4)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from memformer.errors import InputError
from memformer.nn.attention import AttentionRecord, CrossAttention, merge_heads, split_heads
from memformer.nn.auxiliary import AuxiliaryLoss
from memformer.nn.entmax import SUPPORT_WIDTH, Normalizer, normalize_scores
from memformer.nn.linear import Linear, called_in_dtype, recompute_weights
from memformer.nn.matching import match_slots
from memformer.nn.positions import Frame
from memformer.shapes import Hidden, Memory, SlotBias

WrittenShare = Float[Tensor, "B H K 1"]

# Margin of the write penalty: a token is not penalized if its best score is this far below the threshold for a write.
# The best token of a segment has no shortfall if it is as far above it.
_MARGIN = 1.0

# In a segment that is known to be filler, the penalty is this many times as steep, and not logarithmic.
_FILLER_SLOPE = 10.0

# Far more than the rounding errors of scores in float32, and far less than the margin that the write penalty leaves. In
# bfloat16 errors can be larger; then a segment may be judged as it could be in a batch of another size.
_ROUNDING = 0.05


class MemoryReader(nn.Module):
    """Cross-attention from tokens (queries) to memory slots (keys and values), v2 Eq. 1-3.

    Every token attends to every slot, so there is no mask. Time O(S*K*D) per layer. Departure: slots may have another
    width than tokens; keys and values have the model's width.

    Args:
        width: Model width D.
        slot_width: Width W of a slot; D in the paper.
        num_heads: Number of heads H, a divisor of `width`.
        dropout: Probability of dropping an attention weight in training.
    """

    def __init__(self, width: int, *, slot_width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = CrossAttention(
            width, num_heads=num_heads, dropout=dropout, bias=False, source_width=slot_width
        )

    def forward(
        self,
        hidden: Float[Tensor, "L Q D"],
        *,
        slots: Memory,
        slot_bias: SlotBias | None = None,
        record: AttentionRecord | None = None,
    ) -> Float[Tensor, "L Q D"]:
        """Return the attention output of each token; `slots` is the memory after the encoder's LayerNorm.

        There may be several segments, one after the other, for each row of `slots`; then nothing can be recorded.
        `slot_bias` is added to the scores of the slots.
        """
        frame = Frame()
        key, value = self.attention.project(slots, frame=frame)
        weights = None if record is None else record.reader
        tokens = hidden
        if hidden.shape[0] != slots.shape[0]:
            tokens = hidden.reshape(slots.shape[0], -1, hidden.shape[-1])
        read = self.attention(tokens, key=key, value=value, frame=frame, keep_mask=slot_bias, record=weights)
        return read.view_as(hidden)


class MemoryWriter(nn.Module):
    """Slot attention: every slot attends to itself and to the segment's tokens, never to another slot.

        q_i, k_i = m_i W_Q, m_i W_K ;  K_x, V_x = x W_K, x W_V
        a_i = softmax([q_i.k_i ; q_i K_x^T] / (sqrt(W/H) tau)) ;  m_i' = a_i [m_i ; V_x]

    The slot's own value is m_i itself, and there is no output projection. So a slot that attends only to itself keeps
    its content exactly in this step (forgetting follows). Computed in the memory's dtype, even under autocast.
    Departures, each off by default:

    - `normalizer`: a sparse alternative to the softmax, whose weights can be exactly 0, so that a slot can keep its
      content exactly.
    - `competition`: slots compete for tokens. In each head a token is taken by at most one slot and a slot takes at
      most one token, matched by the slot's score for the token minus its score for itself. So a free slot is found
      without disturbing full ones, a fact does not fill the whole memory, and several facts in one segment get one slot
      each. Slots do influence each other here. (Slot attention, arXiv 2006.15055, uses a softmax over slots instead.
      It is too soft here: many free slots are alike and would all take the first fact.)
    - `sharing`: several tokens may take the same slot, the one with the highest preference for each of them. They
      compete within that slot, and fewer slots are written, but facts of one segment may be mixed.
    - `free_slot_bias`: a slot's score for itself is lowered by a learned number times its cosine similarity to its
      initial state, so that facts are written to slots that hold nothing yet.
    - `width` other than `token_width`: a linear layer without bias first brings tokens to the width of slots. The rest
      is the same: the paper's W is D.

    The auxiliary loss is the write penalty ln(1 + e), summed over tokens and averaged over heads, with
    e = max(0, max_i(score of slot i for the token - score of slot i for itself) + support width + 1). The support width
    is the distance below the best score at which a weight becomes 0. So a token that is clearly not written has
    penalty 0. Unlike the written values, the penalty has a gradient even where a slot is fully replaced. Because of the
    logarithm, one full write has a smaller penalty than two half writes. Once it is known which segments contain
    nothing to remember (`Rollout.is_filler`), the penalty is 10 e in these, where no write has to be spared; in the
    others, the token with the highest score is spared: otherwise the scores of facts would fall as well, until a fact
    prefers the slot of another one.

    The shortfall is the opposite: max(0, 1 - support width - max over slots and tokens of (score of the slot for the
    token - score of the slot for itself)), summed over rows and averaged over heads, 0 in a segment known to contain
    nothing to remember. Weights of exactly 0 have no gradient, so a writer that writes no token cannot learn to write
    one again; the shortfall can.

    Args:
        width: Width W of a slot.
        token_width: Width D of the tokens' hidden states.
        num_heads: Number of heads H, a divisor of `width`.
        temperature: Softmax temperature tau; values below 1 sharpen the weights.
        normalizer: Function that turns scores into weights.
        competition: Whether slots compete for tokens.
        sharing: Whether tokens with the same best slot share it, instead of being matched to different slots.
        free_slot_bias: Initial value of the learned bias that lowers a free slot's score for itself. 0: no bias.
    """

    def __init__(
        self,
        width: int,
        *,
        token_width: int,
        num_heads: int,
        temperature: float,
        normalizer: Normalizer = "softmax",
        competition: bool = False,
        sharing: bool = False,
        free_slot_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = temperature
        self.normalizer = normalizer
        self.competition = competition
        self.sharing = sharing
        self.free_slot_bias = nn.Parameter(torch.tensor(float(free_slot_bias))) if free_slot_bias else None
        self.token_projection = None if token_width == width else Linear(token_width, width, bias=False)
        self.query = Linear(width, width, bias=False)
        self.key = Linear(width, width, bias=False)
        self.value = Linear(width, width, bias=False)

    def forward(
        self,
        memory: Memory,
        *,
        hidden: Hidden,
        terminal: Float[Tensor, "slots W"],
        padding_mask: Bool[Tensor, "B S"] | None = None,
        record: AttentionRecord | None = None,
        auxiliary: AuxiliaryLoss | None = None,
    ) -> tuple[Memory, WrittenShare]:
        """Return the written slots m', not yet normalized, and the replaced share of each slot.

        Args:
            memory: The slots.
            hidden: The hidden states of the segment's tokens.
            terminal: Terminal state of forgetting, one per slot or one for all; free slots are similar to it.
            padding_mask: True at padding.
            record: Receives the attention weights, (B, H, K, 1 + S), the slot's weight for itself first, and what the
                slots take from the tokens, (B, K, W).
            auxiliary: Receives the write penalty and the shortfall, if given.

        Raises:
            InputError: `auxiliary` is given and the normalizer is the softmax, which writes every token.
        """
        support_width = SUPPORT_WIDTH[self.normalizer]
        if auxiliary is not None:
            self.check_auxiliary_loss()
        with torch.autocast(memory.device.type, enabled=False):
            hidden = self._in_slot_width(hidden, memory)
            own_score, token_scores = self._score(memory, hidden=hidden, terminal=terminal)
            if padding_mask is not None:
                token_scores = token_scores.masked_fill(padding_mask[:, None, None, :], float("-inf"))
            if auxiliary is not None:
                self._add_auxiliary_loss(auxiliary, (token_scores - own_score).amax(dim=-2))
            if self.competition:
                matching = match_slots(token_scores - own_score, least=-support_width, sharing=self.sharing)
                token_scores = token_scores.masked_fill(~matching, float("-inf"))
            weights = normalize_scores(torch.cat([own_score, token_scores], dim=-1), self.normalizer)
            kept = weights[..., :1] * split_heads(memory, self.num_heads)
            taken = weights[..., 1:] @ self._project(hidden, self.value)
            if record is not None:
                record.writer, record.taken = weights.detach(), merge_heads(taken.detach())
            return merge_heads(kept + taken), 1 - weights[..., :1]

    def may_write(
        self, memory: Memory, *, hidden: Float[Tensor, "B J D"], terminal: Float[Tensor, "slots W"]
    ) -> Bool[Tensor, "B J"]:
        """Return False at tokens that no slot takes; True also at those that a rounding error could make one take.

        The normalizer must be sparse. A segment of which no token is taken leaves every slot as it is.
        """
        with torch.autocast(memory.device.type, enabled=False):
            hidden = self._in_slot_width(hidden, memory)
            own_score, token_scores = self._score(memory, hidden=hidden, terminal=terminal)
            return (token_scores - own_score).amax(dim=(1, 2)) > -(SUPPORT_WIDTH[self.normalizer] + _ROUNDING)

    @property
    def is_sparse(self) -> bool:
        """Whether the normalizer can give a token weight 0."""
        return math.isfinite(SUPPORT_WIDTH[self.normalizer])

    def check_auxiliary_loss(self) -> None:
        """Check that a write penalty is possible: the normalizer can give a token weight 0.

        Raises:
            InputError: The normalizer is the softmax, which writes every token.
        """
        if not self.is_sparse:
            raise InputError(
                f"write_normalizer ({self.normalizer!r}) writes every token; "
                "a write penalty needs a sparse normalizer (entmax15 or sparsemax)"
            )

    def _add_auxiliary_loss(self, auxiliary: AuxiliaryLoss, highest: Float[Tensor, "B H S"]) -> None:
        """Fill in the write penalty and the shortfall, given each token's highest preference of any slot."""
        threshold = -SUPPORT_WIDTH[self.normalizer]
        excess = F.relu(highest - threshold + _MARGIN)
        best = highest.amax(dim=-1)
        penalty, shortfall = excess.log1p(), F.relu(threshold + _MARGIN - best)
        is_exempt = best == float("-inf")  # a row without tokens
        if auxiliary.is_filler is not None:
            others = penalty.masked_fill(highest == best[..., None], 0.0)
            penalty = torch.where(auxiliary.is_filler[:, None, None], _FILLER_SLOPE * excess, others)
            is_exempt = is_exempt | auxiliary.is_filler[:, None]
        auxiliary.total = penalty.sum() / self.num_heads
        auxiliary.shortfall = shortfall.masked_fill(is_exempt, 0.0).sum() / self.num_heads

    def _in_slot_width(self, hidden: Hidden, memory: Memory) -> Float[Tensor, "B R W"]:
        hidden = hidden.to(memory.dtype)
        return hidden if self.token_projection is None else called_in_dtype(self.token_projection, hidden)

    def _score(
        self, memory: Memory, *, hidden: Float[Tensor, "B R W"], terminal: Float[Tensor, "slots W"]
    ) -> tuple[Float[Tensor, "B H K 1"], Float[Tensor, "B H K R"]]:
        """Return the score of each slot for itself and for each token."""
        query = self._project(memory, self.query) / (math.sqrt(memory.shape[-1] / self.num_heads) * self.temperature)
        own_score = (query * self._project(memory, self.key)).sum(dim=-1, keepdim=True)
        if self.free_slot_bias is not None:
            free_slot = split_heads(terminal.to(memory.dtype)[None], self.num_heads)
            similarity = F.cosine_similarity(split_heads(memory, self.num_heads), free_slot, dim=-1)[..., None]
            own_score = own_score - self.free_slot_bias * similarity
        return own_score, query @ self._project(hidden, self.key).mT

    def _project(self, x: Tensor, projection: nn.Module) -> Tensor:
        return split_heads(called_in_dtype(projection, x), self.num_heads)


class MemoryNormalization(nn.Module):
    """Biased memory normalization: adds forgetting vectors and projects slots back to the sphere (v2, section 3.4).

        m_i <- radius (m_i' + v_i) / ||m_i' + v_i|| ;  M_0: m_i = radius v_i / ||v_i||

    Departure: the radius is sqrt(W) instead of 1, so that slots have RMS 1, like activations after LayerNorm. With
    other scales of the projections and of v_i, radius 1 has the same functions; but from the same initial scales it is
    another model: a slot's score for itself grows with the square of the radius, that for a token with the radius. With
    radius 1 a written value would outweigh the slot immediately.

    Args:
        num_slots: Number of slots K.
        width: Width W of a slot.
        forgetting_speeds: ||v_i|| / radius at initialization for the first and the last slot, log-uniform in between.
        exchangeable: Use one v for all slots. Departure: in the paper every slot has its own.
        forgetting: False: v_i is not added in the update, but it is still the initial state.
        only_when_written: Scale v_i, head by head, by the share of the slot that the writer replaced. Departure: in the
            paper every slot forgets at every timestep; here a slot that attends only to itself is kept forever.
        log_speeds: Learn v_i as a direction and the logarithm of its length. Departure: the paper learns the vector.
            With vectors, a few steps of an optimizer such as Adam, whose steps all have the same size, make slow slots
            forget as fast as the others.
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
        """Draw the directions of the forgetting vectors at random and set their speeds."""
        first, last = (math.log(speed) for speed in self.forgetting_speeds)
        log_speeds = torch.linspace(first, last, self.slot_bias.shape[0], device=self.slot_bias.device)
        with torch.no_grad():
            self.slot_bias.normal_()
            if self.log_speed is not None:
                self.log_speed.copy_(log_speeds)
            else:
                self.slot_bias.copy_(self.radius * log_speeds.exp()[:, None] * F.normalize(self.slot_bias, dim=-1))

    def forgetting_vectors(self) -> Float[Tensor, "vectors W"]:
        """Return v_i of every slot, or the one v that all slots share, in at least float32."""
        recompute_weights(self)
        slot_bias = _in_full_precision(self.slot_bias)
        if self.log_speed is None:
            return slot_bias
        return self.radius * _in_full_precision(self.log_speed).exp()[:, None] * F.normalize(slot_bias, dim=-1)

    def forward(self, memory: Memory, *, written: WrittenShare) -> Memory:
        """Return the slots after forgetting and normalization; both arguments are results of the writer.

        If `keeps_unwritten`, a slot that was not written is returned as it is.
        """
        changed = memory + self._added(memory, written) if self.forgetting else memory
        changed = self.radius * F.normalize(changed, dim=-1)
        if self.keeps_unwritten:
            # A slot of a memory of this model is on the sphere. Normalizing it again would only change its last bits.
            changed = torch.where((written == 0).all(dim=1), memory, changed)
        return changed

    @property
    def keeps_unwritten(self) -> bool:
        """Whether a slot that the writer leaves as it is stays so, bit for bit."""
        return self.only_when_written or not self.forgetting

    def share_left(self, memory: Memory, *, written: WrittenShare) -> Float[Tensor, "B K"]:
        """Return ||m'|| / (||m'|| + ||v||) of each slot: the share of the sum m' + v that is the written slot.

        It is from 0 to 1, and 1 where nothing is added. The arguments are those of `forward`.
        """
        length = memory.norm(dim=-1)
        if not self.forgetting:
            return torch.ones_like(length)
        # A slot of length 0 to which nothing is added has nothing that could be left.
        return length / (length + self._added(memory, written).norm(dim=-1)).clamp(min=torch.finfo(length.dtype).tiny)

    def _added(self, memory: Memory, written: WrittenShare) -> Float[Tensor, "#B #K W"]:
        """Return what forgetting adds to each slot."""
        forgetting = self.forgetting_vectors().to(memory.dtype)[None]
        if self.only_when_written:
            forgetting = merge_heads(written * split_heads(forgetting, written.shape[1]))
        return forgetting

    def initial_memory(self, batch_size: int) -> Memory:
        """Return M_0, the terminal state of forgetting, for each row, in at least float32."""
        recompute_weights(self)
        slots = self.radius * F.normalize(_in_full_precision(self.slot_bias), dim=-1)
        return slots.expand(batch_size, self.num_slots, -1)


def _in_full_precision(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
