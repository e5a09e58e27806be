"""The Compressive Transformer (arXiv 1911.05507): a Transformer-XL that compresses what it would forget."""

from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from memformer.models.baseline_configs import CompressiveTransformerConfig
from memformer.models.compression import (
    ConvolutionCompression,
    MeanCompression,
    ReconstructionLoss,
    reconstruction_error,
)
from memformer.models.layers import CausalLayer
from memformer.models.next_token import TokenCounts
from memformer.models.transformer_xl import (
    TokenSlots,
    TransformerXL,
    append_slots,
    gather_slots,
    is_present,
    make_slots,
)
from memformer.shapes import AnyMemory, Hidden, Segment, SegmentPadding


class CompressiveTransformer(TransformerXL):
    """Every layer attends to the segment, to the last M tokens, and to C compressed memories of those before them.

    The memory has C + M slots, the compressed ones first, each part the oldest first, laid out as Transformer-XL's. A
    layer attends to both parts alike; in distances a compressed slot counts as one token.

    When tokens come in and the memory would hold more than M, its oldest leave in whole blocks of c tokens
    (`compression_rate`), no more blocks than needed; each block becomes one compressed slot, and the oldest of those
    are forgotten. So every token is compressed with its c - 1 neighbours, whatever the segments; where segments and M
    are multiples of c the memory always holds M tokens once a document has had so many, and else between M - c + 1 and
    M. Tokens of a segment longer than the memory go straight into blocks.

    No gradient flows into what is remembered, nor out of the likelihood into the compression, which learns to keep what
    attention reads (`ReconstructionLoss`): for that its loss is `reconstruction_weight` times the mean error, over the
    tokens read, of all layers together.

    Departures from arXiv 1911.05507: those of `TransformerXL`; the error is the mean of squares over the width, not the
    norm; of the compression functions only convolution and mean.

    Args:
        config: What to build.
    """

    config: CompressiveTransformerConfig
    config_class: ClassVar[type[CompressiveTransformerConfig]] = CompressiveTransformerConfig

    def __init__(self, config: CompressiveTransformerConfig) -> None:
        super().__init__(config)
        self.compressions = nn.ModuleList(
            ConvolutionCompression(config.d_model, rate=config.compression_rate)
            if config.compression == "convolution"
            else MeanCompression()
            for _ in range(config.num_layers)
        )

    @property
    def memory_shape(self) -> tuple[int, int]:
        """A slot for each compressed memory and each remembered token, and num_layers * D + 1."""
        num_tokens, width = super().memory_shape
        return self.config.compressed_length + num_tokens, width

    @property
    def auxiliary_weight(self) -> float:
        """Nats for each unit of the reconstruction loss; 0 where there is nothing to learn."""
        return self.config.reconstruction_weight if self.config.compression == "convolution" else 0.0

    def encode(
        self,
        segment: Segment,
        *,
        memory: AnyMemory | None = None,
        padding_mask: SegmentPadding | None = None,
        reconstruction: ReconstructionLoss | None = None,
    ) -> tuple[Hidden, AnyMemory]:
        """Read one segment; return the state of each token and the memory that leaves it.

        Args:
            segment: Token ids, 0 .. V (V is `[BOS]`).
            memory: The memory that enters; None for the initial memory.
            padding_mask: True at padding; None for none.
            reconstruction: Filled with how well what was compressed stands for what it replaces, if given.

        Raises:
            InputError: A token id or a shape is out of range, or the memory is another model's.
            InputTypeError: A dtype is wrong.
        """
        return self._encode(segment, memory, padding_mask, partial(self._read, reconstruction=reconstruction))

    def encode_with_auxiliary_loss(
        self, segment: Segment, *, memory: AnyMemory, padding_mask: SegmentPadding | None = None
    ) -> tuple[Hidden, AnyMemory, Float[Tensor, ""]]:
        """Read one segment as `encode` does; return also the reconstruction loss."""
        reconstruction = ReconstructionLoss()
        hidden, memory = self.encode(segment, memory=memory, padding_mask=padding_mask, reconstruction=reconstruction)
        assert reconstruction.total is not None
        return hidden, memory, reconstruction.total

    def _read(
        self,
        x: Hidden,
        *,
        memory: AnyMemory,
        num_tokens: TokenCounts | None,
        reconstruction: ReconstructionLoss | None = None,
    ) -> tuple[Hidden, AnyMemory]:
        memory = memory.detach()
        hidden, slots = self._run_layers(x, memory)
        if num_tokens is None:
            num_tokens = torch.full((x.shape[0],), x.shape[1], device=x.device)
        rate, length = self.config.compression_rate, self.config.memory_length
        old, recent = memory.split([self.config.compressed_length, length], dim=1)
        num_recent = is_present(recent).sum(dim=-1)
        num_blocks = (num_recent + num_tokens - length + rate - 1).clamp(min=0) // rate

        # As many blocks as there can be in any row; those from num_blocks on mean nothing and are not taken.
        most_blocks = -(-x.shape[1] // rate)
        places = (length - num_recent)[:, None] + torch.arange(most_blocks * rate, device=x.device)
        blocks = gather_slots(torch.cat([recent, slots], dim=1), places.clamp(max=length + x.shape[1] - 1))
        blocks = blocks.unflatten(1, (most_blocks, rate))  # (B, blocks, c, W)
        compressed = [
            compression(states.to(x.dtype))
            for compression, states in zip(self.compressions, self._split_layers(blocks), strict=True)
        ]
        if reconstruction is not None:
            is_block = torch.arange(most_blocks, device=x.device) < num_blocks[:, None]
            errors = self._reconstruction_errors(slots, blocks=blocks, compressed=compressed, is_block=is_block)
            is_token = torch.arange(x.shape[1], device=x.device) < num_tokens[:, None]
            reconstruction.total = errors.masked_fill(~is_token | ~is_block[:, :1], 0.0).sum()

        old = append_slots(old, make_slots(compressed).detach().to(memory.dtype), num_new=num_blocks)
        num_staying = num_recent + num_tokens - rate * num_blocks
        leaves = torch.arange(length, device=x.device) < length - num_staying[:, None]
        recent = append_slots(recent, slots, num_new=num_tokens).masked_fill(leaves[..., None], 0.0)
        return hidden, torch.cat([old, recent], dim=1)

    def _reconstruction_errors(
        self,
        slots: TokenSlots,
        *,
        blocks: Float[Tensor, "B blocks rate W"],
        compressed: list[Float[Tensor, "B blocks D"]],
        is_block: Bool[Tensor, "B blocks"],
    ) -> Float[Tensor, "B J"]:
        """Return the error of each token, all layers together."""
        layers = zip(self.layers, self._split_layers(slots), self._split_layers(blocks), compressed, strict=True)
        errors = []
        for layer, x, states, summary in layers:
            assert isinstance(layer, CausalLayer)
            dtype = summary.dtype
            errors.append(
                reconstruction_error(layer, x.to(dtype), blocks=states.to(dtype), compressed=summary, is_block=is_block)
            )
        return torch.stack(errors).sum(dim=0).to(slots.dtype)

    def _split_layers(self, slots: Tensor) -> tuple[Tensor, ...]:
        """Return the states of each layer."""
        return slots[..., :-1].split(self.config.d_model, dim=-1)
