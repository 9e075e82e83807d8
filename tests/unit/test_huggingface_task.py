"""Hugging Face's image-classification task: what its clients send."""

import base64
from typing import Any

import pytest

from handler import protocols
from handler.errors import BadRequest, InvalidOption, MissingImage
from handler.protocols.huggingface import HuggingFace
from handler.request import Options, Request
from tests.unit import parts

ARCHIVE = parts.archive(features="f")
ONE = base64.b64encode(b"1").decode()


def parse(body: Any, **headers: str) -> Request:
    request = Request("id", {"body": body}, {"url_path": "huggingface", **headers}, Options(5, 0.1))
    protocols.parse(request, ARCHIVE)
    return request


@pytest.mark.parametrize(
    ("body", "topk"),
    [
        (b"1", 5),
        ({"inputs": ONE}, 5),
        ({"inputs": ONE, "parameters": None}, 5),
        ({"inputs": ONE, "parameters": {"top_k": 3, "function_to_apply": "softmax"}}, 3),
        ({"inputs": ONE, "parameters": {"top_k": None, "function_to_apply": None}}, 5),
    ],
)
def test_an_image_comes_raw_or_as_base64(body: Any, topk: int) -> None:
    request = parse(body)
    assert isinstance(request.protocol, HuggingFace)
    assert [image.data for image in request.images] == [b"1"]
    assert request.options.topk == topk


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ({"parameters": {}}, MissingImage, "no image"),
        ({"inputs": ONE, "parameters": [1]}, BadRequest, '"parameters" must be an object'),
        ({"inputs": ONE, "parameters": {"top_k": 0}}, InvalidOption, "topk must be"),
        (
            {"inputs": ONE, "parameters": {"function_to_apply": "sigmoid"}},
            InvalidOption,
            "function_to_apply must be softmax, this model's, got 'sigmoid'",
        ),
        (
            {"inputs": ONE, "parameters": {"function_to_apply": ["softmax"]}},
            InvalidOption,
            "function_to_apply must be softmax",
        ),
    ],
)
def test_a_malformed_request_is_rejected(body: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(body)


def test_several_images_are_rejected() -> None:
    file = {"content-type": "image/png"}
    row = {"a": b"1", "b": b"2"}
    request = Request("id", row, {"url_path": "huggingface", "a": file, "b": file}, Options(5, 0.1))
    with pytest.raises(BadRequest, match="one image per request"):
        protocols.parse(request, ARCHIVE)


def test_only_its_own_path_leads_to_it() -> None:
    assert not isinstance(parse(b"1", url_path="").protocol, HuggingFace)
    by_gateway = parse(b"1", **{"url_path": "", "X-Protocol": "huggingface"})
    assert isinstance(by_gateway.protocol, HuggingFace)
    assert not isinstance(parse(b"1", explain="True").protocol, HuggingFace)
