"""Embeddings in answers, in tensors, in files, and what finds duplicates by them."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from classification_client import Classification, embeddings
from classification_client.terminal import UserError
from examples.duplicates.__main__ import pairs
from handler import kserve
from handler.errors import BadRequest, InvalidOption
from handler.exchange import EMBEDDING, Options, OutputTensor, Request, RequestImage
from handler.inputs import read
from handler.labels import Label
from handler.responses import embedded
from handler.settings import ModelCard, Settings
from tests.pictures import encode, photographs

ROWS = [("a.png", [0.1, -2.5]), ("ä/鳥.png", [1e-7, 3e8]), ("odd\udcff.png", [0.0, 1.0])]
VECTORS = np.array([vector for _, vector in ROWS], np.float32)
NAMES = ["a.png", "ä/鳥.png", "odd�.png"]


def request(**fields: object) -> Request:
    image = encode(next(photographs())[1])
    return Request("1", {"file": image, **fields}, {"file": {"content-type": "image/png"}}, OPTIONS)


CARD = ModelCard("densenet121", 1000, True, "w.pth", "a" * 64, "b" * 64)  # noqa: FBT003
OPTIONS = Options.defaults(Settings(), CARD)


@pytest.mark.parametrize(
    ("value", "wanted"), [(b"true", True), (b"1", True), (b"False", False), (b"0", False)]
)
def test_the_option_is_read(value: bytes, wanted: bool) -> None:  # noqa: FBT001
    asked = request(embedding=value)
    read(asked, Settings(), [Label("a", "a")])
    assert asked.wants_embeddings is wanted


def test_the_option_has_two_values() -> None:
    with pytest.raises(InvalidOption, match="embedding must be true or false, got 'yes please'"):
        read(request(embedding=b"yes please"), Settings(), [Label("a", "a")])
    with pytest.raises(InvalidOption, match="did you mean embedding"):
        read(request(embeding=b"true"), Settings(), [Label("a", "a")])


def test_numbers_are_float32s_own() -> None:
    values = np.array([0.1, 1 / 3, 1e-30, 16777217, -0.0], np.float32)
    assert np.array_equal(np.array(embedded(values), np.float32), values)
    assert embedded(values)[0] == 0.1


@pytest.mark.parametrize("binary", [False, True])
def test_a_tensor_only_where_it_is_asked_for(binary: bool) -> None:  # noqa: FBT001
    assert EMBEDDING not in [o.name for o in kserve.read_outputs({}, explained=False)]
    wanted = {"outputs": [{"name": EMBEDDING, "parameters": {"binary_data": binary}}]}
    (output,) = kserve.read_outputs(wanted, explained=False)
    with pytest.raises(BadRequest, match="asks for what is not there"):
        kserve.read_outputs(wanted, explained=True)
    asked = replace(request(), outputs=[output])
    assert output == OutputTensor(EMBEDDING, binary)
    assert asked.wants_embeddings
    vector = np.array([0.25, -1, 3], np.float32)
    asked.images = [RequestImage("1", "a", embedding=vector), RequestImage("1", "b")]
    body, data = kserve.answer(asked, [{}, {}], ("m", "1"))
    (tensor,) = body["outputs"]
    assert (tensor["datatype"], tensor["shape"]) == ("FP32", [2, 3])
    found = np.frombuffer(data, "<f4") if binary else np.array(tensor["data"])
    assert found.tolist() == [0.25, -1, 3, 0, 0, 0]


def test_the_client_takes_them() -> None:
    row = {"label": "a", "probability": 1.0, "class_id": "a", "class_index": 0}
    body = {"predictions": [row], "recognized": True}
    assert Classification.from_answer(body).embedding is None
    found = Classification.from_answer({**body, "embedding": [0.5, 2]}).embedding
    assert found is not None
    assert list(found) == [0.5, 2]
    with pytest.raises(ValueError, match="no embedding"):
        Classification.from_answer({**body, "embedding": ["a"]})


def test_numpy_reads_the_file(tmp_path: Path) -> None:
    embeddings.write(tmp_path / "v.npy", ROWS)
    rows = np.load(tmp_path / "v.npy", allow_pickle=False)
    assert rows["picture"].tolist() == NAMES
    assert np.array_equal(rows["embedding"], VECTORS)
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy"]


def test_parquet_has_the_same(tmp_path: Path) -> None:
    embeddings.write(tmp_path / "v.parquet", ROWS)
    table = parquet.read_table(tmp_path / "v.parquet").to_pydict()
    assert table["picture"] == NAMES
    assert np.array_equal(np.array(table["embedding"], np.float32), VECTORS)


def test_no_picture_is_an_empty_file(tmp_path: Path) -> None:
    embeddings.write(tmp_path / "v.npy", [])
    assert len(np.load(io.BytesIO((tmp_path / "v.npy").read_bytes()))) == 0


def test_what_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="different lengths"):
        embeddings.write(tmp_path / "v.npy", [("a", [1.0]), ("b", [1.0, 2.0])])
    with pytest.raises(UserError, match="its folder is not there"):
        embeddings.check_writable(tmp_path / "nowhere" / "v.npy")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs the package pyarrow .*Without it name a .npy"):
        embeddings.check_writable(tmp_path / "v.parquet")


def test_duplicates_are_found_most_alike_first() -> None:
    vectors = np.random.default_rng(1).normal(size=(50, 16)).astype(np.float32)
    vectors[7] = vectors[3] + 0.3
    vectors[9] = vectors[40]
    found = pairs(vectors, 0.9)
    assert [(one, other) for _, one, other in found] == [(9, 40), (3, 7)]
    assert found[0][0] == pytest.approx(1, abs=1e-6)
