"""Builds the training and evaluation data of a run from its data config: documents, or a recall task."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from memformer.data import (
    BinTokenizer,
    Corpus,
    LaneStream,
    MultitaskStream,
    PixelTokenizer,
    RecallConfig,
    RecallStream,
    RecallTask,
    RolloutStream,
    SourceConfig,
    Tokenizer,
    build_corpus,
    image_shape,
    make_task,
    make_text_task,
    source_levels,
)
from memformer.errors import InputError, SaveError
from memformer.evaluation.likelihood import Evaluation, Result, content_unit, evaluate
from memformer.evaluation.recall import Recall, measure_recall
from memformer.models.recurrence import RecurrentModel
from memformer.rollout import Rollout
from memformer.training.config import DataConfig, RunConfig, TrainingConfig
from memformer.training.run_inputs import locate_inputs
from memformer.training.run_tokenizer import make_tokenizer, source_progress
from memformer.utils.files import user_path

_RECALL_EPISODES = 64
_HELD_OUT = 1 << 62  # flips a bit of a seed: training with the same seed draws other episodes
_EVALUATION_TOKENS_AT_ONCE = 4096


class RunData(ABC):
    """Base class of the training and evaluation data of a run.

    Attributes:
        tokenizer: The tokenizer of the data.
    """

    tokenizer: Tokenizer

    @abstractmethod
    def make_stream(self, model: RecurrentModel, config: RunConfig) -> RolloutStream:
        """Return an endless stream of training rollouts."""

    @abstractmethod
    def evaluate(
        self,
        model: RecurrentModel,
        training: TrainingConfig,
        *,
        is_final: bool,
        progress: Callable[[int], None] | None = None,
    ) -> Result:
        """Return the evaluation of a model on held-out data.

        Args:
            model: The model.
            training: The run's training config.
            is_final: Whether this is the final evaluation of a run, which uses more data.
            progress: Called with the number of tokens read so far, of `evaluation_tokens` in total.
        """

    @abstractmethod
    def evaluation_tokens(self, model: RecurrentModel, training: TrainingConfig, *, is_final: bool) -> int:
        """Return the number of tokens that `evaluate` reads."""

    @abstractmethod
    def describe(self) -> str:
        """Return a one-line description of the training and held-out data."""


class DocumentData(RunData):
    """Documents to predict.

    Args:
        tokenizer: The tokenizer of the token ids.
        train: Training documents.
        validation: Held-out documents, by which the best weights are chosen.
        test: Documents for the final evaluation. None: the validation documents.
    """

    def __init__(self, tokenizer: Tokenizer, train: Corpus, validation: Corpus, test: Corpus | None = None) -> None:
        self.tokenizer = tokenizer
        self.train = train
        self.validation = validation
        self.test = validation if test is None else test

    def make_stream(self, model: RecurrentModel, config: RunConfig) -> RolloutStream:
        """Return an endless stream of rollouts over the training documents."""
        options = {
            "num_lanes": config.training.num_lanes,
            "segment_length": model.segment_length,
            "rollout_length": config.training.rollout_length,
            "bos_token_id": model.bos_token_id,
            "seed": config.seed,
        }
        tasks = config.data.multitask
        return LaneStream(self.train, **options) if tasks is None else MultitaskStream(self.train, tasks, **options)

    def evaluate(
        self,
        model: RecurrentModel,
        training: TrainingConfig,
        *,
        is_final: bool,
        progress: Callable[[int], None] | None = None,
    ) -> Evaluation:
        """Evaluate a model on the first `evaluation_tokens` validation tokens, or finally on all test documents."""
        corpus = self._evaluation_corpus(training, is_final=is_final)
        # Read out enough timesteps together for a few thousand tokens, because short segments on few lanes are slow.
        num_lanes = min(training.num_lanes, corpus.num_documents)
        rollout_length = max(1, _EVALUATION_TOKENS_AT_ONCE // (num_lanes * model.segment_length))
        return evaluate(
            model,
            corpus,
            num_lanes=num_lanes,
            rollout_length=rollout_length,
            unit=content_unit(self.tokenizer),
            progress=progress,
        )

    def evaluation_tokens(self, model: RecurrentModel, training: TrainingConfig, *, is_final: bool) -> int:
        """Return the number of tokens of the documents that `evaluate` reads."""
        return self._evaluation_corpus(training, is_final=is_final).num_tokens

    def _evaluation_corpus(self, training: TrainingConfig, *, is_final: bool) -> Corpus:
        return self.test if is_final else first_documents(self.validation, training.evaluation_tokens)

    def describe(self) -> str:
        """Return a one-line description with the numbers of documents and tokens."""
        parts = {"training on": self.train, "held out": self.validation}
        if self.test is not self.validation:
            parts["test"] = self.test
        return ", ".join(
            f"{name} {corpus.num_tokens:,} tokens (documents: {corpus.num_documents:,})"
            for name, corpus in parts.items()
        )


class RecallData(RunData):
    """A recall task.

    Args:
        config: Layout of the episodes.
        train: Task that generates the training episodes.
        validation: Task that generates the evaluation episodes; the same as `train` unless it reads held-out text.
    """

    def __init__(self, config: RecallConfig, train: RecallTask, validation: RecallTask) -> None:
        self.config = config
        self.train = train
        self.validation = validation
        self.tokenizer = train.tokenizer

    def make_stream(self, model: RecurrentModel, config: RunConfig) -> RolloutStream:
        """Return an endless stream of rollouts over training episodes.

        Raises:
            InputError: A segment is too short for the facts or the question, or the model is a baseline and answers
                have several tokens.
        """
        # Check this before training, because the first evaluation comes only later.
        episode = self.held_out_episode(model, max_timesteps=1)
        try:
            model.align_inputs(episode)
        except InputError as error:
            raise InputError(f"data.recall.task ({self.config.task!r}) does not fit the model: {error}") from error
        return RecallStream(
            self.train,
            self.config,
            num_lanes=config.training.num_lanes,
            segment_length=model.segment_length,
            rollout_length=config.training.rollout_length,
            bos_token_id=model.bos_token_id,
            seed=config.seed,
        )

    def held_out_episode(self, model: RecurrentModel, *, seed: int = 0, max_timesteps: int = 1 << 20) -> Rollout:
        """Return one held-out episode of the full task, as one row; without decoys, which are for training."""
        stream = RecallStream(
            self.validation,
            replace(self.config, curriculum=None, decoy_probability=0.0, mine_decoys=False),
            num_lanes=1,
            segment_length=model.segment_length,
            rollout_length=max_timesteps,
            bos_token_id=model.bos_token_id,
            seed=seed ^ _HELD_OUT,
        )
        return next(stream)

    def evaluate(
        self,
        model: RecurrentModel,
        training: TrainingConfig,
        *,
        is_final: bool,
        progress: Callable[[int], None] | None = None,
    ) -> Recall:
        """Return the accuracy at distances up to 4 times the longest in training, finally up to 32 times."""
        farthest = self._farthest(is_final=is_final)
        tokens_per_segment = model.segment_length * _RECALL_EPISODES

        def report(distance: int) -> None:
            if progress is not None:
                progress(distance * tokens_per_segment)

        return measure_recall(
            model,
            self.validation,
            self.config,
            distances=[*doubling_distances(farthest)],
            num_facts=self.config.num_facts[1],
            num_episodes=_RECALL_EPISODES,
            progress=report,
        )

    def evaluation_tokens(self, model: RecurrentModel, training: TrainingConfig, *, is_final: bool) -> int:
        """Return the number of tokens up to the longest distance, of all episodes."""
        return self._farthest(is_final=is_final) * model.segment_length * _RECALL_EPISODES

    def _farthest(self, *, is_final: bool) -> int:
        return self.config.max_distance * (32 if is_final else 4)

    def describe(self) -> str:
        """Return a one-line description of the task and its size."""
        fewest, most = self.config.num_facts
        return (
            f"training on the recall task {self.config.task!r}: {fewest} to {most} facts, "
            f"at most {self.config.max_distance} segments ago"
        )


def doubling_distances(farthest: int) -> list[int]:
    """Return 1, 2, 4, ... up to and including `farthest`."""
    return sorted({*(1 << power for power in range(farthest.bit_length())), farthest})


def prepare_data(config: DataConfig, *, tokenizer: Tokenizer | None = None, shows_progress: bool = False) -> RunData:
    """Return the data of a run. The token ids of documents are computed once and cached on disk.

    Args:
        config: The data config.
        tokenizer: Tokenizer to use. None: train one on the training documents. Recall tasks that are not in text have
            their own tokenizer and ignore this.
        shows_progress: Show on stderr how many bytes of the documents are tokenized, if that takes long.

    Raises:
        InputError: A source is missing, empty, undecodable, or too small to hold out documents; a recall task in text
            has no text, or malformed stories; or the data of a new run do not read the chosen tokenizer.
        CheckpointError: The cached token ids are damaged.
        SaveError: The token ids cannot be written.
    """
    if tokenizer is None:
        config.check_new_run()
    recall = config.recall
    if recall is not None and not recall.is_in_text:
        task = make_task(recall)
        return RecallData(recall, task, task)
    locate_inputs(config)  # a wrong path is reported, with its option, before anything is read
    if recall is not None and image_shape(config.train) is not None:
        raise InputError(
            f"data.train.kind ({config.train.kind!r}) holds images; recall.task {recall.task!r} needs text"
        )
    if tokenizer is None:
        tokenizer = make_tokenizer(config, shows_progress=shows_progress)
    train = open_corpus(config, config.train, tokenizer=tokenizer, shows_progress=shows_progress)
    if config.validation is None:
        train, validation = train.split(config.validation_fraction, config.seed)
    else:
        validation = open_corpus(config, config.validation, tokenizer=tokenizer, shows_progress=shows_progress)
    if recall is None:
        test = None
        if config.test is not None:
            test = open_corpus(config, config.test, tokenizer=tokenizer, shows_progress=shows_progress)
        return DocumentData(tokenizer, train, validation, test)
    return RecallData(
        recall,
        make_text_task(recall, tokenizer, train, path=recall.path),
        make_text_task(recall, tokenizer, validation, path=recall.validation_path),
    )


def open_corpus(
    config: DataConfig,
    source: SourceConfig,
    *,
    tokenizer: Tokenizer,
    shows_progress: bool = False,
) -> Corpus:
    """Return the documents of a source as token ids.

    Raises:
        InputError: The source is missing, empty or undecodable, or its images do not fit the tokenizer.
        CheckpointError: The cached token ids are damaged.
        SaveError: The token ids cannot be written.
    """
    shape = image_shape(source)
    is_image_tokenizer = isinstance(tokenizer, PixelTokenizer)
    if isinstance(tokenizer, BinTokenizer) and source.kind == "array":
        source = _with_columns(source, tokenizer)
    if (shape is not None) != is_image_tokenizer or (source.kind == "array") != isinstance(tokenizer, BinTokenizer):
        raise InputError(f"data of kind {source.kind!r} does not fit the run's tokenizer of kind {tokenizer.kind!r}")
    if isinstance(tokenizer, PixelTokenizer):
        own, of_run = (shape, source_levels(source)), ((tokenizer.height, tokenizer.width), tokenizer.levels)
        if own != of_run:
            raise InputError("images of shape {} with {} levels do not fit the run's {} and {}".format(*own, *of_run))
    cache = default_cache() if config.cache is None else _make_cache(config.cache)
    with source_progress("tokenizing", source, is_shown=shows_progress) as progress:
        return build_corpus(
            source, tokenizer, cache=cache, max_document_tokens=config.max_document_tokens, progress=progress
        )


def _make_cache(path: str) -> Path:
    cache = user_path(path)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"data.cache ({cache}) could not be written: {error.strerror or error}") from error
    return cache


def _with_columns(source: SourceConfig, tokenizer: BinTokenizer) -> SourceConfig:
    """Return the source with the columns of the bins, whatever other columns its files have.

    Raises:
        InputError: The source names other columns.
    """
    if source.columns not in (None, tokenizer.columns):
        raise InputError(f"columns ({source.columns}) must be those that the bins were fitted on: {tokenizer.columns}")
    return replace(source, columns=tokenizer.columns)


def default_cache() -> Path:
    """Return the default folder of the token id cache, which is shared by all runs."""
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "memformer"


def first_documents(corpus: Corpus, num_tokens: int | None) -> Corpus:
    """Return the first whole documents that together have at least `num_tokens` tokens; None means all documents."""
    if num_tokens is None:
        return corpus
    ends = corpus.document_lengths.cumsum()
    count = min(int((ends < num_tokens).sum()) + 1, corpus.num_documents)
    return corpus.subset(range(count))
