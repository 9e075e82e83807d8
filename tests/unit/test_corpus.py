"""The corpus through the image stage, pixel by pixel."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from handler.decoding.transform import resize_and_crop
from handler.errors import ClientError
from tests import corpus
from tests.corpus import Hostile, Valid
from tests.images import PREPROCESSING, decoded, encode

VALID = list(corpus.valid())
HOSTILE = list(corpus.hostile())


@pytest.mark.parametrize("image", VALID, ids=lambda image: image.name)
def test_a_valid_image_becomes_what_a_person_sees(image: Valid) -> None:
    mine = decoded(image.data, reduced=False).pixels
    expected = np.asarray(resize_and_crop(image.seen, PREPROCESSING)).transpose(2, 0, 1)
    assert np.array_equal(mine, expected)


@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack.name)
def test_hostile_bytes_are_rejected_by_name(attack: Hostile) -> None:
    with pytest.raises(ClientError) as error:
        decoded(attack.data)
    assert (error.value.status, error.value.type) == (attack.status, attack.type)
    message = str(error.value)
    assert len(message) > 20
    assert "Traceback" not in message


@given(data=st.binary(max_size=300))
def test_any_bytes_are_decoded_or_rejected(data: bytes) -> None:
    decode_or_reject(data)


SMALL = [image for image in VALID if len(image.data) < 20_000]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_an_image_with_changed_bytes_is_decoded_or_rejected(data: st.DataObject) -> None:
    changed = bytearray(data.draw(st.sampled_from(SMALL)).data)
    for _ in range(data.draw(st.integers(1, 8))):
        position = data.draw(st.integers(0, len(changed) - 1))
        changed[position] = data.draw(st.integers(0, 255))
    decode_or_reject(bytes(changed))


@settings(deadline=None)
@given(
    width=st.integers(1, 600),
    height=st.integers(1, 600),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA"]),
)
def test_any_size_and_mode_becomes_the_models_input(width: int, height: int, mode: str) -> None:
    decode_or_reject(encode(Image.new(mode, (width, height), 1)), may_reject=False)


def decode_or_reject(data: bytes, *, may_reject: bool = True) -> None:
    try:
        pixels = decoded(data).pixels
    except ClientError:
        assert may_reject
        return
    assert pixels.shape == (3, 224, 224)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
