"""Models for the decoding benchmark behind a common interface; `turns.py` runs each in a separate process.

    python benchmarks/generators.py NAME '{"width": 256, ...}'

The script builds one model and prints its properties as a line of JSON. It then answers each line on stdin (the length
of the context in tokens) with a line of JSON: the seconds of greedily decoding `num_tokens` tokens after that context,
and the bytes of the state. All models have the same width and number of layers, random weights, and bytes as tokens.
"""

# ruff: noqa: D102 - the methods are documented in Generator.

import argparse
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256


class Generator(ABC):
    """A model that decodes.

    Args:
        options: batch_size, segment_length, width, heads, layers, num_slots, num_tokens (to decode), threads.
    """

    model: nn.Module

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.batch_size: int = options["batch_size"]
        self.states: dict[int, Any] = {}
        self.model = self.build().eval()

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the model."""

    @abstractmethod
    def make_state(self, context: int) -> Any:
        """Return the state after `context` tokens."""

    @abstractmethod
    def decode(self, state: Any, num_tokens: int) -> Any:
        """Decode tokens one by one, and return the state for the next call."""

    @abstractmethod
    def state_bytes(self, state: Any) -> int:
        """Return the bytes of the state, over all rows."""

    def work(self, context: int) -> dict[str, Any]:
        """Return the seconds of decoding after `context` tokens."""
        if context not in self.states:
            self.states[context] = self.make_state(context)
        num_tokens = self.options["num_tokens"]
        started = time.perf_counter()
        self.states[context] = self.decode(self.states[context], num_tokens)
        seconds = time.perf_counter() - started
        state_bytes = self.state_bytes(self.states[context])
        return {"seconds": seconds, "tokens": num_tokens, "state_bytes": state_bytes}


class MemformerSession(Generator):
    """This project's `Session`; half of the layers encode and half decode."""

    compiled = False

    def build(self) -> nn.Module:
        from sizes import sized

        from memformer import Memformer

        return Memformer(sized(self.options))

    def make_state(self, context: int) -> Any:
        from memformer import Session

        session = Session(self.model, batch_size=self.batch_size, compiled=self.compiled)
        session.feed(torch.randint(0, VOCABULARY, (self.batch_size, context)))
        return session

    def decode(self, state: Any, num_tokens: int) -> Any:
        state.generate(num_tokens, temperature=0)
        return state

    def state_bytes(self, state: Any) -> int:
        return state.state_bytes


class CompiledSession(MemformerSession):
    """This project's `Session` with a compiled decoding step."""

    compiled = True


class GPT2(Generator):
    """GPT-2 from `transformers` with its cache, filled at random: the contents do not change the time."""

    def build(self) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        options = self.options
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=options["longest_context"] + 2 * options["num_tokens"],
            n_embd=options["width"],
            n_layer=options["layers"],
            n_head=options["heads"],
            activation_function="gelu",
            attn_implementation="sdpa",
        )
        return GPT2LMHeadModel(config)

    def random_cache(self, context: int) -> list[tuple[Tensor, Tensor]]:
        config = self.model.config
        shape = self.batch_size, config.n_head, context, config.n_embd // config.n_head
        return [(torch.randn(shape), torch.randn(shape)) for _ in range(config.n_layer)]

    def make_state(self, context: int) -> Any:
        return self.random_cache(context)

    def decode(self, state: Any, num_tokens: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache.from_legacy_cache(tuple(state))
        tokens = torch.zeros((self.batch_size, 1), dtype=torch.int64)
        for _ in range(num_tokens):
            tokens = self.model(tokens, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(dim=-1)
        return state  # the next call starts from the same context

    def state_bytes(self, state: Any) -> int:
        return sum(tensor.nbytes for layer in state for tensor in layer)


class GPT2Preallocated(GPT2):
    """GPT-2 with a cache that is allocated once, and one attention call per layer."""

    def make_state(self, context: int) -> Any:
        cache = self.random_cache(context + self.options["num_tokens"])
        return context, cache

    def decode(self, state: Any, num_tokens: int) -> Any:
        start, cache = state
        tokens = torch.zeros((self.batch_size, 1), dtype=torch.int64)
        for position in range(start, start + num_tokens):
            tokens = self._step(tokens, position, cache).argmax(dim=-1)
        return state

    def _step(self, tokens: Tensor, position: int, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        body = self.model.transformer
        x = body.wte(tokens) + body.wpe.weight[position]
        for block, (keys, values) in zip(body.h, cache, strict=True):
            query, key, value = (
                part.unflatten(-1, (self.model.config.n_head, -1)).transpose(1, 2)
                for part in block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1)
            )
            keys[:, :, position : position + 1], values[:, :, position : position + 1] = key, value
            read = F.scaled_dot_product_attention(query, keys[:, :, : position + 1], values[:, :, : position + 1])
            x = x + block.attn.c_proj(read.transpose(1, 2).flatten(-2))
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
        return self.model.lm_head(body.ln_f(x))

    def state_bytes(self, state: Any) -> int:
        return super().state_bytes(state[1])


class Mamba(Generator):
    """Mamba from `transformers`, in its pure PyTorch version (the only one for a CPU)."""

    def build(self) -> nn.Module:
        from transformers import MambaConfig, MambaForCausalLM

        options = self.options
        return MambaForCausalLM(
            MambaConfig(vocab_size=VOCABULARY, hidden_size=options["width"], num_hidden_layers=options["layers"])
        )

    def make_state(self, context: int) -> Any:
        # The state has the same size after any number of tokens, so one segment is enough.
        tokens = torch.randint(0, VOCABULARY, (self.batch_size, self.options["segment_length"]))
        return self.model(tokens, use_cache=True).cache_params

    def decode(self, state: Any, num_tokens: int) -> Any:
        position = torch.tensor([self.options["segment_length"]])
        tokens = torch.zeros((self.batch_size, 1), dtype=torch.int64)
        for _ in range(num_tokens):
            output = self.model(tokens, cache_params=state, use_cache=True, cache_position=position)
            tokens = output.logits[:, -1:].argmax(dim=-1)
        return state

    def state_bytes(self, state: Any) -> int:
        return sum(tensor.nbytes for tensors in (state.conv_states, state.ssm_states) for tensor in tensors)


class Rwkv(Generator):
    """RWKV-4 from `transformers`."""

    def build(self) -> nn.Module:
        from transformers import RwkvConfig, RwkvForCausalLM

        options = self.options
        return RwkvForCausalLM(
            RwkvConfig(vocab_size=VOCABULARY, hidden_size=options["width"], num_hidden_layers=options["layers"])
        )

    def make_state(self, context: int) -> Any:
        return self.model(torch.zeros((self.batch_size, 1), dtype=torch.int64), use_cache=True).state

    def decode(self, state: Any, num_tokens: int) -> Any:
        tokens = torch.zeros((self.batch_size, 1), dtype=torch.int64)
        for _ in range(num_tokens):
            output = self.model(tokens, state=state, use_cache=True)
            state, tokens = output.state, output.logits[:, -1:].argmax(dim=-1)
        return state

    def state_bytes(self, state: Any) -> int:
        return sum(tensor.nbytes for tensor in state)


GENERATORS: dict[str, Callable[[dict[str, Any]], Generator]] = {
    "memformer": MemformerSession,
    "memformer-compiled": CompiledSession,
    "gpt2": GPT2,
    "gpt2-preallocated": GPT2Preallocated,
    "mamba": Mamba,
    "rwkv": Rwkv,
}


@torch.no_grad()
def main() -> None:
    """Build the model, print its properties, and decode once for each line on stdin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=GENERATORS)
    parser.add_argument("options", type=json.loads, help="A JSON object.")
    arguments = parser.parse_args()
    name, options = arguments.name, arguments.options
    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    generator = GENERATORS[name](options)
    parameters = sum(parameter.numel() for parameter in generator.model.parameters())
    print(json.dumps({"parameters": parameters, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(generator.work(int(line))), flush=True)


if __name__ == "__main__":
    main()
