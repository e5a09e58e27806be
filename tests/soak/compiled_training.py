"""Training with the code that torch generates equals eager training, with the same dropout.

    python -m tests.soak.compiled_training

`make test` compares the graphs only: generating and compiling some sixty pieces of C++ takes minutes.
"""

import torch

from tests.compiled.test_training import check_compiled_gradients

if __name__ == "__main__":
    torch.manual_seed(0)
    check_compiled_gradients()
    print("compiled replay and BPTT have the eager gradients")
