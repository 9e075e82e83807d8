"""Lists of classes: in the forms in which people and frameworks keep them, and ImageNet's."""

import itertools
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from handler.labels import Label
from scripts.build import classes
from scripts.build.classes import (
    classes_from_json,
    classes_from_text,
    imagenet_classes,
    read_classes,
)
from scripts.terminal import UserError

CAT_AND_DOG = [Label("cat", "cat"), Label("dog", "dog")]


def names(text: str) -> list[str]:
    return [label.class_name for label in classes_from_text(text, "it")]


def rejected(read: Callable[[], object], message: str) -> str:
    """Check that a list is rejected with the reason, and return the message."""
    with pytest.raises(UserError, match=f"^The list of classes .*{message}") as error:
        read()
    assert len(str(error.value)) < 800
    return str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\n",
        "\ufeffcat\r\ndog\r\n\r\n",
        " cat\rdog",
        '["cat", "dog"]',
        '{"1": "dog", "0": "cat"}',
        '{"dog": 1, "cat": 0}',
        '{"model_type": "vit", "id2label": {"1": "dog", "0": "cat"}, "label2id": {"cat": 0}}',
        '{"model_type": "vit", "label2id": {"dog": 1, "cat": 0}}',
        "{0: 'cat', 1: 'dog',}",
        "['cat', 'dog']",
        "1,dog\n0,cat\n",
        "index,name\n0,cat\n1,dog\n",
        "name;index\ndog;1\ncat;0\n",
        '"0"\t"cat"\n"1"\t"dog"\n',
    ],
)
def test_all_forms_name_the_same_classes(text: str) -> None:
    assert classes_from_text(text, "classes") == CAT_AND_DOG


def test_parsed_values_are_read_as_text_is() -> None:
    for value in (["cat", "dog"], {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}, ("cat", "dog")):
        assert classes_from_json(value, "model.yaml") == CAT_AND_DOG
    assert classes_from_json({"1": 0, "0": 1}, "digits") == [Label("1", "1"), Label("0", "0")]


def test_given_ids_are_kept_and_names_may_be_in_any_script() -> None:
    tench = [Label("n01440764", "tench, Tinca tinca")]
    for text in (
        '{"0": ["n01440764", "tench, Tinca tinca"]}',
        "n01440764 tench, Tinca tinca",
        "n01440764\ttench, Tinca tinca",
        '0,n01440764,"tench, Tinca tinca"',
    ):
        assert classes_from_text(text, "synsets") == tench
    assert names("Katze\nsøt hund\n猫\n")[2] == "猫"


def test_commas_and_numbers_in_names_do_not_make_csv() -> None:
    for lines in (
        ["tench, Tinca tinca", "goldfish, Carassius auratus"],
        ["0,cat", "dog", "1,cow"],
        ["10,5 mm", "12,5 mm"],
        ["1,cat", "2,dog", "4,cow"],
        ["digit 0", "digit 1"],
    ):
        assert names("\n".join(lines)) == lines
    assert names('1,"a ""b"", c"\n0,tench, Tinca tinca') == ["tench, Tinca tinca", 'a "b", c']


def test_equal_names_get_ids_of_their_own() -> None:
    crane = "crane"
    labels = classes_from_json([crane, crane, "crane-2", ["crane-3", "x"], crane], "list")
    ids = ["crane", "crane-4", "crane-2", "crane-3", "crane-5"]
    assert [label.class_id for label in labels] == ids
    assert [label.class_name for label in labels] == [crane, crane, "crane-2", "x", crane]
    many = [f"a-{number}" for number in range(40_000)] + ["a"] * 40_000
    assert len({label.class_id for label in classes_from_json(many, "list")}) == 80_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no class"),
        ("cat\n\ndog\n", "line 2 is empty"),
        ("cat\nd\x1b[2Jog", "class 1 has a control character"),
        ("cat\nd\u2028og", "class 1 has a control character"),
        ('["cat", " "]', "class 1 has an empty name"),
        ('{"0": ["", "cat"]}', "class 0 has an empty name or id"),
        ('["cat", 5]', "class 1 is 5, not a name in quotes"),
        ('["cat", {"name": "dog"}]', r"class 1 is {'name': 'dog'}, not a name"),
        ('{"a": "cat", "b": "dog"}', r"no class has position 0: they are \['a', 'b'\]"),
        ('{"0": "cat", "2": "dog"}', "no class has position 1"),
        ('{"1": "cat", "2": "dog"}', r"positions must be 0 to 1, but.*they are \[1, 2\]"),
        ("0,cat\n0,dog\n", "0 occurs twice"),
        ('{"0": "cat", "0": "dog"}', "'0' occurs twice"),
        ("{0: 'cat', 0: 'dog'}", "0 occurs twice"),
        ('[["n1", "cat"], ["n1", "dog"]]', "'n1' occurs twice"),
        ('{"cat": 0', r"neither JSON \(Expecting ',' .*\) nor a Python dictionary or list"),
        ("[" * 100_000, "nested too deeply"),
        ("{0: " + "-" * 100_000 + "1}", "nor a Python dictionary"),
        ("{[]: 1}", "nor a Python dictionary"),
        ("[" + "1" * 5_000 + "]", "is neither JSON"),
        ("{0x" + "f" * 5_000 + ": 'cat'}", "no class has position 0"),
        ("[0x" + "f" * 5_000 + "]", "class 0 is a number, not a name"),
        ("[" * 900 + "]" * 900, r"class 0 is \[\[\[.*not a name"),
        ("{0: 'a'}" + " " * 1_000_000 + "x", "it is neither JSON"),
        ("a\n" * 100_001, "more than 100000 classes"),
    ],
    ids=itertools.count(),
)
def test_a_wrong_list_is_rejected_with_the_reason_and_the_forms(text: str, message: str) -> None:
    said = rejected(lambda: classes_from_text(text, "it"), f"it cannot be used: .*{message}")
    assert "Accepted are: text with one name per line" in said


@pytest.mark.parametrize(
    "value", [None, 5, "cat", b"cat", {"id2label": 3}, {True: "cat"}, {False: "cat"}, ["\ud800"]]
)
def test_a_value_of_another_type_is_rejected(value: object) -> None:
    rejected(lambda: classes_from_json(value, "it"), "is not a list|position|control character")


def test_files_are_read_in_the_encodings_that_can_be_told(tmp_path: Path) -> None:
    path = tmp_path / "my classes.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes("Käse\nBrot\n".encode(encoding))
        assert [label.class_name for label in read_classes(path)] == ["Käse", "Brot"]
    path.write_bytes("Brot\nKäse\n".encode("cp1252"))
    said = rejected(lambda: read_classes(path), "line 2 has the byte 0xE4.*the line reads 'Käse'")
    command = said.split("convert it: ")[1]
    assert shlex.split(command)[:5] == ["iconv", "-f", "WINDOWS-1252", "-t", "UTF-8"]
    subprocess.run(["sh", "-c", command], check=True)
    assert read_classes(tmp_path / "my classes-utf8.txt")[1].class_name == "Käse"


def test_files_that_cannot_be_read_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (tmp_path / "nowhere.txt", tmp_path):
        rejected(lambda: read_classes(path), "cannot be read: (No such file|Is a directory)")  # noqa: B023
    path = tmp_path / "classes.txt"
    path.write_bytes(b"\xff\xfea\0b")
    rejected(lambda: read_classes(path), "is not utf-16")
    monkeypatch.setattr(classes, "MAX_BYTES", 3)
    rejected(lambda: read_classes(path), "is larger than")


def test_imagenet_has_1000_classes_and_in_tensorflow_one_for_the_background(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The rows are those that the tutorials print."""
    monkeypatch.chdir(tmp_path)
    assert imagenet_classes(1000)[285] == ("n02124075", "Egyptian_cat")
    assert imagenet_classes(1001)[:2] == [("background",) * 2, ("n01440764", "tench")]
    assert len({label.class_id for label in imagenet_classes(1001)}) == 1001
