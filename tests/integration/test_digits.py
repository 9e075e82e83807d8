"""`make digits`, from training to serving, with two epochs."""

from pathlib import Path

import pytest

from examples.digits.__main__ import main


def test_the_server_is_as_accurate_as_pytorch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example raises an error if one response differs from PyTorch's prediction."""
    main(epochs=2, folder=tmp_path, min_accuracy=0.5)
    printed = capsys.readouterr().out
    assert printed.count("of 360 held-out digits") == 2
    assert len(list((tmp_path / "test").iterdir())) == 10
