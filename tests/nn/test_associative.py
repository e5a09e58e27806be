"""Laws of the associative memory (arXiv 2407.04841)."""

import pytest
import torch

from memformer.nn.associative import FEATURES_PER_COMPONENT, AssociativeMemory

WIDTH, KEY_WIDTH = 6, 3
NUM_FEATURES = FEATURES_PER_COMPONENT * KEY_WIDTH


@pytest.fixture
def memory():
    torch.manual_seed(0)
    return AssociativeMemory(WIDTH, key_width=KEY_WIDTH).double().requires_grad_(False)


def new_table(rows=2):
    return torch.zeros(rows, NUM_FEATURES, WIDTH + 1, dtype=torch.float64)


def draw(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def features_of(x):
    """Return the features of one key as arXiv 2102.11174 defines them, product by product."""
    parts = [max(float(value), 0.0) for value in x] + [max(-float(value), 0.0) for value in x]
    return torch.tensor([parts[i] * parts[i - shift] for shift in (1, 2, 3) for i in range(len(parts))]).double()


def written_by_the_equations(memory, tokens, table):
    """Return the table of one row after the paper's update, token by token; every token sees the table before it."""
    matrix, counts = table[:, :-1].clone(), table[:, -1].clone()
    for token in tokens:
        key = features_of(memory.key(token))
        count = float(table[:, -1] @ key)
        old = (table[:, :-1].T @ key) / (count + 1e-5)
        change = torch.sigmoid(memory.gate(token)) * (memory.value(token) - old)
        matrix += key[:, None] * change[None]
        counts += min(max(1 - (count + 1e-5) / (float(key @ key) + 1e-5), 0.0), 1.0) * key
    return torch.cat([matrix, counts[:, None]], dim=1)


def test_update_is_that_of_the_paper(memory):
    table = new_table()
    for seed in range(3):
        tokens = draw(2, 4, WIDTH, seed=seed)
        expected = torch.stack([written_by_the_equations(memory, *row) for row in zip(tokens, table, strict=True)])
        table = memory.write(tokens, table=table)
        torch.testing.assert_close(table, expected)


def test_value_read_is_that_of_the_paper(memory):
    table, x = memory.write(draw(2, 4, WIDTH), table=new_table()), draw(2, 5, WIDTH, seed=2)
    for row in range(2):
        for place in range(5):
            query = features_of(memory.query(x[row, place]))
            expected = (table[row, :, :-1].T @ query) / (table[row, :, -1] @ query + 1e-5)
            torch.testing.assert_close(memory.read(x, table=table)[row, place], expected)


def test_new_table_reads_nothing(memory):
    assert (memory.read(draw(2, 5, WIDTH), table=new_table()) == 0).all()


def test_second_value_of_a_key_replaces_the_first(memory):
    memory.gate.bias.fill_(100.0)  # everything is written in full
    memory.key.weight.mul_(10.0)  # long keys, beside which the 1e-5 in the divisor is nothing
    memory.key.weight[:, WIDTH // 2 :] = 0.0  # two tokens have one key
    memory.query.weight.copy_(memory.key.weight)
    first = draw(1, 1, WIDTH)
    second = torch.cat([first[..., : WIDTH // 2], draw(1, 1, WIDTH // 2, seed=2)], dim=-1)
    once = memory.write(first, table=new_table(1))
    twice = memory.write(second, table=once)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(memory.read(first, table=once), memory.value(first), **close)
    torch.testing.assert_close(memory.read(first, table=twice), memory.value(second), **close)
    torch.testing.assert_close(twice[..., -1], once[..., -1], **close)  # counted once
