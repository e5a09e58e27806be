"""The encoder: reads a segment bidirectionally, together with the memory."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from memformer.models.config import MemoryEncoderConfig
from memformer.models.decoder import make_positions
from memformer.models.layers import EncoderLayer
from memformer.nn.attention import AttentionRecord, keep_mask_of
from memformer.shapes import Memory, SlotBias


class Encoder(nn.Module):
    """Encoder: bidirectional in its segment, reads the memory in every layer (arXiv 2010.06891v2, section 3.2).

    Args:
        config: The model's config.
    """

    def __init__(self, config: MemoryEncoderConfig) -> None:
        super().__init__()
        width, kernel = config.d_model, config.convolution_kernel
        self.convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width) if kernel else None
        self.position_embedding = nn.Embedding(config.segment_length, width) if config.position_embedding else None
        self.positions = make_positions(config)
        self.memory_norm = nn.LayerNorm(config.memory_width) if config.num_slots else None
        self.layers = nn.ModuleList(
            EncoderLayer(config, bias=self.positions.biased_projections) for _ in range(config.num_encoder_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        x: Float[Tensor, "L S D"],
        *,
        memory: Memory,
        padding_mask: Bool[Tensor, "L S"] | None,
        slot_bias: SlotBias | None = None,
        record: AttentionRecord | None = None,
    ) -> Float[Tensor, "L S D"]:
        """Return the hidden states of the segments; there may be several, one after the other, for each row.

        `slot_bias` is added to the scores by which tokens read the slots. `record` is for one segment for each row.
        """
        if self.convolution is not None:
            # Padding must be zero, like the convolution's padding beyond the ends of the segment.
            padded = x if padding_mask is None else x.masked_fill(padding_mask[..., None], 0.0)
            x = x + self.convolution(padded.mT).mT
        if padding_mask is None:
            positions = torch.arange(x.shape[1], device=x.device)
        else:
            positions = (~padding_mask).cumsum(dim=-1) - 1  # (B, S): the n-th token has position n, wherever padding is
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions.clamp(min=0))
        frame = self.positions(positions, key_positions=positions).prepare(x)
        keep_mask = keep_mask_of(padding_mask)
        # The memory may have a wider dtype than the parameters (float32 with bfloat16); reading does not need it.
        slots = None if self.memory_norm is None else self.memory_norm(memory.to(x.dtype))
        for layer in self.layers:
            x = layer(x, slots=slots, slot_bias=slot_bias, frame=frame, keep_mask=keep_mask, record=record)
        return self.norm(x)
