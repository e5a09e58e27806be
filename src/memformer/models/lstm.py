"""LSTM baseline of the paper's Table 1."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from memformer.models.baseline_configs import LSTMConfig
from memformer.models.next_token import NextTokenModel, SegmentState, TokenCounts
from memformer.nn.linear import has_hooks
from memformer.shapes import Hidden, Memory, Segment


def _is_plain(layer: nn.Module) -> bool:
    """Return whether the layer computes what its weights say: it is no other module, and has no hooks."""
    return type(layer) is nn.LSTM and not has_hooks(layer)


class LSTM(NextTokenModel):
    """LSTM layers between an embedding and an output projection tied to it.

    The memory is the LSTM's state: h of each layer, then c of each layer, as K = 2 * num_layers slots of width D. So
    every segmentation of a document gives the same states. Computed in the parameters' dtype, even under autocast, so
    that the state does not drift. Dropout is applied to the embedding and between layers.

    The paper (arXiv 2010.06891v2, Table 1) gives neither the number of layers nor the dropout of its LSTM. Departure
    from the other models' initialization: weights are drawn as in torch.nn.LSTM; biases start at 0, except those of the
    forget gates, which start at 1 so that cells keep their content at first.

    Args:
        config: The model's config.
    """

    config: LSTMConfig
    config_class: ClassVar[type[LSTMConfig]] = LSTMConfig

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        # One torch.nn.LSTM per layer: on a GPU, its own dropout uses a cuDNN generator that cannot be reset, but replay
        # must repeat the same dropout.
        self.layers = nn.ModuleList(
            nn.LSTM(config.d_model, config.d_model, batch_first=True) for _ in range(config.num_layers)
        )
        self.dropout = nn.Dropout(config.dropout)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        super()._initialise()
        width = self.config.d_model
        for name, parameter in self.layers.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            if "bias_ih" in name:
                parameter[width : 2 * width] = 1.0  # gates are input, forget, cell, output

    @property
    def memory_shape(self) -> tuple[int, int]:
        """Number of slots, two per layer, and the width D."""
        return 2 * self.config.num_layers, self.config.d_model

    def _read(self, x: Hidden, *, memory: Memory, num_tokens: TokenCounts | None) -> tuple[Hidden, Memory]:
        # A quantized layer has no parameters.
        dtype, length = next((weight.dtype for weight in self.layers.parameters()), x.dtype), x.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            states = memory.to(dtype).transpose(0, 1).contiguous()  # (K, B, D)
            sequence: Tensor | PackedSequence = x.to(dtype)
            if num_tokens is not None:
                # Every row needs a token here; the state of a row without tokens is not used.
                lengths = num_tokens.clamp(min=1).cpu()
                sequence = pack_padded_sequence(x.to(dtype), lengths, batch_first=True, enforce_sorted=False)
            h, c = (list(half.split(1)) for half in states.chunk(2))
            for index, layer in enumerate(self.layers):
                sequence, (h[index], c[index]) = layer(
                    self._drop(sequence) if index else sequence, (h[index], c[index])
                )
            if isinstance(sequence, PackedSequence):
                sequence, _ = pad_packed_sequence(sequence, batch_first=True, total_length=length)
            return sequence, torch.cat([*h, *c]).transpose(0, 1).to(memory.dtype)

    def begin_segment(self, memory: Memory) -> SegmentState:
        """Return the memory, which is all that the next tokens need."""
        if type(self) is not LSTM:  # a subclass may read otherwise
            return super().begin_segment(memory)
        return SegmentState([memory.clone()])

    def read_tokens(
        self, tokens: Segment, state: SegmentState, *, positions: Segment, num_tokens: int
    ) -> tuple[Hidden, SegmentState]:
        """Read the next tokens of a segment; arguments and result as in `NextTokenModel`."""
        if state.reads_again:
            return super().read_tokens(tokens, state, positions=positions, num_tokens=num_tokens)
        memory, padding = state.rows[0], positions == self.segment_length
        if tokens.shape[1] > 1 or not all(_is_plain(layer) for layer in self.layers):
            hidden, memory = self.encode(tokens, memory=memory, padding_mask=padding if padding.any() else None)
            return hidden, SegmentState([memory])
        hidden, next_memory = self._read_one(self._embed(tokens), memory)
        return hidden, SegmentState([torch.where(padding[..., None], memory, next_memory)])

    def _read_one(self, x: Float[Tensor, "B 1 D"], memory: Memory) -> tuple[Hidden, Memory]:
        """Return what `_read` returns, for one token and without dropout.

        PyTorch's function for sequences rearranges the weights at every call on a CPU: one token of width 384 takes
        2 ms in it and 0.2 ms here.
        """
        dtype = next(self.layers.parameters()).dtype
        with torch.autocast(x.device.type, enabled=False):
            hidden = x[:, 0].to(dtype)
            h, c = (list(half.unbind(1)) for half in memory.to(dtype).chunk(2, dim=1))
            for index, layer in enumerate(self.layers):
                assert isinstance(layer, nn.LSTM)
                h[index], c[index] = torch.lstm_cell(hidden, (h[index], c[index]), *layer.all_weights[0])
                hidden = h[index]
            return hidden[:, None], torch.stack([*h, *c], dim=1).to(memory.dtype)

    def _drop(self, sequence: Tensor | PackedSequence) -> Tensor | PackedSequence:
        if isinstance(sequence, PackedSequence):
            return sequence._replace(data=self.dropout(sequence.data))
        return self.dropout(sequence)
