"""The Compressive Transformer (arXiv 1911.05507): a Transformer-XL that compresses its oldest memories."""

from functools import partial
from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from memformer.models.baseline_configs import CompressiveTransformerConfig
from memformer.models.compression import (
    ConvolutionCompression,
    MeanCompression,
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
from memformer.nn.auxiliary import AuxiliaryLoss
from memformer.shapes import Hidden, Memory, Segment, SegmentPadding


class CompressiveTransformer(TransformerXL):
    """Transformer-XL whose layers also attend to C compressed memories of the tokens before the last M tokens.

    The memory has C + M slots, the compressed ones first and each part oldest first, in Transformer-XL's layout. A
    layer attends to both parts in the same way; in distances a compressed slot counts as one token.

    When new tokens would make the memory exceed M tokens, the oldest tokens leave in whole blocks of c tokens
    (`compression_rate`), in no more blocks than needed. Each block becomes one compressed slot, and the oldest
    compressed slots are forgotten. So every token is compressed with its c - 1 neighbours, independent of the
    segmentation. If segments and M are multiples of c, the memory always holds M tokens once a document has had that
    many; otherwise it holds M - c + 1 to M. If a segment is longer than the memory, tokens of it go directly into
    blocks.

    Memories are detached. The compression gets no gradient from the likelihood; it is trained by its reconstruction
    loss alone, to preserve the output of attention (see `encode`). This loss is `reconstruction_weight` times the error
    summed over layers, averaged over the tokens read.

    Departures from arXiv 1911.05507: those of `TransformerXL`; the error is the mean of squares over the width, not the
    norm; convolution and mean are the only compression functions.

    Args:
        config: The model's config.
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
        """Number of slots C + M and their width, num_layers * D + 1."""
        num_tokens, width = super().memory_shape
        return self.config.compressed_length + num_tokens, width

    def check_auxiliary_loss(self) -> None:
        """Accept: `encode` computes the reconstruction loss of every compression function."""

    @property
    def auxiliary_weight(self) -> float:
        """Weight of the reconstruction loss; 0 for a compression function without parameters."""
        return self.config.reconstruction_weight if self.config.compression == "convolution" else 0.0

    def encode(
        self,
        segment: Segment,
        *,
        memory: Memory | None = None,
        padding_mask: SegmentPadding | None = None,
        auxiliary: AuxiliaryLoss | None = None,
    ) -> tuple[Hidden, Memory]:
        """Read one segment; return the hidden state of each token and the next memory.

        Args:
            segment: Token ids, 0 .. V (V is `[BOS]`).
            memory: The current memory. None: the initial memory.
            padding_mask: True at padding. None: no padding.
            auxiliary: Receives the reconstruction loss, if given, summed over the segment's tokens and the layers. For
                one token and layer it is the mean square, over the width, of the difference between the attention
                outputs over the old memories and over the compressed ones. It is 0 in rows where nothing is compressed.

        Raises:
            InputError: A token id or a shape is out of range, or the memory is of another model.
            InputTypeError: A dtype is wrong.
        """
        return self._encode(segment, memory, padding_mask, partial(self._read, auxiliary=auxiliary))

    def _read(
        self,
        x: Hidden,
        *,
        memory: Memory,
        num_tokens: TokenCounts | None,
        auxiliary: AuxiliaryLoss | None = None,
    ) -> tuple[Hidden, Memory]:
        memory = memory.detach()
        hidden, slots = self._run_layers(x, self._attended(memory))
        if num_tokens is None:
            num_tokens = torch.full((x.shape[0],), x.shape[1], device=x.device)
        rate, length = self.config.compression_rate, self.config.memory_length
        old, recent = memory.split([self.config.compressed_length, length], dim=1)
        num_recent = is_present(recent).sum(dim=-1)
        num_blocks = (num_recent + num_tokens - length + rate - 1).clamp(min=0) // rate

        # The largest possible number of blocks in any row; those from num_blocks on are meaningless and not used.
        max_blocks = -(-x.shape[1] // rate)
        indices = (length - num_recent)[:, None] + torch.arange(max_blocks * rate, device=x.device)
        blocks = gather_slots(torch.cat([recent, slots], dim=1), indices.clamp(max=length + x.shape[1] - 1))
        blocks = blocks.unflatten(1, (max_blocks, rate))  # (B, blocks, c, W)
        compressed = [
            compression(states.to(x.dtype))
            for compression, states in zip(self.compressions, self._split_layers(blocks), strict=True)
        ]
        if auxiliary is not None:
            is_block = torch.arange(max_blocks, device=x.device) < num_blocks[:, None]
            errors = self._reconstruction_errors(slots, blocks=blocks, compressed=compressed, is_block=is_block)
            is_token = torch.arange(x.shape[1], device=x.device) < num_tokens[:, None]
            auxiliary.total = errors.masked_fill(~is_token | ~is_block[:, :1], 0.0).sum()

        old = append_slots(old, make_slots(compressed).detach().to(memory.dtype), num_new=num_blocks)
        num_kept = num_recent + num_tokens - rate * num_blocks
        is_removed = torch.arange(length, device=x.device) < length - num_kept[:, None]
        recent = append_slots(recent, slots, num_new=num_tokens).masked_fill(is_removed[..., None], 0.0)
        return hidden, torch.cat([old, recent], dim=1)

    def _keeps_keys(self) -> bool:
        return type(self) is CompressiveTransformer and self._has_own_layers()

    def _attended(self, memory: Memory) -> Memory:
        # Empty slots before all others: between compressed memories and tokens they would add to distances.
        return gather_slots(memory, _order_with_empty_first(is_present(memory)))

    def _reconstruction_errors(
        self,
        slots: TokenSlots,
        *,
        blocks: Float[Tensor, "B blocks rate W"],
        compressed: list[Float[Tensor, "B blocks D"]],
        is_block: Bool[Tensor, "B blocks"],
    ) -> Float[Tensor, "B J"]:
        """Return the error of each token, summed over layers."""
        layers = zip(self.layers, self._split_layers(slots), self._split_layers(blocks), compressed, strict=True)
        errors = []
        for layer, x, states, summary in layers:
            dtype, own = summary.dtype, cast(CausalLayer, layer)  # or a wrapper of it
            errors.append(
                reconstruction_error(own, x.to(dtype), blocks=states.to(dtype), compressed=summary, is_block=is_block)
            )
        return torch.stack(errors).sum(dim=0).to(slots.dtype)

    def _split_layers(self, slots: Tensor) -> tuple[Tensor, ...]:
        """Return the states of each layer."""
        return slots[..., :-1].split(self.config.d_model, dim=-1)


def _order_with_empty_first(present: Bool[Tensor, "B K"]) -> Int64[Tensor, "B K"]:
    """Return the indices of the empty slots of each row, then those of the others; ONNX has no stable sort for this."""
    num_empty = (~present).sum(dim=1, keepdim=True)
    places = torch.where(present, num_empty + present.cumsum(dim=1), (~present).cumsum(dim=1)) - 1
    slots = torch.arange(present.shape[1], device=present.device).expand_as(places)
    return torch.zeros_like(places).scatter(1, places, slots)
