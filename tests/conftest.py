"""For every test: one thread for torch, here and in the processes that a test starts.

The tensors are tiny; several OpenMP threads only wait for each other, many times longer on a busy machine.
"""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
