"""Data of a run: the documents of an evaluation."""

import numpy as np
import pytest

from memformer.data import SourceConfig, corpus_from_arrays
from memformer.data.tokenizer_training import TokenizerConfig
from memformer.training.config import DataConfig
from memformer.training.run_data import first_documents, prepare_data


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, 1), (5, 1), (6, 2), (8, 2), (9, 3), (100, 3), (None, 3)])
def test_first_documents_are_whole_and_reach_the_number_of_tokens(num_tokens, expected):
    corpus = corpus_from_arrays([np.zeros(length, dtype=np.int64) for length in (5, 3, 4)], 2)
    assert first_documents(corpus, num_tokens).num_documents == expected


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
