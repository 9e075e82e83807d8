"""What keeps tests in one process from touching one another."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """PyTorch's engine sets how many threads the process has, and sums depend on them."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
