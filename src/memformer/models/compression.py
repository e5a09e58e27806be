"""Compression functions of the Compressive Transformer, and their reconstruction loss."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from memformer.models.layers import CausalLayer
from memformer.nn.attention import keep_mask_of, split_heads
from memformer.nn.linear import Linear, called_detached, part_of_output
from memformer.nn.positions import Frame

Blocks = Float[Tensor, "B blocks rate D"]


class ConvolutionCompression(nn.Module):
    """Convolution over time with stride equal to kernel width: one linear map of each block's concatenated tokens.

    Args:
        width: Model width D.
        rate: Number of tokens c per block.
    """

    def __init__(self, width: int, *, rate: int) -> None:
        super().__init__()
        self.projection = Linear(rate * width, width)
        nn.init.normal_(self.projection.weight, std=self.projection.in_features**-0.5)
        nn.init.zeros_(self.projection.bias)

    def forward(self, blocks: Blocks) -> Float[Tensor, "B blocks D"]:
        """Return one state for each block."""
        return self.projection(blocks.flatten(-2))


class MeanCompression(nn.Module):
    """Mean of each block's tokens."""

    def forward(self, blocks: Blocks) -> Float[Tensor, "B blocks D"]:
        """Return one state for each block."""
        return blocks.mean(dim=-2)


def reconstruction_error(
    layer: CausalLayer,
    x: Float[Tensor, "B S D"],
    *,
    blocks: Blocks,
    compressed: Float[Tensor, "B blocks D"],
    is_block: Bool[Tensor, "B blocks"],
) -> Float[Tensor, "B S"]:
    """Return the mean squared error of a layer's attention over compressed states (arXiv 1911.05507, Algorithm 2).

    The error is relative to attention over the blocks' tokens. Attention is computed by content alone, without
    positions or dropout. The layer's own weights get no gradient.

    Args:
        layer: The layer.
        x: The layer's input for the segment, detached.
        blocks: The layer's input for the remembered tokens, detached.
        compressed: Compressed state of each block.
        is_block: False where there is no block; the errors of a row without blocks are meaningless.
    """
    rate = blocks.shape[2]
    expected = _read_by_content(layer, x, blocks.flatten(1, 2), is_block.repeat_interleave(rate, dim=1))
    actual = _read_by_content(layer, x, compressed, is_block)
    return (actual - expected).square().mean(dim=(1, 3))


def _read_by_content(
    layer: CausalLayer, x: Float[Tensor, "B S D"], source: Float[Tensor, "B J D"], is_present: Bool[Tensor, "B J"]
) -> Float[Tensor, "B H S E"]:
    """Return the attention output of each token over `source`, before the heads are merged."""
    norm, attention, width = layer.self_attention_norm, layer.self_attention, x.shape[-1]
    projection = attention.query_key_value
    query = part_of_output(projection, called_detached(norm, x), slice(width), detached=True)
    key_value = part_of_output(projection, called_detached(norm, source), slice(width, None), detached=True)
    key, value = key_value.chunk(2, dim=-1)
    query, key, value = (split_heads(part, attention.num_heads) for part in (query, key, value))
    return Frame().attend(query, key, value, keep_mask=keep_mask_of(~is_present))
