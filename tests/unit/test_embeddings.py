"""Embeddings in answers, in tensors, in files, and what finds duplicates by them."""

import json
from array import array
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from classification_client import embeddings
from classification_client.errors import UserError
from examples.duplicates.__main__ import pairs
from handler.errors import BadRequest
from handler.protocols.kserve_v2 import KServeV2, OutputTensor, parse_outputs
from handler.request import Options, Request, RequestImage
from handler.results import embedding_to_json
from tests.unit import parts

WRITTEN = ["a.png", "ä/鳥.png", "odd\udcff.png"]
VECTORS_SENT = [array("f", vector) for vector in ([0.1, -2.5], [1e-7, 3e8], [0.0, 1.0])]
VECTORS = np.array(VECTORS_SENT, np.float32)
NAMES = ["a.png", "ä/鳥.png", "odd�.png"]


def test_embeddings_have_the_digits_of_float32() -> None:
    values = np.array([0.1, 1 / 3, 1e-30, 16777217, -0.0], np.float32)
    assert np.array_equal(np.array(embedding_to_json(values), np.float32), values)
    assert embedding_to_json(values)[0] == 0.1


@pytest.mark.parametrize("binary", [False, True])
def test_embeddings_are_a_tensor_only_on_request(*, binary: bool) -> None:
    assert "embedding" not in [o.name for o in parse_outputs({}, explained=False)]
    wanted = {"outputs": [{"name": "embedding", "parameters": {"binary_data": binary}}]}
    (output,) = parse_outputs(wanted, explained=False)
    with pytest.raises(BadRequest, match="asks for what is not there"):
        parse_outputs(wanted, explained=True)
    assert output == OutputTensor("embedding", binary)
    vector = np.array([0.25, -1, 3], np.float32)
    protocol = KServeV2()
    protocol.outputs = [output]
    images = [RequestImage("1", "a", result={}, extra_output=v) for v in (vector, None)]
    request = Request("1", {}, {}, Options(topk=5, threshold=0.1), images=images)
    response = protocol.format(request, parts.archive())
    length = int(response.headers.get("Inference-Header-Content-Length", len(response.body)))
    data = response.body[length:]
    (tensor,) = json.loads(response.body[:length])["outputs"]
    assert (tensor["datatype"], tensor["shape"]) == ("FP32", [2, 3])
    found = np.frombuffer(data, "<f4") if binary else np.array(tensor["data"])
    assert found.tolist() == [0.25, -1, 3, 0, 0, 0]


def test_numpy_and_parquet_read_the_files(tmp_path: Path) -> None:
    embeddings.write(tmp_path / "v.npy", WRITTEN, VECTORS_SENT)
    rows = np.load(tmp_path / "v.npy", allow_pickle=False)
    assert rows["picture"].tolist() == NAMES
    assert np.array_equal(rows["embedding"], VECTORS)
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy"]
    embeddings.write(tmp_path / "v.parquet", WRITTEN, VECTORS_SENT)
    table = parquet.read_table(tmp_path / "v.parquet").to_pydict()
    assert table["picture"] == NAMES
    assert np.array_equal(np.array(table["embedding"], np.float32), VECTORS)
    embeddings.write(tmp_path / "v.npy", [], [])
    assert len(np.load(tmp_path / "v.npy")) == 0


def test_a_file_that_cannot_be_written_is_an_error_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="different lengths"):
        embeddings.write(tmp_path / "v.npy", ["a", "b"], [[1.0], [1.0, 2.0]])
    with pytest.raises(UserError, match="its folder does not exist"):
        embeddings.check_writable(tmp_path / "nowhere" / "v.npy")
    monkeypatch.setattr(embeddings, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs the package pyarrow: pip install pyarrow"):
        embeddings.check_writable(tmp_path / "v.parquet")


def test_duplicates_are_found_most_similar_first() -> None:
    vectors = np.random.default_rng(1).normal(size=(50, 16)).astype(np.float32)
    vectors[7] = vectors[3] + 0.3
    vectors[9] = vectors[40]
    found = pairs(vectors, 0.9)
    assert [(one, other) for _, one, other in found] == [(9, 40), (3, 7)]
    assert found[0][0] == pytest.approx(1, abs=1e-6)
