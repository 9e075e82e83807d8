"""`make digits`, from training to serving, in a short form."""

from pathlib import Path

import pytest

from examples.digits.__main__ import main


def test_the_served_digits_are_as_accurate_as_the_trained_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example exits with an error message if one served answer differs from PyTorch's."""
    main(epochs=2, folder=tmp_path, least=0.5)
    printed = capsys.readouterr().out
    assert printed.count("of 360 held-out digits") == 2
    assert len(list((tmp_path / "test").iterdir())) == 10
