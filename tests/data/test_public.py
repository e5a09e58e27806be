from memformer import data


def test_public_names() -> None:
    assert set(data.__all__) == {
        "ByteTokenizer",
        "Corpus",
        "CurriculumConfig",
        "Document",
        "DocumentEndTokenizer",
        "LaneStream",
        "MultitaskConfig",
        "MultitaskStream",
        "NUM_TASK_TOKENS",
        "PixelTokenizer",
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
        "image_shape",
        "iterate_documents",
        "load_tokenizer",
        "make_task",
        "make_text_task",
        "save_tokenizer",
        "source_levels",
        "train_tokenizer",
    }
    assert all(getattr(data, name).__doc__ for name in data.__all__)
