"""The program that breaks the product finds the places that it breaks."""

from pathlib import Path

import pytest

from tests.mutations import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: f"{one.file}: {one.old.strip()}")
def test_each_place_that_is_broken_exists(mutation: Mutation) -> None:
    assert mutation.old in Path(mutation.file).read_text("utf-8")
