"""Documents, tokenizers, corpora of token ids, and streams of rollouts."""

from memformer.data.bins import BinTokenizer, fit_bins
from memformer.data.building import build_corpus
from memformer.data.corpus import Corpus, corpus_from_arrays
from memformer.data.document_end import DocumentEndTokenizer, document_end_of
from memformer.data.documents import Document
from memformer.data.lanes import LaneStream
from memformer.data.multitask import NUM_TASK_TOKENS, MultitaskConfig, MultitaskStream
from memformer.data.outside_tokenizers import PretrainedTokenizer, read_outside_tokenizer
from memformer.data.recall.config import CurriculumConfig, RecallConfig
from memformer.data.recall.stream import RecallStream, make_task, make_text_task
from memformer.data.recall.tasks import RecallTask
from memformer.data.sources import SourceConfig, image_shape, iterate_documents, source_levels
from memformer.data.stream import RolloutStream
from memformer.data.tokenizer_json import from_tokenizer_json, to_tokenizer_json
from memformer.data.tokenizer_training import TokenizerConfig, load_tokenizer, save_tokenizer, train_tokenizer
from memformer.data.tokenizers import ByteTokenizer, PixelTokenizer, TextTokenizer, Tokenizer

__all__ = [
    "NUM_TASK_TOKENS",
    "BinTokenizer",
    "ByteTokenizer",
    "Corpus",
    "CurriculumConfig",
    "Document",
    "DocumentEndTokenizer",
    "LaneStream",
    "MultitaskConfig",
    "MultitaskStream",
    "PixelTokenizer",
    "PretrainedTokenizer",
    "RecallConfig",
    "RecallStream",
    "RecallTask",
    "RolloutStream",
    "SourceConfig",
    "TextTokenizer",
    "Tokenizer",
    "TokenizerConfig",
    "build_corpus",
    "corpus_from_arrays",
    "document_end_of",
    "fit_bins",
    "from_tokenizer_json",
    "image_shape",
    "iterate_documents",
    "load_tokenizer",
    "make_task",
    "make_text_task",
    "read_outside_tokenizer",
    "save_tokenizer",
    "source_levels",
    "to_tokenizer_json",
    "train_tokenizer",
]
