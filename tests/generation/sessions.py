"""Tokens for sessions, reference predictions, and a comparison of two sessions."""

import torch

from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, assert_close


def random_tokens(count, seed=4):
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def document_log_probabilities(model, tokens):
    """Return next-token log-probabilities from encode and decode only: [BOS] first, then whole segments."""
    memory, segment, rows = model.initial_memory(1), torch.tensor([[model.bos_token_id]]), []
    with torch.no_grad():
        for start in range(0, len(tokens), SEGMENT_LENGTH):
            hidden, memory = model.encode(segment, memory=memory)
            segment = torch.tensor([tokens[start : start + SEGMENT_LENGTH]])
            rows.append(model.decode(segment, hidden=hidden)[0].log_softmax(-1))
    return torch.cat(rows)


def assert_same_state(session, other, *, relative=1e-10):
    assert_close(session.memory, other.memory, relative=relative)
    assert session.num_tokens == other.num_tokens
    assert_close(session.next_token_logits(), other.next_token_logits(), relative=relative)
