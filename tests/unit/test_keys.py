"""The file of clients' keys: its lines, and who may read it."""

from pathlib import Path

import pytest

from scripts.gateway.keys import read_keys
from scripts.terminal import UserError


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Return a file of two clients' keys that only its owner can read."""
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    path.write_text("# clients\nalice alices-key-0123456789\n\nbob bobs-key-0123456789ab\n")
    return path


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("alice short\n", 1),
        ('alice 0123456789abcdef";return\n', 1),
        ("alice 0123456789abcdef\nalice fedcba9876543210\n", 2),
        ("a 0123456789abcdef\nb 0123456789abcdef\n", 2),
    ],
)
def test_a_malformed_line_of_the_keys_is_named(keys: Path, text: str, line: int) -> None:
    keys.write_text(text)
    with pytest.raises(UserError, match=f"line {line}"):
        read_keys(keys)


def test_keys_that_others_can_read_are_rejected(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group may read those that root has given to this program, as Kubernetes does."""
    owner = keys.stat().st_uid
    for user, mode, accepted in (
        (owner, 0o600, True),
        (owner, 0o440, False),
        (owner + 7, 0o440, owner == 0),
        (owner + 7, 0o444, False),
    ):
        keys.chmod(mode)
        monkeypatch.setattr("os.geteuid", lambda user=user: user)
        if accepted:
            assert [key.name for key in read_keys(keys)] == ["alice", "bob"]
        else:
            with pytest.raises(UserError, match="can be read by others"):
                read_keys(keys)


def test_a_byte_order_mark_and_other_letters_in_comments_are_no_keys(keys: Path) -> None:
    keys.write_text("\ufeff# Schlüssel\nalice alices-key-0123456789\n", "utf-8")
    assert [key.name for key in read_keys(keys)] == ["alice"]
    keys.write_text("\ufeffalice alices-key-0123456789\n", "utf-8")
    assert [key.name for key in read_keys(keys)] == ["alice"]
