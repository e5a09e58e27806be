"""Models of this library as models of Hugging Face transformers (extra `hf`).

Importing this package registers the models: afterwards `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and
`AutoTokenizer` read the folders of this library and of `save_pretrained`. Importing transformers takes some seconds,
and no other package of this library imports it.
"""

from memformer.hf.versions import check_transformers

check_transformers()

# E402: the imports below need a supported transformers, which the call above has checked.
from memformer.hf.cache import MemformerCache  # noqa: E402
from memformer.hf.configuration import (  # noqa: E402
    AssociativeRecurrentMemoryTransformerHFConfig,
    CompressiveTransformerHFConfig,
    LSTMHFConfig,
    MemformerHFConfig,
    RecurrentHFConfig,
    RecurrentMemoryTransformerHFConfig,
    TransformerXLHFConfig,
)
from memformer.hf.models import (  # noqa: E402
    AssociativeRecurrentMemoryTransformerForCausalLM,
    AssociativeRecurrentMemoryTransformerModel,
    CompressiveTransformerForCausalLM,
    CompressiveTransformerModel,
    LSTMForCausalLM,
    LSTMModel,
    MemformerForCausalLM,
    MemformerModel,
    RecurrentMemoryTransformerForCausalLM,
    RecurrentMemoryTransformerModel,
    TransformerXLForCausalLM,
    TransformerXLModel,
)
from memformer.hf.registration import as_causal_lm, register  # noqa: E402
from memformer.hf.tokenization import as_hf_tokenizer  # noqa: E402

__all__ = [
    "AssociativeRecurrentMemoryTransformerForCausalLM",
    "AssociativeRecurrentMemoryTransformerHFConfig",
    "AssociativeRecurrentMemoryTransformerModel",
    "CompressiveTransformerForCausalLM",
    "CompressiveTransformerHFConfig",
    "CompressiveTransformerModel",
    "LSTMForCausalLM",
    "LSTMHFConfig",
    "LSTMModel",
    "MemformerCache",
    "MemformerForCausalLM",
    "MemformerHFConfig",
    "MemformerModel",
    "RecurrentHFConfig",
    "RecurrentMemoryTransformerForCausalLM",
    "RecurrentMemoryTransformerHFConfig",
    "RecurrentMemoryTransformerModel",
    "TransformerXLForCausalLM",
    "TransformerXLHFConfig",
    "TransformerXLModel",
    "as_causal_lm",
    "as_hf_tokenizer",
]

register()
