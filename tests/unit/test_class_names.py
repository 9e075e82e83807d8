"""Lists of classes: in the forms in which people keep them, and ImageNet's."""

from pathlib import Path

import pytest

from handler.labels import CLASS_INDEX, Label, load_class_index
from scripts.build.class_index import TARGET, as_json, class_index
from scripts.build.class_names import read_class_names
from scripts.terminal import UserError

CAT_AND_DOG = [Label("cat", "cat"), Label("dog", "dog")]


def read(text: str, tmp_path: Path) -> list[Label]:
    path = tmp_path / "classes"
    path.write_text(text, "utf-8")
    return read_class_names(path)


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\n",
        "\ufeffcat\r\ndog\r\n\r\n",
        '["cat", "dog"]',
        '{"0": "cat", "1": "dog"}',
        '{"1": "dog", "0": "cat"}',
        '{"dog": 1, "cat": 0}',
        '{"0": ["cat", "cat"], "1": ["dog", "dog"]}',
    ],
)
def test_all_forms_name_the_same_classes(text: str, tmp_path: Path) -> None:
    assert read(text, tmp_path) == CAT_AND_DOG


def test_ids_are_kept_and_names_may_be_in_any_script(tmp_path: Path) -> None:
    assert read('{"0": ["n01440764", "tench"]}', tmp_path) == [Label("n01440764", "tench")]
    assert read("Katze\nsøt hund\n猫\n", tmp_path)[2].class_name == "猫"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no class"),
        ("[]", "names no class"),
        ("cat\n\ndog\n", "class 1 has no name"),
        ("cat\ndog\ncat\n", "a class twice: cat"),
        ('["cat", 5]', "5 is no class"),
        ('{"0": "cat", "2": "dog"}', "must be 0 to 1"),
        ('{"cat": 0, "dog": 2}', "must be 0 to 1"),
        ('{"cat": 0, "kitty": 0, "dog": 1}', "must be 0 to 2"),
        ('["cat", "\\ud800"]', "holds what is no text"),
        ('["cat", "\\u001b[2J"]', "holds what is no text"),
        ('{"cat": 0', "not valid JSON"),
    ],
)
def test_a_wrong_list_is_rejected_with_the_reason(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(text, tmp_path)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.txt cannot be read"):
        read_class_names(tmp_path / "nowhere.txt")


def test_the_class_index_of_imagenet_is_what_the_script_makes() -> None:
    assert TARGET.name == CLASS_INDEX
    assert TARGET.read_text("utf-8") == as_json(class_index())
    labels = load_class_index(TARGET, 1000)
    assert len({label.class_id for label in labels}) == 1000
    # Rows that the tutorials print.
    assert labels[0] == ("n01440764", "tench")
    assert labels[285] == ("n02124075", "Egyptian_cat")
