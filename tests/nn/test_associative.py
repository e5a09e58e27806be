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
    """Return the features of one key as arXiv 2102.11174 defines them, product by product, scaled to length 1."""
    parts = [max(float(value), 0.0) for value in x] + [max(-float(value), 0.0) for value in x]
    products = [parts[i] * parts[i - shift] for shift in (1, 2, 3) for i in range(len(parts))]
    return torch.tensor(products).double() / sum(product**2 for product in products) ** 0.5


def written_by_the_equations(memory, tokens, table):
    """Return the table of one row after the update of arXiv 2407.04841 for each token, one after the other.

    The divisor is at least 1, which is a departure.
    """
    matrix, counts = table[:, :-1].clone(), table[:, -1].clone()
    for token in memory.norm(tokens):
        key = features_of(memory.key(token))
        count = float(counts @ key)
        old = (matrix.T @ key) / max(count, 1.0)  # the paper: count
        matrix += key[:, None] * (torch.sigmoid(memory.gate(token)) * (memory.value(token) - old))[None]
        counts += min(max(1 - count, 0.0), 1.0) * key
    return torch.cat([matrix, counts[:, None]], dim=1)


def test_update_is_that_of_the_paper_with_a_divisor_of_at_least_1(memory):
    table = new_table()
    for seed in range(3):
        tokens = draw(2, 4, WIDTH, seed=seed)
        expected = torch.stack([written_by_the_equations(memory, *row) for row in zip(tokens, table, strict=True)])
        table = memory.write(tokens, table=table)
        torch.testing.assert_close(table, expected)


def test_value_read_is_that_of_the_paper_with_a_divisor_of_at_least_1(memory):
    table, x = memory.write(draw(2, 4, WIDTH), table=new_table()), draw(2, 5, WIDTH, seed=2)
    for row in range(2):
        for place in range(5):
            query = features_of(memory.query(memory.norm(x[row, place])))
            expected = (table[row, :, :-1].T @ query) / max(float(table[row, :, -1] @ query), 1.0)
            torch.testing.assert_close(memory.read(x, table=table)[row, place], expected)


def test_new_table_reads_nothing(memory):
    assert (memory.read(draw(2, 5, WIDTH), table=new_table()) == 0).all()


def test_second_value_of_a_key_replaces_the_first_also_if_several_tokens_have_it(memory):
    memory.gate.bias.fill_(100.0)  # everything is written in full
    memory.norm = torch.nn.Identity()
    memory.key.weight[:, WIDTH // 2 :] = 0.0  # tokens with the same first half have one key
    memory.query.weight.copy_(memory.key.weight)
    first = draw(1, 1, WIDTH)
    others = torch.cat([first[..., : WIDTH // 2].expand(-1, 4, -1), draw(1, 4, WIDTH // 2, seed=2)], dim=-1)
    once = memory.write(first, table=new_table(1))
    twice = memory.write(others, table=once)
    torch.testing.assert_close(memory.read(first, table=once), memory.value(first))
    torch.testing.assert_close(memory.read(first, table=twice), memory.value(others[:, -1:]))
    torch.testing.assert_close(twice[..., -1], once[..., -1])  # counted once


def test_the_table_stays_small_over_a_long_stream_of_new_values_for_one_key(memory):
    memory.gate.bias.fill_(2.0)
    memory.norm = torch.nn.Identity()
    memory.key.weight[:, WIDTH // 2 :] = 0.0  # the first half of a token decides its key
    key, sizes = draw(1, 1, WIDTH // 2).expand(-1, 4, -1), []
    table = memory.write(torch.cat([key, draw(1, 4, WIDTH // 2)], dim=-1)[:, :1], table=new_table(1))
    for seed in range(500):
        table = memory.write(torch.cat([key, draw(1, 4, WIDTH // 2, seed=seed)], dim=-1), table=table)
        sizes.append(float(table.abs().max()))
    assert max(sizes[100:]) < 2 * max(sizes[:100])


@pytest.mark.parametrize("key_width", [3, 6])
@pytest.mark.parametrize("size_of_shared_part", [1.0, 3.0])
def test_tables_and_reads_stay_small_over_long_streams_of_similar_tokens(key_width, size_of_shared_part):
    torch.manual_seed(0)
    memory = AssociativeMemory(32, key_width=key_width).double().requires_grad_(False)
    for projection in (memory.query, memory.key, memory.value):
        torch.nn.init.normal_(projection.weight, std=32**-0.5)
    table = torch.zeros(256, FEATURES_PER_COMPONENT * key_width, 33, dtype=torch.float64)
    shared = size_of_shared_part * draw(1, 1, 32)
    for seed in range(50):
        table = memory.write(shared + draw(256, 8, 32, seed=seed), table=table)
    assert table.abs().max() < 20
    assert memory.read(shared + draw(256, 64, 32, seed=50), table=table).abs().max() < 20
