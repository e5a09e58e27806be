"""Several remembered tokens as one: how a Compressive Transformer compresses, and what it learns that by."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from memformer.models.layers import CausalLayer
from memformer.nn.attention import keep_mask_of, split_heads
from memformer.nn.linear import Linear, linear
from memformer.nn.positions import Frame

Blocks = Float[Tensor, "B blocks rate D"]


@dataclass
class ReconstructionLoss:
    """How badly compressed memories stand for those they replace; filled by `encode` when it is passed in.

    Attributes:
        total: Scalar with gradient into the compression alone, summed over the segment's tokens and the layers: the
            mean square, over the width, of the difference between what a token reads of the old memories and of the
            compressed ones. A token counts 0 where nothing is compressed.
    """

    total: Tensor | None = None


class ConvolutionCompression(nn.Module):
    """A convolution over time whose stride is its kernel: one linear map of each block's tokens side by side.

    Args:
        width: Model width D.
        rate: Tokens c of a block.
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
    """The mean of each block's tokens."""

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
    """Return how differently a layer's attention reads blocks and what became of them (arXiv 1911.05507, Algorithm 2).

    By content alone, without positions or dropout. The layer's own weights get no gradient.

    Args:
        layer: The layer.
        x: The segment as it entered the layer, detached.
        blocks: Remembered tokens as they entered it, detached.
        compressed: What became of each block.
        is_block: False where there is none; a row without any has errors that mean nothing.
    """
    rate = blocks.shape[2]
    expected = _read_by_content(layer, x, blocks.flatten(1, 2), is_block.repeat_interleave(rate, dim=1))
    actual = _read_by_content(layer, x, compressed, is_block)
    return (actual - expected).square().mean(dim=(1, 3))


def _read_by_content(
    layer: CausalLayer, x: Float[Tensor, "B S D"], source: Float[Tensor, "B J D"], is_there: Bool[Tensor, "B J"]
) -> Float[Tensor, "B H S E"]:
    """Return what each token reads from the source, before the heads are put together."""
    norm, attention, width = layer.self_attention_norm, layer.self_attention, x.shape[-1]
    weight = attention.query_key_value.weight.detach()

    def normalize(states: Tensor) -> Tensor:
        return F.layer_norm(states, (width,), norm.weight.detach(), norm.bias.detach(), norm.eps)

    query = linear(normalize(x), weight[:width])
    key, value = linear(normalize(source), weight[width:]).chunk(2, dim=-1)
    query, key, value = (split_heads(part, attention.num_heads) for part in (query, key, value))
    return Frame().attend(query, key, value, keep_mask=keep_mask_of(~is_there))
