"""Read random tokens for many timesteps: the memory must stay finite and on its sphere.

python -m tests.soak.long_horizon --timesteps 100000
"""

import argparse
import math
import sys
import time

import torch

from memformer import Memformer
from tests.helpers import SEGMENT_LENGTH, VARIANTS, VOCAB_SIZE, tiny_config

CHOSEN = ("default", "paper", "without forgetting", "competing slots, sparse")


def main() -> int:
    """Test several memory writers; return 1 if a memory left its sphere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=100_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    worst = {name: farthest_from_sphere(name, options.timesteps) for name in CHOSEN}
    return int(not all(distance < 1e-5 for distance in worst.values()))


@torch.no_grad()
def farthest_from_sphere(name: str, timesteps: int) -> float:
    """Return the largest relative error of the norm of a slot at any timestep; NaN if a slot was not finite."""
    torch.manual_seed(0)
    model = Memformer(tiny_config(**VARIANTS[name])).eval()
    memory, radius = model.initial_memory(2), math.sqrt(model.config.d_model)
    worst, started = torch.zeros(()), time.monotonic()
    for _ in range(timesteps):
        _, memory = model.encode(torch.randint(0, VOCAB_SIZE, (2, SEGMENT_LENGTH)), memory=memory)
        # torch.maximum propagates NaN.
        worst = torch.maximum(worst, (memory.norm(dim=-1) / radius - 1).abs().max())
    seconds = time.monotonic() - started
    print(f"{name}: {timesteps:,} timesteps, largest relative error of a norm {worst:.1e}; {seconds:.0f} s", flush=True)
    return float(worst)


if __name__ == "__main__":
    sys.exit(main())
