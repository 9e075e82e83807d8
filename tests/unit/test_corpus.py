"""The corpus through the image stage, pixel by pixel."""

import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from handler.errors import ClientError
from handler.images import PixelBudget, decode, resize_and_crop
from handler.settings import Preprocessing
from tests import corpus
from tests.corpus import Hostile, Valid

PREPROCESSING = Preprocessing()
MAX_PIXELS = 64_000_000

VALID = list(corpus.valid())
HOSTILE = list(corpus.hostile())


def test_the_corpus_is_large_enough() -> None:
    assert len(VALID) >= 60
    assert len(HOSTILE) >= 60


@pytest.mark.parametrize("picture", VALID, ids=lambda picture: picture.name)
def test_a_valid_picture_becomes_what_a_person_sees(picture: Valid) -> None:
    mine = decode(picture.data, PREPROCESSING, PixelBudget(MAX_PIXELS), reduced=False)
    expected = np.asarray(resize_and_crop(picture.seen, PREPROCESSING)).transpose(2, 0, 1)
    assert np.array_equal(mine, expected)


@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack.name)
def test_hostile_bytes_are_refused_by_name(attack: Hostile) -> None:
    with pytest.raises(ClientError) as refusal:
        decode(attack.data, PREPROCESSING, PixelBudget(MAX_PIXELS))
    assert (refusal.value.status, refusal.value.type) == (attack.status, attack.type)
    message = str(refusal.value)
    assert len(message) > 20
    assert "Traceback" not in message


def test_an_accepted_format_is_opened_whatever_its_name_or_type() -> None:
    """Only the bytes count; a JPEG named .png is a JPEG."""
    for picture in VALID[:3]:
        assert decode(picture.data, PREPROCESSING, PixelBudget(MAX_PIXELS)).shape == (3, 224, 224)


@given(data=st.binary(max_size=300))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    decode_or_refuse(data)


SMALL = [picture for picture in VALID if len(picture.data) < 20_000]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_a_picture_with_changed_bytes_is_decoded_or_refused(data: st.DataObject) -> None:
    changed = bytearray(data.draw(st.sampled_from(SMALL)).data)
    for _ in range(data.draw(st.integers(1, 8))):
        position = data.draw(st.integers(0, len(changed) - 1))
        changed[position] = data.draw(st.integers(0, 255))
    decode_or_refuse(bytes(changed))


@settings(deadline=None)
@given(
    width=st.integers(1, 600),
    height=st.integers(1, 600),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA"]),
)
def test_any_size_and_mode_becomes_the_models_input(width: int, height: int, mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), 1).save(buffer, "PNG")
    pixels = decode(buffer.getvalue(), PREPROCESSING, PixelBudget(MAX_PIXELS))
    assert pixels.shape == (3, 224, 224)
    assert pixels.dtype == np.uint8


def decode_or_refuse(data: bytes) -> None:
    try:
        pixels = decode(data, PREPROCESSING, PixelBudget(MAX_PIXELS))
    except ClientError:
        return
    assert pixels.shape == (3, 224, 224)
    assert pixels.dtype == np.uint8
