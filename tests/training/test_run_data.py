"""Data of a run: the documents of an evaluation."""

import dataclasses

import numpy as np
import pytest
import torch

from memformer import Memformer
from memformer.data import RecallConfig, SourceConfig, corpus_from_arrays
from memformer.data.tokenizer_training import TokenizerConfig
from memformer.training.config import DataConfig, RunConfig, TrainingConfig
from memformer.training.run_data import first_documents, prepare_data
from tests.helpers import tiny_config


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, 1), (5, 1), (6, 2), (8, 2), (9, 3), (100, 3), (None, 3)])
def test_first_documents_are_whole_and_reach_the_number_of_tokens(num_tokens, expected):
    corpus = corpus_from_arrays([np.zeros(length, dtype=np.int64) for length in (5, 3, 4)], 2)
    assert first_documents(corpus, num_tokens).num_documents == expected


@pytest.fixture
def config(tmp_path):
    (tmp_path / "texts").mkdir()
    for index in range(8):
        (tmp_path / "texts" / f"{index}.txt").write_text(f"text {index}, " * 9)
    source = SourceConfig(path=str(tmp_path / "texts"))
    return DataConfig(train=source, validation_fraction=0.2, cache=str(tmp_path / "cache"))


def test_the_seed_of_the_data_chooses_what_is_held_out(config):
    chosen = [prepare_data(dataclasses.replace(config, seed=seed)).validation for seed in (*range(5), 0)]
    texts = [tuple(corpus.document(index).tobytes() for index in range(corpus.num_documents)) for corpus in chosen]
    assert texts[5] == texts[0]
    assert len(set(texts)) > 1


@pytest.mark.parametrize("recall", [None, RecallConfig(task="fact", max_distance=4)], ids=["documents", "recall"])
def test_the_seed_of_the_run_chooses_the_order(config, recall):
    data_config = config if recall is None else DataConfig(recall=recall)
    data = prepare_data(data_config)
    model = Memformer(tiny_config(vocab_size=data.tokenizer.vocab_size))

    def first(seed):
        run = RunConfig(seed=seed, model=model.config, data=data_config, training=TrainingConfig(num_lanes=2))
        return next(iter(data.make_stream(model, run)))

    assert torch.equal(first(0).inputs, first(0).inputs)
    others = [first(seed) for seed in range(1, 4)]
    assert not all(torch.equal(first(0).inputs, other.inputs) for other in others)


def test_bins_are_fitted_on_columns_of_the_same_name(tmp_path):
    """Files may order their columns differently; every column has its own bins."""
    (tmp_path / "a.csv").write_text("temp,pressure\n" + "".join(f"{n},{1000 + n}\n" for n in range(20)))
    (tmp_path / "b.csv").write_text("pressure,temp\n" + "".join(f"{1000 + n},{n}\n" for n in range(20)))
    source = SourceConfig(kind="array", path=str(tmp_path))
    config = DataConfig(
        train=source,
        validation=SourceConfig(kind="array", path=str(tmp_path / "a.csv")),
        tokenizer=TokenizerConfig(kind="bins", num_bins=4),
        cache=str(tmp_path / "cache"),
    )
    tokenizer = prepare_data(config).tokenizer
    assert tokenizer.columns == ["temp", "pressure"]
    assert [max(edges) for edges in tokenizer.edges] == [14, 1014]
