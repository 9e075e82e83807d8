"""GIF (89a): what a file holds."""

from handler.encoded import Contents, too_many

# A comment of 64 KiB has 256.
_MOST_BLOCKS = 10_000

_IMAGE, _EXTENSION, _CONTROL = 0x2C, 0x21, 0xF9


def walk(data: bytes | bytearray) -> Contents:
    """A GIF without its comments and programs' own blocks, which Pillow joins in quadratic time.

    Raises:
        TooLarge: it has more blocks than any real picture.
        IndexError: the file is cut off.
    """
    view = memoryview(data)
    flags = view[10]
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    head, control = view[:position], view[:0]
    start, in_extension = position, False
    for _ in range(_MOST_BLOCKS):
        length = view[position]
        if in_extension:
            position += length + 1
            in_extension = length > 0
            if not in_extension and view[start + 1] == _CONTROL:
                control = view[start:position]
        elif length == _IMAGE:
            # The decoder stops where the picture does. A frame may be larger than the screen.
            return Contents((head, control, view[position:]))
        else:
            in_extension = length == _EXTENSION
            start = position
            position += 2 if in_extension else 1
    raise too_many("blocks", _MOST_BLOCKS)
