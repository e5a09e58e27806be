"""Config of a training run: run folder, model, data and training options."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from memformer.data import MultitaskConfig, RecallConfig, SourceConfig, TokenizerConfig
from memformer.data.recall.config import has_own_vocabulary
from memformer.data.sources import unit_of_kind
from memformer.errors import InputError
from memformer.models.config import MemformerConfig, ModelConfig
from memformer.training.replay import Method
from memformer.training.trackers import TRACKERS
from memformer.utils.checks import check_choice, check_integer, check_number, check_seed, check_threads
from memformer.utils.fields import convert_fields

OptimizerName = Literal["adamw", "muon"]
Sharding = Literal["none", "optimizer_state", "weights"]
Precision = Literal["float32", "bfloat16"]
Engine = Literal["auto", "eager", "graphs"]


# Fields of `DataConfig` that are sources of documents; the first are the training documents.
SOURCES = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and evaluation data: documents or a recall task.

    Args:
        train: Training documents.
        validation: Validation documents, with the same keys as data.train (--data.validation.path, ...; they are listed
            by --data.validation.help) and by default of the same kind; the best weights are chosen by them. null: hold
            out a fraction of the training documents.
        validation_fraction: Fraction of the training documents to hold out if data.validation is null.
        test: Test documents, with the same keys as data.train, for the final evaluation of the best weights. null: use
            the validation documents, by which these weights were chosen.
        tokenizer: Tokenizer (for images, every pixel is a token).
        end_of_document: Add a token id that stands for the end of a document to the tokenizer and to every document.
            The model learns to predict it, and generation stops by itself at it. For texts only.
        max_document_tokens: Split longer documents into pieces of this many tokens; for series a multiple of the number
            of columns. null: do not split.
        seed: Seed that selects the held-out documents.
        recall: Train on a recall task instead of predicting documents: facts are inserted, filler segments follow, and
            questions about the facts must be answered from the memory. --data.recall.help lists its keys. The tasks
            passkey and babi use the documents above as filler; the other tasks generate all their text. null: predict
            the documents above.
        multitask: Mixture of the training tasks of the paper's first version: continuation, infilling and recall of
            text. --data.multitask.help lists its keys. Evaluation always uses continuation. null: continuation only.
        cache: Folder for the token ids of the documents, which are computed once. null: `memformer` in the user's
            cache folder.
    """

    train: SourceConfig = field(default_factory=lambda: SourceConfig(kind="python"))
    validation: SourceConfig | None = None
    validation_fraction: float = 0.05
    test: SourceConfig | None = None
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    end_of_document: bool = False
    max_document_tokens: int | None = None
    seed: int = 0
    recall: RecallConfig | None = None
    multitask: MultitaskConfig | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        convert_fields(self, prefix="data.")
        check_number("data.validation_fraction", self.validation_fraction, above=0, below=1)
        check_seed("data.seed", self.seed)
        if (self.train.kind == "array") != (self.tokenizer.kind == "bins"):
            raise InputError(
                f"data.train.kind ({self.train.kind!r}) and data.tokenizer.kind ({self.tokenizer.kind!r}) do not fit: "
                "'array' and 'bins' need each other"
            )
        if self.train.kind == "array":
            self._check_series()
        if self.recall is not None and self.test is not None:
            raise InputError("data.recall and data.test are both given; a recall task generates its own test data")
        if self.recall is not None and self.multitask is not None:
            raise InputError("data.recall and data.multitask are both given; a recall task does not predict documents")
        if self.recall is not None and self.tokenizer.kind == "pretrained":
            raise InputError("data.recall needs data.tokenizer.kind 'bytes', 'bpe' or 'word', not 'pretrained'")
        if self.recall is not None and self.end_of_document:
            raise InputError(
                "data.recall and data.end_of_document are both given; a recall task has no documents to end"
            )

    def check_new_run(self) -> None:
        """Check that nothing is chosen that the data do not read; the config of a finished run may hold it.

        Raises:
            InputError: A key is set that the kind of documents or the recall task does not read, such as a tokenizer
                for images; or images are to end with an end-of-document token.
        """
        kind = self.train.kind
        if self.end_of_document and unit_of_kind(kind) == "pixel":
            raise InputError(
                f"data.end_of_document is for texts; data.train.kind ({kind!r}) holds images, which all "
                "have the same number of pixels"
            )
        task, defaults = None if self.recall is None else self.recall.task, DataConfig()
        for name in unread_data_keys(kind=kind, task=task):
            if getattr(self, name) != getattr(defaults, name):
                reader = f"data.train.kind ({kind!r}), whose pixels are the tokens"
                if task is not None and has_own_vocabulary(task):
                    reader = f"data.recall.task ({task!r}), which generates its own text"
                raise InputError(f"data.{name} is not read by {reader}; leave it out")

    def check_pieces(self, size: int, name: str) -> None:
        """Check that `max_document_tokens` is a multiple of a size, whose name follows it in the message.

        Raises:
            InputError: It is not.
        """
        length = self.max_document_tokens
        if length is not None and length % size:
            raise InputError(f"data.max_document_tokens ({length}) must be a multiple of the {size} {name}")

    def _check_series(self) -> None:
        if self.validation is None:
            raise InputError(
                "data.validation must be given for data.train.kind 'array': the bins are fitted on the training data "
                "alone, and a part drawn from it at random would lie between training data; data.train.rows and "
                "data.validation.rows divide one file"
            )
        for name, is_given in (("recall", self.recall is not None), ("end_of_document", self.end_of_document)):
            if is_given:
                raise InputError(f"data.{name} is for texts; data.train.kind ('array') holds series")


def unread_data_keys(*, kind: str, task: str | None) -> tuple[str, ...]:
    """Return the keys of `data` that a kind of training documents, or the recall task, does not read."""
    if task is not None and has_own_vocabulary(task):
        return ("train", "validation", "validation_fraction", "tokenizer", "max_document_tokens", "seed", "cache")
    return ("tokenizer",) if unit_of_kind(kind) == "pixel" else ()


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training, evaluation and checkpoint settings.

    Args:
        num_updates: Total number of optimizer steps.
        num_lanes: Batch size: number of lanes. A lane is one row of the batch; it reads documents one after another and
            has its own memory, which is reset at the start of a document.
        rollout_length: Timesteps per rollout, that is, consecutive segments through which gradients are back-propagated
            (the paper's time horizon). For a recall task this is the maximum: longer episodes are cut, and no gradient
            crosses the cut.
        rollouts_per_update: Consecutive rollouts whose gradients are accumulated for one optimizer step. The memory is
            carried from one rollout to the next, but detached.
        method: Method of computing the gradients; all three give the same gradients. replay: memory replay
            back-propagation, the paper's method, which stores only memories and hidden states and recomputes the
            encoder in the backward pass. bptt: back-propagation through time, which stores all activations. checkpoint:
            back-propagation through time with torch.utils.checkpoint.
        engine: How replay runs on CUDA; the gradients are the same. graphs: its pieces are recorded once as CUDA
            graphs, which is several times as fast (benchmarks/README.md). eager: operation by operation, with less
            device memory. auto: graphs on CUDA with method "replay" and sharding "none", else eager.
        readout_timesteps: Timesteps whose readout (decoder and loss) is computed in one batch. Larger values are faster
            and need more device memory.
        optimizer: adamw; or muon: torch.optim.Muon for matrices, scaled to AdamW's steps, and AdamW for the rest.
            On text, muon was better after as many updates in every run that was tried (experiments/README.md). Needs
            `sharding` "none".
        learning_rate: Peak learning rate.
        final_learning_rate: Learning rate at the end of the cosine schedule, as a fraction of the peak.
        warmup_updates: Updates of linear warm-up at the start of the run.
        weight_decay: Decoupled weight decay. It applies to matrices only, not to embeddings, norms, biases and
            forgetting vectors.
        betas: AdamW's betas: decay rates of the first and the second moment.
        write_penalty: Weight of the auxiliary loss that penalizes writing to the memory (`memformer.nn.MemoryWriter`),
            a factor on that loss, so that irrelevant tokens are not written. It applies only to rollouts whose loss is
            below 0.1 nats per token, because writing must be learned first, and is not part of the logged loss. It
            decays to 0 over the run along half a cosine; without decay, the penalty eventually erodes writes that are
            still needed. Once the curriculum of a recall task has ended, it becomes steeper in segments that are known
            to hold no fact, and spares the best token of the others. Needs a sparse model.write_normalizer. 0: no
            penalty. On recall tasks, with or without a penalty, a sparse writer that writes nothing has the opposite
            loss in rollouts whose loss is 1 nat per token or more, if there is one process; else it could stop writing
            for good. That loss also teaches to write filler, which only a penalty undoes.
        max_gradient_norm: Maximum gradient norm; larger gradients are scaled down to it. 0: no clipping.
        max_skipped_in_a_row: Maximum number of consecutive skipped updates; one more ends the run with an error. An
            update is skipped if its loss or gradient is not finite: the weights stay unchanged, and a lane whose memory
            is not finite keeps its previous memory.
        precision: float32, or bfloat16 for automatic mixed precision; the memory is always float32.
        sharding: Sharding over the processes started by `torchrun` (FSDP2). none: every process holds the whole model.
            optimizer_state: weights and optimizer state are sharded between updates; an update gathers all weights
            once and holds whole gradients. weights: weights are gathered one layer at a time and freed after use.
            Needs method "replay" and no `compiled`; has no effect with one process.
        compiled: Compile layers, writer and loss with torch.compile, which takes up to a minute and a half. On CUDA,
            inside the engine's graphs, training is then 1.4 to 1.6 times as fast; on a CPU it is slower
            (benchmarks/README.md).
        log_every: Updates between two entries in the log.
        evaluate_every: Updates between two evaluations on the held-out data. The run always ends with one.
        evaluation_tokens: Held-out tokens used in a periodic evaluation: the first whole documents that reach this
            number. null: all. The final evaluation always uses all.
        sample_tokens: Tokens of text to generate as a sample after each evaluation; a run on images samples 25 whole
            images. 0: no sample.
        save_every: Updates between two checkpoints; none is saved after a skipped update. The run always ends with one.
        keep_checkpoints: Number of newest checkpoints to keep on disk.
    """

    num_updates: int = 1000
    num_lanes: int = 8
    rollout_length: int = 8
    rollouts_per_update: int = 1
    method: Method = "replay"
    engine: Engine = "auto"
    readout_timesteps: int = 2
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.1
    warmup_updates: int = 50
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    write_penalty: float = 0.0
    max_gradient_norm: float = 1.0
    max_skipped_in_a_row: int = 10
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
        convert_fields(self, prefix="training.")
        for name, minimum in (
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
            check_integer(f"training.{name}", getattr(self, name), minimum)
        # The names of checkpoints have nine digits, so that they sort by age.
        check_integer("training.num_updates", self.num_updates, 1, 999_999_999)
        if self.evaluation_tokens is not None:
            check_integer("training.evaluation_tokens", self.evaluation_tokens, 1)
        for name in ("learning_rate", "weight_decay", "max_gradient_norm", "write_penalty"):
            check_number(f"training.{name}", getattr(self, name), minimum=0)
        check_number("training.final_learning_rate", self.final_learning_rate, minimum=0, maximum=1)
        for beta in self.betas:
            check_number("training.betas", beta, minimum=0, below=1)
        if self.engine == "graphs" and (self.method != "replay" or self.sharding != "none"):
            raise InputError(
                f"training.engine ('graphs') needs training.method 'replay' and training.sharding 'none'; "
                f"they are {self.method!r} and {self.sharding!r}"
            )
        if self.sharding != "none" and (self.method != "replay" or self.compiled):
            raise InputError(
                f"training.sharding ({self.sharding!r}) needs training.method 'replay' and training.compiled false; "
                f"they are {self.method!r} and {self.compiled}"
            )
        if self.sharding != "none" and self.optimizer == "muon":
            raise InputError(
                f"training.sharding ({self.sharding!r}) needs training.optimizer 'adamw': Muon needs whole matrices"
            )

    def check_device(self, device: torch.device) -> None:
        """Check that the engine can be had on a device.

        Raises:
            InputError: The engine is `graphs`, and the device is no CUDA device.
        """
        if self.engine == "graphs" and device.type != "cuda":
            raise InputError(f"training.engine ('graphs') needs a CUDA device; the run's device is {device.type!r}")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where the numbers of a run are sent, besides log.jsonl.

    Args:
        trackers: Trackers that get the logged numbers and the sampled texts: tensorboard (event files in the run
            folder), wandb (Weights & Biases) and trackio. The package of each must be installed. An empty list: none.
        project: Project that the run belongs to in wandb and trackio.
    """

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    project: str = "memformer"

    def __post_init__(self) -> None:
        convert_fields(self, prefix="logging.")
        for name in self.trackers:
            check_choice("logging.trackers", name, TRACKERS)
        if len(set(self.trackers)) < len(self.trackers):
            raise InputError(f"logging.trackers ({self.trackers}) must name each tracker once")
        if not self.project.strip():
            raise InputError(f"logging.project ({self.project!r}) must be a name")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Run settings.

    Args:
        folder: Run folder, to which all results are written: checkpoints, logs, samples and the resolved config.
        seed: Seed of the initial weights, of dropout and of the order of the documents.
        device: Device to train on: auto (CUDA if available), cpu, cuda, cuda:1, ...
        threads: CPU threads of torch. With one thread, runs are reproducible bit for bit. null: torch's default.
        model_type: Architecture: memformer, or one of the baselines lstm, transformer_xl, compressive_transformer,
            recurrent_memory_transformer and associative_recurrent_memory_transformer.
        model: Model settings; vocab_size is derived from the tokenizer.
        data: Data settings.
        training: Training settings.
        logging: Trackers.
    """

    folder: str = "runs/memformer"
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    model_type: str = MemformerConfig.model_type
    model: ModelConfig = field(default_factory=MemformerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        convert_fields(self)
        check_threads(self.threads)
        if self.model.model_type != self.model_type:
            raise InputError(f"model_type ({self.model_type!r}) must be {self.model.model_type!r}, the model's type")
        penalty = self.training.write_penalty
        if not isinstance(self.model, MemformerConfig):
            for name, value in (("write_penalty", penalty), ("compiled", self.training.compiled)):
                if value:
                    raise InputError(f"training.{name} ({value}) needs model_type 'memformer', not {self.model_type!r}")
            for name, is_given in (
                ("training.sharding", self.training.sharding != "none"),
                ("data.multitask", self.data.multitask is not None),
            ):
                if is_given:
                    raise InputError(f"{name} needs model_type 'memformer', not {self.model_type!r}")
        elif penalty and not self.writes_sparsely:
            raise InputError(
                f"training.write_penalty ({penalty}) needs memory slots and a sparse write_normalizer; model.num_slots "
                f"is {self.model.num_slots}, model.write_normalizer is {self.model.write_normalizer!r}"
            )
        if self.data.multitask is not None and self.model.adaptive_cutoffs:
            raise InputError(
                f"data.multitask does not fit model.adaptive_cutoffs ({list(self.model.adaptive_cutoffs)}): its tasks "
                "add token ids that are never predicted; leave one of them out"
            )
        if isinstance(self.model, MemformerConfig) and self.model.free_slot_bias and self.training.sharding != "none":
            raise InputError(
                f"training.sharding ({self.training.sharding!r}) needs model.free_slot_bias 0, not "
                f"{self.model.free_slot_bias}: torch cannot shard a single number"
            )
        check_seed("seed", self.seed)

    @property
    def writes_sparsely(self) -> bool:
        """Whether the model has a memory writer that can give a token weight 0."""
        model = self.model
        return isinstance(model, MemformerConfig) and model.num_slots > 0 and model.write_normalizer != "softmax"

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain values for YAML or JSON."""
        fields = dataclasses.asdict(self)
        fields["model"] = self.model.to_dict()
        fields["training"]["betas"] = list(self.training.betas)
        return fields
