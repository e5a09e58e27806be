"""What a run is: its model, its data, how it trains and where it lands."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from memformer.data import MultitaskConfig, RecallConfig, SourceConfig, TokenizerConfig
from memformer.errors import InputError
from memformer.models.config import MemformerConfig, ModelConfig
from memformer.training.replay import Method
from memformer.utils.checks import check_seed, check_threads

Sharding = Literal["none", "moments", "weights"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read.

    Args:
        train: Documents to train on.
        validation: Documents to evaluate on; null holds out a fraction of the training documents.
        validation_fraction: Fraction of the training documents held out, chosen by `seed`, where validation is null.
        test: Documents for the last evaluation alone, of the weights that did best on the validation documents; null
            evaluates them on the validation documents, which chose them.
        tokenizer: How text becomes tokens; images are their own tokens.
        max_document_tokens: Cut longer documents in pieces of this many tokens; null keeps them whole.
        seed: Chooses the held-out documents.
        recall: A recall task made on the fly, in place of documents to predict; null predicts the documents above.
            The tasks passkey and babi hide their facts in the documents above, the other tasks do not read them.
        multitask: Tasks of the paper's first version, mixed in training: continuation, infilling, recall; null trains
            continuation alone. Evaluation always continues.
        cache: Folder for token ids, built once; null means `memformer` in the user's cache folder.
    """

    train: SourceConfig = field(default_factory=lambda: SourceConfig(kind="python"))
    validation: SourceConfig | None = None
    validation_fraction: float = 0.05
    test: SourceConfig | None = None
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    max_document_tokens: int | None = None
    seed: int = 0
    recall: RecallConfig | None = None
    multitask: MultitaskConfig | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"data.validation_fraction ({self.validation_fraction}) must be between 0 and 1")
        check_seed("data.seed", self.seed)
        if self.recall is not None and self.test is not None:
            raise InputError("data.recall and data.test are both given; a recall task makes up what it is evaluated on")
        if self.recall is not None and self.multitask is not None:
            raise InputError("data.recall and data.multitask are both given; a recall task predicts no documents")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the model is trained.

    Args:
        num_updates: Optimizer steps of the whole run.
        num_lanes: Documents read side by side (the batch).
        rollout_length: Segments an update back-propagates through (paper: time horizon). Of a recall task: at most; a
            longer episode is cut, and no gradient crosses the cut.
        rollouts_per_update: Consecutive rollouts whose gradients are added up before an optimizer step; the
            memory's value goes on between them, its gradient does not.
        method: How gradients are computed: replay, bptt or checkpoint; all give the same.
        readout_timesteps: Timesteps whose readout is computed together; more is faster and takes more memory.
        learning_rate: Peak learning rate of AdamW.
        final_learning_rate: Where the cosine ends, as a fraction of the peak.
        warmup_updates: Updates of linear warm-up.
        weight_decay: Decoupled weight decay, on matrices only (not on embeddings, norms, biases, forgetting vectors).
        betas: AdamW's decay rates.
        write_price: Nats that a token pays for each unit of `memformer.nn.WritePressure`, added to the loss that is
            differentiated, not to the one that is logged: what need not be known is then not written. Falls to 0 with
            half a cosine over the run: once every answer is right nothing but the price moves the weights, and what
            must be known would be written ever less surely. Needs a sparse model.write_normalizer; 0 asks nothing.
        write_price_below: The price is due in rollouts whose loss is below this many nats per token only: writing must
            first be learned. null: always.
        max_gradient_norm: Gradients are scaled down to this norm; 0 turns clipping off.
        max_skipped_in_a_row: An update whose loss or gradient is not finite is skipped and counted: weights stay, lanes
            whose memory is not finite go on with the one before. More of them in a row than this end the run.
        skip_above: Also skip an update whose loss is more than so many times its running mean (of about the last 100
            updates; none is skipped in the first 100); null skips none. A curriculum's steps look like spikes too.
        precision: float32, or bfloat16 for autocast compute (the memory stays float32).
        sharding: What `torchrun`'s processes share out: "none" (each holds all), "moments" (each holds its share of
            weights and moments; whole weights and gradients during an update), "weights" (whole weights a layer at a
            time). Needs method "replay" and no `compiled`. With one process there is nothing to share out.
        compiled: Compile encoder and decoder with torch.compile: up to a minute when a shape first occurs. On a CPU it
            is slower than without (README); on CUDA it has not been measured.
        log_every: Updates between two lines of the log.
        evaluate_every: Updates between two evaluations on held-out documents; one always ends the run.
        evaluation_tokens: Held-out tokens (whole documents, the first that reach this) of a periodic evaluation;
            null means all. The evaluation that ends the run always reads all.
        sample_tokens: Tokens sampled after each evaluation; 0 for none. Images are always sampled whole.
        save_every: Updates between two checkpoints; one always ends the run.
        keep_checkpoints: How many of the newest checkpoints stay on disk.
    """

    num_updates: int = 1000
    num_lanes: int = 8
    rollout_length: int = 8
    rollouts_per_update: int = 1
    method: Method = "replay"
    readout_timesteps: int = 2
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.1
    warmup_updates: int = 50
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    write_price: float = 0.0
    write_price_below: float | None = 0.1
    max_gradient_norm: float = 1.0
    max_skipped_in_a_row: int = 10
    skip_above: float | None = None
    precision: Precision = "float32"
    sharding: Sharding = "none"
    compiled: bool = False
    log_every: int = 10
    evaluate_every: int = 250
    evaluation_tokens: int | None = 100_000
    sample_tokens: int = 256
    save_every: int = 250
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name, minimum in (
            ("num_updates", 1),
            ("num_lanes", 1),
            ("rollout_length", 1),
            ("rollouts_per_update", 1),
            ("readout_timesteps", 1),
            ("warmup_updates", 0),
            ("log_every", 1),
            ("evaluate_every", 1),
            ("sample_tokens", 0),
            ("save_every", 1),
            ("max_skipped_in_a_row", 0),
            ("keep_checkpoints", 1),
        ):
            if getattr(self, name) < minimum:
                raise InputError(f"training.{name} ({getattr(self, name)}) must be at least {minimum}")
        if self.evaluation_tokens is not None and self.evaluation_tokens < 1:
            raise InputError(
                f"training.evaluation_tokens ({self.evaluation_tokens}) must be at least 1, or null for all"
            )
        if self.write_price_below is not None and not 0 < self.write_price_below < float("inf"):
            raise InputError(
                f"training.write_price_below ({self.write_price_below}) must be above 0 and finite, or null for always"
            )
        if self.skip_above is not None and not 1 < self.skip_above < float("inf"):
            raise InputError(f"training.skip_above ({self.skip_above}) must be above 1 and finite, or null for none")
        for name in ("learning_rate", "weight_decay", "max_gradient_norm", "write_price"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"training.{name} ({getattr(self, name)}) must be at least 0 and finite")
        if not 0 <= self.final_learning_rate <= 1:
            raise InputError(f"training.final_learning_rate ({self.final_learning_rate}) must be from 0 to 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"training.betas ({self.betas}) must be at least 0 and below 1")
        for name, kind in (("method", Method), ("precision", Precision), ("sharding", Sharding)):
            if getattr(self, name) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise InputError(f"training.{name} ({getattr(self, name)!r}) must be one of {choices}")
        if self.sharding != "none" and (self.method != "replay" or self.compiled):
            raise InputError(
                f"training.sharding ({self.sharding!r}) needs training.method 'replay' and no training.compiled; "
                f"they are {self.method!r} and {self.compiled}"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run.

    Args:
        folder: Where everything lands: checkpoints, logs, samples, the resolved config.
        seed: Decides initial weights, dropout and the order of documents.
        device: auto (CUDA where there is one), cpu, cuda, cuda:1, ...
        threads: CPU threads of torch; null leaves torch's choice. One thread makes runs repeatable bit for bit.
        model_type: memformer, or one of those to compare it with: lstm, transformer_xl, compressive_transformer,
            recurrent_memory_transformer.
        model: The model's shape. Its vocab_size comes from the data's tokenizer.
        data: What is read.
        training: How the model is trained.
    """

    folder: str = "runs/memformer"
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    model_type: str = MemformerConfig.model_type
    model: ModelConfig = field(default_factory=MemformerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        check_threads(self.threads)
        if self.model.model_type != self.model_type:
            raise InputError(f"model_type ({self.model_type!r}) contradicts the model, a {self.model.model_type}")
        price = self.training.write_price
        if not isinstance(self.model, MemformerConfig):
            for name, value in (("write_price", price), ("compiled", self.training.compiled)):
                if value:
                    raise InputError(f"training.{name} ({value}) is for a memformer, not for a {self.model_type}")
            for name, is_given in (
                ("training.sharding", self.training.sharding != "none"),
                ("data.recall", self.data.recall is not None),
                ("data.multitask", self.data.multitask is not None),
            ):
                if is_given:
                    raise InputError(f"{name} is for a memformer, not for a {self.model_type}")
        elif price and (self.model.num_slots == 0 or self.model.write_normalizer == "softmax"):
            raise InputError(
                f"training.write_price ({price}) needs slots and a sparse write; model.num_slots is "
                f"{self.model.num_slots}, model.write_normalizer {self.model.write_normalizer!r}"
            )
        check_seed("seed", self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain values for YAML or JSON."""
        fields = dataclasses.asdict(self)
        fields["model"] = self.model.to_dict()
        fields["training"]["betas"] = list(self.training.betas)
        return fields
