"""Models and rollouts of the GPU measurements, in the sizes of the paper's experiments and a larger one."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from memformer import Rollout
from memformer.models import LanguageModel, build_model
from memformer.models.config import ModelConfig
from memformer.models.loading import MODELS
from memformer.models.presets import PAPER_DECODER


@dataclass(frozen=True)
class Size:
    """A model and the rollout of one update, without the optimizer's step.

    Attributes:
        model: Config of the model.
        batch_size: Rows.
        num_timesteps: Timesteps of the rollout.
        readout_timesteps: Timesteps read out together.
        peer_layers: Layers of the models that this one is compared with, as in the paper's tables. 0: none.
        peer_memory: Memory of the Transformer-XL that it is compared with.
        model_type: Type of the model.
    """

    model: dict[str, Any]
    batch_size: int
    num_timesteps: int
    readout_timesteps: int
    peer_layers: int = 0
    peer_memory: int = 0
    model_type: str = "memformer"

    def config(self) -> ModelConfig:
        """Return the model's config."""
        return MODELS[self.model_type].config_class.from_dict(self.model)

    def build(self, device: torch.device) -> LanguageModel:
        """Return the model with initial weights, in training mode."""
        torch.manual_seed(0)
        return build_model(self.config()).to(device).train()

    def transformer_xl(self) -> "Size":
        """Return a Transformer-XL that is trained on the same tokens."""
        shared = ("vocab_size", "d_model", "num_heads", "d_ff", "segment_length", "dropout")
        model = {name: self.model[name] for name in shared}
        model |= {"num_layers": self.peer_layers, "memory_length": self.peer_memory}
        return replace(self, model=model, model_type="transformer_xl", peer_layers=0, peer_memory=0)

    def title(self) -> str:
        """Return the name of a Transformer-XL."""
        return f"Transformer-XL, {self.model['num_layers']} layers, memory {self.model['memory_length']}"

    def rollout(self) -> Rollout:
        """Return a rollout of random tokens on the CPU, as a training stream makes it at the start of documents."""
        config, shape = self.config(), (self.num_timesteps, self.batch_size, self.model["segment_length"])
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, config.vocab_size, shape, generator=generator)
        first = torch.full((1, *shape[1:]), 0)
        first[..., 0] = config.vocab_size  # [BOS], then padding
        padding, reset = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape[:2], dtype=torch.bool)
        padding[0, :, 1:], reset[0] = True, True
        return Rollout(inputs=torch.cat([first, tokens[:-1]]), targets=tokens, reset=reset, input_padding=padding)

    @property
    def num_tokens(self) -> int:
        """Targets of one update."""
        return self.num_timesteps * self.batch_size * int(self.model["segment_length"])


# The paper's decoder, so that figures of different versions can be compared; the default's beside it in two sizes.
_MNIST_DEFAULT = {
    "vocab_size": 256,
    "d_model": 128,
    "num_heads": 4,
    "d_ff": 256,
    "num_encoder_layers": 4,
    "num_decoder_layers": 8,
    "num_slots": 64,
    "dropout": 0.1,
}
_WIKITEXT_DEFAULT = {
    "vocab_size": 50257,
    "d_model": 512,
    "num_heads": 8,
    "d_ff": 2048,
    "num_encoder_layers": 4,
    "num_decoder_layers": 16,
    "num_slots": 1024,
    "dropout": 0.1,
}
_MNIST, _WIKITEXT = {**_MNIST_DEFAULT, **PAPER_DECODER}, {**_WIKITEXT_DEFAULT, **PAPER_DECODER}
_TABLE_3 = {**_WIKITEXT, "vocab_size": 50000, "num_decoder_layers": 12, "num_slots": 32, "segment_length": 512}
SIZES = {
    "MNIST, segments of 14": Size({**_MNIST, "segment_length": 14}, 64, 56, 11, peer_layers=8, peer_memory=224),
    "MNIST, segments of 28": Size({**_MNIST, "segment_length": 28}, 128, 28, 9, peer_layers=8, peer_memory=224),
    "WikiText-103, segments of 64": Size(
        {**_WIKITEXT, "segment_length": 64}, 64, 9, 4, peer_layers=16, peer_memory=512
    ),
    "MNIST, segments of 28, the default's decoder": Size({**_MNIST_DEFAULT, "segment_length": 28}, 128, 28, 9),
    "WikiText-103, segments of 64, the default's decoder": Size({**_WIKITEXT_DEFAULT, "segment_length": 64}, 64, 9, 4),
    "WikiText-103, segments of 256": Size(
        {**_WIKITEXT, "segment_length": 256}, 16, 9, 4, peer_layers=16, peer_memory=512
    ),
    "Table 3": Size(_TABLE_3, 4, 5, 1),
    "Table 3, horizon 16": Size(_TABLE_3, 4, 17, 1),
    "larger": Size(
        {
            **_WIKITEXT,
            "d_model": 1024,
            "num_heads": 16,
            "d_ff": 4096,
            "num_encoder_layers": 6,
            "num_decoder_layers": 18,
            "num_slots": 512,
            "segment_length": 256,
        },
        16,
        5,
        2,
    ),
}


def sizes(*, smoke: bool) -> dict[str, Size]:
    """Return the sizes by name; with `smoke`, each with a tiny model and rollout."""
    if not smoke:
        return SIZES
    tiny = {"vocab_size": 11, "d_model": 16, "num_heads": 2, "d_ff": 32, "num_slots": 4, "segment_length": 6}
    tiny |= {"num_encoder_layers": 1, "num_decoder_layers": 1}
    return {
        name: replace(
            size,
            model={**size.model, **tiny},
            batch_size=2,
            num_timesteps=3,
            readout_timesteps=2,
            peer_layers=1,
            peer_memory=4,
        )
        for name, size in list(SIZES.items())[:1]
    }
