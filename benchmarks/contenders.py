"""Models for the speed benchmark behind a common interface; `turns.py` runs each in a separate process.

    python benchmarks/contenders.py NAME '{"batch_size": 4, ...}'

The script prints the properties of one model as a line of JSON, and answers each line on stdin ("train" or "evaluate")
with another: the seconds and the tokens of one unit of work, `num_segments` segments of every row. All are byte models
of one width and number of layers, with random weights and input. Training is forward and backward without optimizer.
"""

# ruff: noqa: D102 - the methods are documented in Contender.

import argparse
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

VOCABULARY = 256


class Contender(ABC):
    """A model and its unit of work.

    Args:
        options: batch_size, segment_length, num_segments, width, heads, layers, threads and precision, and the
            options of single models.
    """

    model: nn.Module

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.batch_size, self.length = options["batch_size"], options["segment_length"]
        self.num_segments = options["num_segments"]
        # One token more than the input, so that every token has a next one.
        self.tokens = torch.randint(0, VOCABULARY, (self.batch_size, self.num_segments * self.length + 1))
        self.model = self.build()

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the model."""

    @abstractmethod
    def train(self) -> None:
        """Compute the gradient of the mean loss over all tokens and add it to `.grad`."""

    @abstractmethod
    def evaluate(self) -> float:
        """Return the mean loss over all tokens."""

    def state_bytes(self) -> int:
        """Return the bytes of state that one row carries from segment to segment."""
        return 0

    def useful_flops(self) -> int:
        """Return the floating-point operations of forward and backward, without recomputation."""
        # On a CPU the counter does not know fused attention.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.train()
        return counter.get_total_flops()

    def segments(self) -> list[tuple[Tensor, Tensor]]:
        """Return the inputs and targets of each segment."""
        inputs, targets = self.tokens[:, :-1], self.tokens[:, 1:]
        return list(zip(inputs.split(self.length, dim=1), targets.split(self.length, dim=1), strict=True))

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context for the forward pass."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.options["precision"] == "bfloat16")


class Memformer(Contender):
    """This project's Memformer; `method` and `readout_timesteps` are those of `backpropagate`."""

    def build(self) -> nn.Module:
        from sizes import sized

        import memformer

        config = sized(self.options)
        # Segment t is predicted from segment t - 1, and the first one from the incoming memory, as in a long document.
        segments = self.tokens[:, 1:].unflatten(1, (self.num_segments, self.length)).movedim(1, 0)
        self.rollout = memformer.Rollout(inputs=segments.roll(1, dims=0), targets=segments.clone())
        self.model = memformer.Memformer(config)
        self.memory = self.model.initial_memory(self.batch_size).detach().clone()
        return self.model

    def train(self) -> None:
        self._train(self.options["method"])

    def _train(self, method: str) -> None:
        from memformer import backpropagate

        with self.autocast():
            backpropagate(
                self.model,
                self.rollout,
                memory=self.memory,
                method=method,
                readout_timesteps=self.options["readout_timesteps"],
            )

    def useful_flops(self) -> int:
        # Count with torch's own matrix products: the counter does not know those of oneDNN.
        torch.backends.mkldnn.enabled = False
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self._train("bptt")
        torch.backends.mkldnn.enabled = True
        return counter.get_total_flops()

    def evaluate(self) -> float:
        hiddens, memory = [], self.memory
        with self.autocast():
            for segment in self.rollout.inputs:
                hidden, memory = self.model.encode(segment, memory=memory)
                hiddens.append(hidden)
            nll = self.model.token_nll(self.rollout.targets.flatten(0, 1), hidden=torch.cat(hiddens))
        return float(nll.mean())

    def state_bytes(self) -> int:
        return self.memory[0].nbytes


class MemformerSession(Memformer):
    """A session of it, which by `evaluate` generates tokens, or reads them, `tokens_per_call` at a time."""

    def build(self) -> nn.Module:
        from memformer import Session

        self.session = Session(super().build().eval(), batch_size=self.batch_size, compiled=self.options["compiled"])
        self.session.feed(self.tokens[:, : self.length + 1])  # steps are compiled from the second segment on
        return self.model

    def evaluate(self) -> float:
        if "tokens_per_call" in self.options:
            list(map(self.session.feed, self.tokens[:, 1:].split(self.options["tokens_per_call"], dim=1)))
        else:
            self.session.generate(self.num_segments * self.length, temperature=0)
        return 0.0


class Lucidrains(Contender):
    """lucidrains/memformer with its replay, and a loss on every segment (its own loop has one on the last only)."""

    def build(self) -> nn.Module:
        from memformer import Memformer

        options, half = self.options, self.options["layers"] // 2
        shape = {"num_tokens": VOCABULARY, "heads": options["heads"], "depth": half}
        model = Memformer(
            dim=options["width"],
            num_memory_slots=options["num_slots"],
            mem_update_attn_heads=options["heads"],
            **{f"enc_{key}": value for key, value in {**shape, "max_seq_len": self.length}.items()},
            # Its wrapper drops the first token of the targets, so they have one token more.
            **{f"dec_{key}": value for key, value in {**shape, "max_seq_len": self.length + 1}.items()},
        )
        # The decoder predicts the segment after the encoder's; its wrapper also needs the token before that segment.
        segments = self.tokens[:, 1:].split(self.length, dim=1)
        self.pairs = [
            (source, torch.cat([source[:, -1:], target], dim=1))
            for source, target in zip([segments[-1], *segments[:-1]], segments, strict=True)
        ]
        return model

    def train(self) -> None:
        memories = [self.model.get_initial_mem(self.batch_size)]
        with torch.no_grad(), self.autocast():
            for source, _ in self.pairs[:-1]:
                memories.append(self.model(source, mems=memories[-1]).mem)
        memory_grad = torch.zeros_like(memories[0])
        for source, target in reversed(self.pairs):
            memory = memories.pop().detach().requires_grad_()
            with self.autocast():
                _, next_memory, loss = self.model(src=source, tgt=target, mems=memory)
            torch.autograd.backward([loss / len(self.pairs), next_memory], [None, memory_grad.to(next_memory.dtype)])
            memory_grad = memory.grad

    def evaluate(self) -> float:
        memory, losses = self.model.get_initial_mem(self.batch_size), []
        with self.autocast():
            for source, target in self.pairs:
                _, memory, loss = self.model(src=source, tgt=target, mems=memory)
                losses.append(float(loss))
        return sum(losses) / len(losses)

    def useful_flops(self) -> int:
        def unrolled() -> None:
            memory, total = self.model.get_initial_mem(self.batch_size), 0
            for source, target in self.pairs:
                _, memory, loss = self.model(src=source, tgt=target, mems=memory)
                total = total + loss
            total.backward()

        with FlopCounterMode(display=False) as counter:
            unrolled()
        return counter.get_total_flops()

    def state_bytes(self) -> int:
        return self.model.get_initial_mem(1).nbytes


class TransformerXL(Contender):
    """Transformer-XL from `transformers`; each layer keeps its hidden states of the last `memory_length` tokens."""

    def build(self) -> nn.Module:
        from transformers.models.deprecated.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel

        _mend_type_as()
        options = self.options
        config = TransfoXLConfig(
            vocab_size=VOCABULARY,
            d_model=options["width"],
            d_embed=options["width"],
            n_head=options["heads"],
            d_head=options["width"] // options["heads"],
            d_inner=4 * options["width"],
            n_layer=options["layers"],
            mem_len=options["memory_length"],
            cutoffs=[],
            div_val=1,
            adaptive=False,
            proj_share_all_but_first=False,
            dropout=0.0,
            dropatt=0.0,
        )
        self.memory: list[Tensor] | None = None
        model = TransfoXLLMHeadModel(config)
        self.model = model
        with torch.no_grad():
            while self.memory is None or self.memory[0].shape[0] < config.mem_len:
                self._read(self.segments()[0][0])
        return model

    def _read(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        with self.autocast():
            output = self.model.transformer(tokens, mems=self.memory)
            self.memory = output.mems
            if labels is None:
                return output.last_hidden_state
            log_probabilities = self.model.crit(output.last_hidden_state.flatten(0, 1))
            return F.nll_loss(log_probabilities.float(), labels.flatten())

    def train(self) -> None:
        for tokens, following in self.segments():
            (self._read(tokens, following) / self.num_segments).backward()

    def evaluate(self) -> float:
        losses = [float(self._read(tokens, following)) for tokens, following in self.segments()]
        return sum(losses) / len(losses)

    def state_bytes(self) -> int:
        assert self.memory is not None
        return sum(layer[:, 0].nbytes for layer in self.memory)


def _mend_type_as() -> None:
    """Patch `type_as` to accept a dtype: the model's last version passes one, which torch does not support."""
    original = torch.Tensor.type_as

    def type_as(tensor: Tensor, other: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return tensor.to(dtype) if other is None else original(tensor, other)

    torch.Tensor.type_as = type_as


class GPT2(Contender):
    """GPT-2 from `transformers`, without context beyond the segment; with the exact GELU, faster on a CPU."""

    def build(self) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        options = self.options
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=self.length,
            n_embd=options["width"],
            n_layer=options["layers"],
            n_head=options["heads"],
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="sdpa",
        )
        return GPT2LMHeadModel(config)

    def _loss(self, tokens: Tensor, following: Tensor) -> Tensor:
        with self.autocast():
            logits = self.model(tokens, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), following.flatten())

    def train(self) -> None:
        for tokens, following in self.segments():
            (self._loss(tokens, following) / self.num_segments).backward()

    def evaluate(self) -> float:
        return sum(float(self._loss(tokens, following)) for tokens, following in self.segments()) / self.num_segments


class MatrixProduct(Contender):
    """Not a model: the speed of matrix products in the sizes of the models, for the peak of this processor."""

    SHAPES = ((4096, 256, 1024), (4096, 1024, 256), (1024, 1024, 1024), (2048, 2048, 2048))

    def build(self) -> nn.Module:
        dtype = torch.bfloat16 if self.options["precision"] == "bfloat16" else torch.float32
        self.factors = [
            (torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype))
            for rows, inner, columns in self.SHAPES
        ]
        return nn.Identity()

    def train(self) -> None:
        """Not a model."""

    def evaluate(self) -> float:
        """Not a model."""
        return 0.0

    def useful_flops(self) -> int:
        return 0

    def peak(self) -> float:
        """Return the floating-point operations per second of the fastest matrix product."""
        return max(
            self._flops_per_second(product, *factors)
            for factors in self.factors
            for product in (torch.matmul, self._by_onednn)
        )

    @staticmethod
    def _by_onednn(left: Tensor, right: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")

    @staticmethod
    def _flops_per_second(product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> float:
        flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
        repeats = max(1, int(4e9 / flops))
        started = time.perf_counter()
        for _ in range(repeats):
            product(left, right)
        return flops * repeats / (time.perf_counter() - started)


CONTENDERS: dict[str, Callable[[dict[str, Any]], Contender]] = {
    "memformer": Memformer,
    "session": MemformerSession,
    "lucidrains": Lucidrains,
    "transformer-xl": TransformerXL,
    "gpt2": GPT2,
    "matrix-product": MatrixProduct,
}


def main() -> None:
    """Build the model, print its properties, and do one unit of work for each line on stdin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("options", type=json.loads, help="A JSON object.")
    arguments = parser.parse_args()
    name, options = arguments.name, arguments.options
    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    contender = CONTENDERS[name](options)
    facts = {
        "parameters": sum(parameter.numel() for parameter in contender.model.parameters()),
        "state_bytes": contender.state_bytes(),
        "useful_flops": contender.useful_flops(),
        "torch": torch.__version__,
        "memformer": getattr(sys.modules.get("memformer"), "__file__", None),
    }
    print(json.dumps(facts), flush=True)
    tokens = contender.batch_size * contender.num_segments * contender.length
    for line in sys.stdin:
        if isinstance(contender, MatrixProduct):
            print(json.dumps({"seconds": 1.0, "tokens": 0, "peak": contender.peak()}), flush=True)
            continue
        contender.model.train(line.strip() == "train")
        contender.model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        if line.strip() == "train":
            contender.train()
        else:
            with torch.no_grad():
                contender.evaluate()
        print(json.dumps({"seconds": time.perf_counter() - started, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
