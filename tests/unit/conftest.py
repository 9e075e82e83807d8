"""What keeps tests in one process from touching one another."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """PyTorch's engine sets how many threads the process has, and sums depend on them."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
