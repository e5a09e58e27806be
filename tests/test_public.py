import memformer


def test_public_names():
    assert set(memformer.__all__) == {
        "AssociativeRecurrentMemoryTransformer",
        "AssociativeRecurrentMemoryTransformerConfig",
        "AttentionRecord",
        "CheckpointError",
        "ClassificationStream",
        "CompressiveTransformer",
        "CompressiveTransformerConfig",
        "Evaluation",
        "InputError",
        "InputTypeError",
        "LSTM",
        "LSTMConfig",
        "Likelihood",
        "LoadedRun",
        "Memformer",
        "MemformerClassificationConfig",
        "MemformerConfig",
        "MemformerForSequenceClassification",
        "RecurrentMemoryTransformer",
        "RecurrentMemoryTransformerConfig",
        "RecurrentModel",
        "Rollout",
        "RolloutHooks",
        "RolloutResult",
        "SaveError",
        "Session",
        "TransformerXL",
        "TransformerXLConfig",
        "backpropagate",
        "build_model",
        "evaluate",
        "load_model",
        "load_run",
    }
    assert all(getattr(memformer, name).__doc__ for name in memformer.__all__)


def test_all_user_errors_are_input_errors():
    for name in ("CheckpointError", "InputTypeError", "SaveError"):
        assert issubclass(getattr(memformer, name), memformer.InputError)
    assert issubclass(memformer.InputError, ValueError)
    assert issubclass(memformer.InputTypeError, TypeError)
