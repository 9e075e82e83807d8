"""Reading requests as TorchServe's frontend delivers them."""

import pytest

from handler.errors import InvalidOption, MissingImage
from handler.inputs import DescribeRequest, ImagePart, ImagesRequest, Options, read_request

DEFAULTS = Options(topk=5, threshold=0.1)


def read(row: dict[str, object], headers: dict[str, object] | None = None) -> ImagesRequest:
    request = read_request(row, headers or {}, DEFAULTS)
    assert isinstance(request, ImagesRequest)
    return request


@pytest.mark.parametrize("name", ["body", "data", "file", "image", "photo"])
def test_a_part_of_any_name_is_the_image(name: str) -> None:
    request = read({name: bytearray(b"bytes")})
    assert request == ImagesRequest([ImagePart(name, bytearray(b"bytes"))], DEFAULTS)


def test_options_come_as_form_fields() -> None:
    request = read({"file": b"x", "topk": bytearray(b"3"), "threshold": "0.5"})
    assert request.options == Options(topk=3, threshold=0.5)
    assert [part.name for part in request.images] == ["file"]


def test_a_form_may_hold_several_images() -> None:
    request = read({"first": b"1", "second": b"2"})
    assert request.images == [ImagePart("first", b"1"), ImagePart("second", b"2")]


def test_text_that_torchserve_decoded_is_bytes_again() -> None:
    assert read({"body": "hello"}).images == [ImagePart("body", b"hello")]


@pytest.mark.parametrize("row", [{}, {"body": b""}, {"topk": b"3"}])
def test_a_request_without_an_image_says_how_to_send_one(row: dict[str, object]) -> None:
    with pytest.raises(MissingImage, match="curl"):
        read(row)


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "", "\u2460", b"\xff"])
def test_a_bad_topk_is_named(value: object) -> None:
    with pytest.raises(InvalidOption, match="topk must be a whole number") as error:
        read({"file": b"x", "topk": value})
    assert str(error.value).isascii()


@pytest.mark.parametrize("value", ["-0.1", "1.01", "nan", "inf", "half", ""])
def test_a_bad_threshold_is_named(value: str) -> None:
    with pytest.raises(InvalidOption, match="threshold must be a number from 0 to 1"):
        read({"file": b"x", "threshold": value})


def test_a_long_bad_value_is_not_echoed_whole() -> None:
    with pytest.raises(InvalidOption) as error:
        read({"file": b"x", "topk": "9" * 5000 + "x"})
    assert len(str(error.value)) < 200


def test_a_description_is_asked_for_by_header() -> None:
    assert read_request({"body": b""}, {"describe": "True"}, DEFAULTS) == DescribeRequest()


def test_a_form_part_named_describe_is_an_image() -> None:
    headers: dict[str, object] = {"describe": {"content-type": "image/png"}}
    assert read({"describe": b"x"}, headers).images == [ImagePart("describe", b"x")]
