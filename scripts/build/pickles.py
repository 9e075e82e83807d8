"""Read what PyTorch pickles, without pickle: an interpreter that imports and calls nothing.

A pickle is a program for a stack machine, which may import and call any function. Here names of
classes and functions stay names, so that a hostile file can do no more than describe tensors.
Instructions: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

import io
import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# timm's largest models take 100,000.
MAX_INSTRUCTIONS = 2_000_000
MAX_DIMENSIONS = 16
MAX_NUMBER = 2**40
MAX_MODULES = 20_000
MAX_PREFIX_LENGTH = 300

# Types of storages; bfloat16, which NumPy does not have, becomes float32.
DTYPES = {
    "Double": "<f8",
    "Float": "<f4",
    "Half": "<f2",
    "BFloat16": "bfloat16",
    "Long": "<i8",
    "Int": "<i4",
    "Short": "<i2",
    "Char": "i1",
    "Byte": "u1",
    "Bool": "?",
}
_MAPPINGS = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict"}
_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
_TENSOR_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter"}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class RejectedError(Exception):
    """A file cannot be used; the text is a clause that begins with "it"."""


class Name(str):
    """The name of a class or a function, such as "collections.OrderedDict"."""

    __slots__ = ()


class Dict(dict[Any, Any]):
    """A mapping, with the versions of layers that PyTorch keeps with a state dict's tensors."""

    metadata: object = None


@dataclass(eq=False)
class Object:
    """An object of any other class: its name, and what it would be restored from."""

    name: str
    state: object = None


@dataclass(eq=False)
class Storage:
    """The memory of tensors; `dtype` is None for types that are not read.

    Attributes:
        dtype: NumPy's name of it, or "bfloat16".
        count: number of values.
        values: once the file's bytes have been read.
    """

    dtype: str | None
    count: int
    values: NDArray[Any] = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if not _is_size(self.count):
            raise ValueError("a size is no number, negative or too large")

    @property
    def width(self) -> int:
        """Return the bytes of one value in the file."""
        return 2 if self.dtype == "bfloat16" else np.dtype(self.dtype or "u1").itemsize

    def fill(self, content: bytes) -> None:
        """Take the values from their bytes; raise `RejectedError` if there are too few."""
        if self.dtype is not None and len(content) != self.count * self.width:
            raise RejectedError("it is cut off, or claims more weights than it holds")
        if self.dtype == "bfloat16":
            bits = np.frombuffer(content, "<u2").astype(np.uint32) << 16
            self.values = bits.view(np.float32)
        elif self.dtype is not None:
            self.values = np.frombuffer(content, self.dtype)


@dataclass(eq=False)
class Tensor:
    """A part of a storage; sizes, steps and offset count values."""

    storage: Storage
    offset: int
    sizes: tuple[int, ...]
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.sizes, *self.steps)
        if any(not _is_size(number) for number in numbers):
            raise ValueError("a size is no number, negative or too large")
        if len(self.sizes) != len(self.steps):
            raise ValueError("a tensor with as many steps as dimensions was expected")

    def array(self) -> NDArray[Any]:
        """Return a view of the storage; raise `RejectedError` if it claims more than there is."""
        values = self.storage.values
        last = sum((n - 1) * s for n, s in zip(self.sizes, self.steps, strict=True))
        count = math.prod(self.sizes)
        if count > len(values) or (count and self.offset + last >= len(values)):
            raise RejectedError("it is cut off, or claims more weights than it holds")
        if not count:
            return np.zeros(self.sizes, values.dtype)
        steps = [step * values.itemsize for step in self.steps]
        return np.lib.stride_tricks.as_strided(
            values[self.offset :], self.sizes, steps, writeable=False
        )


def read(stream: io.BytesIO, storage: Callable[[tuple[Any, ...]], Storage] | None = None) -> Any:
    """Return the object that a pickle describes, and leave the stream at its end.

    Args:
        stream: at the beginning of the pickle.
        storage: returns the storage for a persistent id; None if there are none.

    Raises:
        Exception: of any kind, for a file that is damaged or hostile.
    """
    machine = _Machine(storage)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if opcode.name == "STOP":
            return machine.stack.pop()
        if count > MAX_INSTRUCTIONS:
            break
        machine.step(opcode.name, argument)
    raise RejectedError("it has too many objects")


class _Machine:
    """The stack, the marks in it, and the numbered objects of a pickle."""

    def __init__(self, storage: Callable[[tuple[Any, ...]], Storage] | None) -> None:
        self.storage = storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def step(self, name: str, argument: Any) -> None:
        """Run one instruction; raise `ValueError` for one that PyTorch does not write."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}:
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name in {"GET", "BINGET", "LONG_BINGET"}:
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in {"TUPLE1", "TUPLE2", "TUPLE3"}:
            self.replace(int(name[-1]), tuple)
        elif name not in {"PROTO", "FRAME"}:
            getattr(self, f"_{name.lower()}")(argument)

    def replace(self, count: int, function: Callable[[list[Any]], Any]) -> None:
        """Replace the last `count` objects by one that is made of them."""
        items = self.stack[-count:]
        if len(items) < count:
            raise ValueError("the stack is empty")
        self.stack[-count:] = [function(items)]

    def marked(self) -> list[Any]:
        """Take the objects after the last mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _pop(self, _: None) -> None:
        self.stack.pop()

    def _empty_dict(self, _: None) -> None:
        self.stack.append(Dict())

    def _empty_list(self, _: None) -> None:
        self.stack.append([])

    def _empty_set(self, _: None) -> None:
        self.stack.append(Object("set"))

    def _tuple(self, _: None) -> None:
        self.stack.append(tuple(self.marked()))

    def _list(self, _: None) -> None:
        self.stack.append(self.marked())

    def _frozenset(self, _: None) -> None:
        self.marked()
        self.stack.append(Object("frozenset"))

    def _dict(self, _: None) -> None:
        self.stack.append(_set(Dict(), self.marked()))

    def _setitems(self, _: None) -> None:
        items = self.marked()
        _set(self.stack[-1], items)

    def _setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set(self.stack[-1], [key, value])

    def _additems(self, _: None) -> None:
        self.marked()

    def _appends(self, _: None) -> None:
        items = self.marked()
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _append(self, _: None) -> None:
        item = self.stack.pop()
        if isinstance(self.stack[-1], list):
            self.stack[-1].append(item)

    def _global(self, argument: str) -> None:
        self.stack.append(Name(argument.replace(" ", ".")))

    def _stack_global(self, _: None) -> None:
        self.replace(2, lambda parts: Name(f"{parts[0]:s}.{parts[1]:s}"))

    def _reduce(self, _: None) -> None:
        # Python 2 passes all pairs of an OrderedDict; a hostile file may do so again and again.
        for argument in self.stack[-1]:
            self.copied += len(argument) if isinstance(argument, list) else 0
        if self.copied > MAX_INSTRUCTIONS:
            raise RejectedError("it has too many objects")
        self.replace(2, lambda parts: _call(parts[0], parts[1]))

    def _newobj(self, _: None) -> None:
        self.replace(2, lambda parts: _call(parts[0], ()))

    def _newobj_ex(self, _: None) -> None:
        self.replace(3, lambda parts: _call(parts[0], ()))

    def _build(self, _: None) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Object):
            made.state = state
        elif isinstance(made, Dict) and isinstance(state, Dict):
            made.metadata = state.get("_metadata")

    def _binpersid(self, _: None) -> None:
        if self.storage is None:
            raise ValueError("a pickle without storages refers to one")
        self.stack.append(self.storage(self.stack.pop()))


def _set(mapping: object, items: list[Any]) -> object:
    """Add keys and values that follow one another; keys of other types belong to no weights."""
    if isinstance(mapping, Dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, (str, int)):
                mapping[key] = value
    return mapping


def _is_tensor_type(value: object) -> bool:
    # Only names are hashed: of nested tuples that may take forever, or overflow the stack.
    return isinstance(value, Name) and value in _TENSOR_TYPES


def _is_size(number: object) -> bool:
    return type(number) is int and 0 <= number < MAX_NUMBER


def _call(function: object, arguments: tuple[Any, ...]) -> object:
    """Return what a call of a function of PyTorch's returns, or else an inert object."""
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise ValueError("a call of what is no function")
    if function in _MAPPINGS:
        pairs = arguments[0] if arguments and isinstance(arguments[0], list) else ()
        return _set(Dict(), [part for pair in pairs for part in pair[:2]])
    if function in _PARAMETERS:
        return arguments[0]
    if function == "torch._tensor._rebuild_from_type_v2" and _is_tensor_type(arguments[1]):
        return _call(arguments[0], arguments[2])
    if function in _TENSORS:
        storage, offset, sizes, steps = arguments[:4]
        if isinstance(storage, Storage) and len(sizes) <= MAX_DIMENSIONS:
            return Tensor(storage, offset, tuple(sizes), tuple(steps[: len(sizes)]))
    return Object(function)


def state_of(value: object) -> Mapping[Any, Any] | None:
    """Return a mapping, or the state dict of a module that was pickled as a whole; else None."""
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, Object) or not isinstance(value.state, Dict):
        return None
    is_module = value.name.startswith("__torch__.") or "_parameters" in value.state
    return _module_state(value) if is_module else None


def _module_state(module: Object) -> Dict:
    """Return a module's tensors by their names, and what is neither a tensor nor a module."""
    found, waiting = Dict(), [("", module)]
    for prefix, part in waiting:
        if len(waiting) > MAX_MODULES or len(prefix) > MAX_PREFIX_LENGTH:
            raise RejectedError("it has too many modules, or too deep ones")
        state = part.state
        assert isinstance(state, Dict)
        kinds = [state.get(kind) for kind in ("_parameters", "_buffers", "_modules")]
        for members in kinds if "_parameters" in state else [state]:
            for name, value in members.items() if isinstance(members, Dict) else ():
                if isinstance(value, Object) and isinstance(value.state, Dict):
                    waiting.append((f"{prefix}{name}.", value))
                elif isinstance(value, (Object, Tensor)):
                    found[f"{prefix}{name}"] = value
    return found
