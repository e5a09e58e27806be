"""Models of `transformers` to compare with: generation after contexts filled at random, and a GPT-2 to train.

The contents of a context do not change the time.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.device import DEVICE, synchronize
from benchmarks.gpu.sizes import Size

VOCABULARY, WIDTH, HEADS, LAYERS = 256, 512, 8, 16
NUM_TOKENS = 32


def gpt2(length: int, *, recorded: bool) -> dict[str, Any]:
    """Return the milliseconds per token of GPT-2 by its cache, or by one CUDA graph over a preallocated cache."""
    from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=length + 4 * NUM_TOKENS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config).to(DEVICE).eval()
    shape = 1, HEADS, length, WIDTH // HEADS
    caches = [tuple(torch.randn(shape, device=DEVICE) for _ in range(2)) for _ in range(LAYERS)]
    tokens = torch.zeros((1, 1), dtype=torch.int64, device=DEVICE)
    if recorded:
        step: Callable[[], object] = record(lambda: tokens.copy_(_step(model, tokens, length - 1, caches).argmax(-1)))
    else:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(caches):
            cache.update(keys, values, layer)

        def step() -> None:
            tokens.copy_(model(tokens, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(dim=-1))

    return {"ms_per_token": milliseconds(step), "state_bytes": sum(t.nbytes for pair in caches for t in pair)}


def record(work: Callable[[], object]) -> Callable[[], object]:
    """Return a function that launches some work as one CUDA graph."""
    for _ in range(2):
        work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _step(model: nn.Module, tokens: Tensor, position: int, caches: list[tuple[Tensor, ...]]) -> Tensor:
    """Return GPT-2's logits of one token, with one attention call per layer over a preallocated cache."""
    body: Any = model.transformer
    x = body.wte(tokens) + body.wpe.weight[position]
    for block, (keys, values) in zip(body.h, caches, strict=True):
        query, key, value = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1)
        )
        keys[:, :, position : position + 1], values[:, :, position : position + 1] = key, value
        read = F.scaled_dot_product_attention(query, keys, values)
        x = x + block.attn.c_proj(read.transpose(1, 2).flatten(-2))
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
    return model.lm_head(body.ln_f(x))  # type: ignore[operator,no-any-return]  # not annotated


def gpt2_of_size(size: Size) -> nn.Module:
    """Return a GPT-2 in training mode whose context is all tokens of a row of a rollout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model, dropout = size.model, size.model["dropout"]
    config = GPT2Config(
        vocab_size=model["vocab_size"],
        n_positions=size.num_timesteps * model["segment_length"],
        n_embd=model["d_model"],
        n_layer=size.peer_layers,
        n_head=model["num_heads"],
        n_inner=model["d_ff"],
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    found: nn.Module = GPT2LMHeadModel(config).to(DEVICE).train()
    return found


def gpt2_flops_per_token(size: Size) -> float:
    """Return the operations of one token, forward, counted as `flops_per_token` does."""
    model, length = size.model, size.num_timesteps * size.model["segment_length"]
    width, d_ff = model["d_model"], model["d_ff"]
    layer = 2 * (4 * width**2 + 2 * width * d_ff) + 4 * length * width
    return float(size.peer_layers * layer + 2 * width * model["vocab_size"])


def mamba() -> dict[str, Any]:
    """Return the milliseconds per token of Mamba as `transformers` computes it without further packages."""
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS))
    model = model.to(DEVICE).eval()
    tokens = torch.zeros((1, 1), dtype=torch.int64, device=DEVICE)
    state = model(tokens.expand(1, 64), use_cache=True).cache_params

    def step() -> None:
        output = model(tokens, cache_params=state, use_cache=True)
        tokens.copy_(output.logits[:, -1:].argmax(dim=-1))

    return {"ms_per_token": milliseconds(step)}


def rwkv() -> dict[str, Any]:
    """Return the milliseconds per token of RWKV-4 as `transformers` computes it without further packages."""
    from transformers import RwkvConfig, RwkvForCausalLM

    model = RwkvForCausalLM(RwkvConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS))
    model = model.to(DEVICE).eval()
    tokens = torch.zeros((1, 1), dtype=torch.int64, device=DEVICE)
    state = model(tokens, use_cache=True).state

    def step() -> None:
        nonlocal state
        output = model(tokens, state=state, use_cache=True)
        state = output.state
        tokens.copy_(output.logits[:, -1:].argmax(dim=-1))

    return {"ms_per_token": milliseconds(step), "state_bytes": sum(tensor.nbytes for tensor in state)}


@torch.no_grad()
def milliseconds(step: Callable[[], object]) -> float:
    """Return the milliseconds of one step."""
    for _ in range(8):
        step()
    synchronize()
    started = time.perf_counter()
    for _ in range(NUM_TOKENS):
        step()
    synchronize()
    return 1e3 * (time.perf_counter() - started) / NUM_TOKENS
