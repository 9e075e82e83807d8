"""The committed class index is the one that the script makes."""

import json

from handler.labels import CLASS_INDEX, load_class_index
from scripts.build.class_index import TARGET, as_json, class_index


def test_the_committed_file_is_what_the_script_makes() -> None:
    assert TARGET.name == CLASS_INDEX
    assert TARGET.read_text("utf-8") == as_json(class_index())


def test_the_rows_are_in_the_tutorials_form() -> None:
    rows = json.loads(TARGET.read_text("utf-8"))
    assert len(rows) == 1000
    # The rows that the tutorials print or name.
    assert rows["0"] == ["n01440764", "tench"]
    assert rows["285"] == ["n02124075", "Egyptian_cat"]
    assert rows["162"][1] == "beagle"


def test_every_class_has_an_id_of_its_own() -> None:
    labels = load_class_index(TARGET, 1000)
    assert len({label.class_id for label in labels}) == 1000
