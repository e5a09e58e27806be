"""Associative memory of the Associative Recurrent Memory Transformer (arXiv 2407.04841, section 2)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from memformer.nn.linear import Linear

# Products of each component with so many others of its vector (nu in arXiv 2102.11174).
_NUM_PRODUCTS = 3
# Features per component of a key: the positive and the negative part of each, in every product.
FEATURES_PER_COMPONENT = 2 * _NUM_PRODUCTS

Table = Float[Tensor, "B F W"]


class AssociativeMemory(nn.Module):
    """Memory of one layer: a table from features of keys to values, of which tokens read and to which tokens write.

    The table has a row for each of the F features and W = D + 1 columns. Its first D columns are the matrix A of the
    paper and its last column is the vector z, which counts how much of each feature has been written. A new table is
    all zero.

    Args:
        width: Model width D.
        key_width: Width E of keys and queries, which have F = 6 E features.
    """

    def __init__(self, width: int, *, key_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = Linear(width, key_width, bias=False)
        self.key = Linear(width, key_width, bias=False)
        self.value = Linear(width, width, bias=False)
        self.gate = Linear(width, 1)

    def read(self, x: Float[Tensor, "B Q D"], *, table: Table) -> Float[Tensor, "B Q D"]:
        """Return the value that the table has for each token: 0 if it is new, a part if only part of it was written."""
        query = self.query(self.norm(x))
        with torch.autocast(x.device.type, enabled=False):
            values, _ = _look_up(_features(query.to(table.dtype)), table)
            return values.to(x.dtype)

    def write(self, tokens: Float[Tensor, "B M D"], *, table: Table) -> Table:
        """Return the table after the tokens have written one after the other, each in place of its key's value."""
        tokens = self.norm(tokens)
        key, value, gate = self.key(tokens), self.value(tokens), torch.sigmoid(self.gate(tokens))
        with torch.autocast(tokens.device.type, enabled=False):
            key, value, gate = (part.to(table.dtype) for part in (key, value, gate))
            features = _features(key)
            for place in range(tokens.shape[1]):
                one = slice(place, place + 1)
                old, count = _look_up(features[:, one], table)
                # A key that is there already is not counted again.
                is_new = (1 - count).clamp(0, 1).detach()
                change = torch.cat([gate[:, one] * (value[:, one] - old), is_new], dim=-1)
                table = table + features[:, one].mT @ change
            return table


def _look_up(features: Float[Tensor, "B Q F"], table: Table) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B Q 1"]]:
    """Return the value of each query, and how much of it has been written.

    What has been written by less than 1 is not scaled up to 1 (the paper divides by any count): a count that is nearly
    0 would make any error of the table as large as one likes, and the next write would write it into the table.
    """
    found = features @ table
    values, count = found[..., :-1], found[..., -1:]
    return values / count.clamp(min=1), count


def _features(x: Float[Tensor, "B Q E"]) -> Float[Tensor, "B Q F"]:
    """Return the deterministic, parameter-free projection (DPFP) of arXiv 2102.11174, scaled to length 1.

    Its components are nowhere negative.
    """
    parts = F.relu(torch.cat([x, -x], dim=-1))
    products = [parts * parts.roll(shift, dims=-1) for shift in range(1, _NUM_PRODUCTS + 1)]
    return F.normalize(torch.cat(products, dim=-1), dim=-1)
