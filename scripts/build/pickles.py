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


class RejectedError(Exception):
    """A file cannot be used; the text is a clause that begins with "it"."""


_CUT_OFF = "it is cut off, or claims more weights than it holds"
_TOO_MANY = "it has too many objects"


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
    """The memory of tensors: `count` values of a NumPy type, or of "bfloat16".

    `dtype` is None for types that are not read.
    """

    dtype: str | None
    count: int
    values: NDArray[Any] = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        _check_sizes(self.count)

    @property
    def width(self) -> int:
        """Return the bytes of one value in the file."""
        return 2 if self.dtype == "bfloat16" else np.dtype(self.dtype or "u1").itemsize

    def fill(self, content: bytes) -> None:
        """Parse the values; raise `RejectedError` if there are too few."""
        if self.dtype is not None and len(content) != self.count * self.width:
            raise RejectedError(_CUT_OFF)
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
        _check_sizes(self.offset, *self.sizes, *self.steps)
        if len(self.sizes) != len(self.steps):
            raise ValueError("a tensor must have as many steps as dimensions")

    def array(self) -> NDArray[Any]:
        """Return a view of the storage; raise `RejectedError` if it claims more than there is."""
        values = self.storage.values
        last = sum((n - 1) * s for n, s in zip(self.sizes, self.steps, strict=True))
        count = math.prod(self.sizes)
        if count > len(values) or (count and self.offset + last >= len(values)):
            raise RejectedError(_CUT_OFF)
        if not count:
            return np.zeros(self.sizes, values.dtype)
        steps = [step * values.itemsize for step in self.steps]
        return np.lib.stride_tricks.as_strided(
            values[self.offset :], self.sizes, steps, writeable=False
        )


def _check_sizes(*numbers: object) -> None:
    if not all(type(number) is int and 0 <= number < MAX_NUMBER for number in numbers):
        raise ValueError("a size is no number, negative or too large")


Storages = Callable[[tuple[Any, ...]], Storage]


def read(stream: io.BytesIO, storage: Storages | None = None) -> Any:
    """Return the object that a pickle describes, and leave the stream at its end.

    A damaged or hostile file raises an exception of any kind. `storage` returns the storage for a
    persistent id.
    """
    machine = _Machine(storage)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if opcode.name == "STOP":
            return machine.stack.pop()
        if count > MAX_INSTRUCTIONS:
            break
        _INSTRUCTIONS[opcode.name](machine, argument)
    raise RejectedError(_TOO_MANY)


@dataclass
class _Machine:
    """The stack, the marks in it, and the numbered objects of a pickle."""

    storage: Storages | None
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    copied: int = 0

    def take(self, count: int | None) -> list[Any]:
        """Remove and return the last `count` objects, or those after the last mark."""
        start = self.marks.pop() if count is None else len(self.stack) - count
        if start < 0:
            raise ValueError("the stack is empty")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def put(self, number: int | None) -> None:
        self.memo[len(self.memo) if number is None else number] = self.stack[-1]

    def reduce(self) -> None:
        function, arguments = self.take(2)
        # Python 2 passes all pairs of an OrderedDict; a hostile file may do so again and again.
        self.copied += sum(len(part) for part in arguments if isinstance(part, list))
        if self.copied > MAX_INSTRUCTIONS:
            raise RejectedError(_TOO_MANY)
        self.stack.append(_call(function, arguments))

    def build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Object):
            made.state = state
        elif isinstance(made, Dict) and isinstance(state, Dict):
            made.metadata = state.get("_metadata")

    def persistent_id(self) -> None:
        if self.storage is None:
            raise ValueError("a pickle without storages refers to one")
        self.stack.append(self.storage(self.stack.pop()))


def _add(target: object, items: list[Any]) -> object:
    """Extend a list, or a mapping by keys and values that follow one another.

    Keys of other types than str and int belong to no weights and are skipped: hashing nested tuples
    may take forever, or overflow the stack.
    """
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, Dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, (str, int)):
                target[key] = value
    return target


def _call(function: object, arguments: tuple[Any, ...] = ()) -> object:
    """Return what a call of a function of PyTorch's returns, or else an inert object."""
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise ValueError("a call of what is no function")
    if function in _MAPPINGS:
        pairs = arguments[0] if arguments and isinstance(arguments[0], list) else ()
        return _add(Dict(), [part for pair in pairs for part in pair[:2]])
    if function in _PARAMETERS:
        return arguments[0]
    if function == "torch._tensor._rebuild_from_type_v2":
        kind = arguments[1]
        if isinstance(kind, Name) and kind in _TENSOR_TYPES:
            return _call(arguments[0], arguments[2])
    if function in _TENSORS:
        storage, offset, sizes, steps = arguments[:4]
        if isinstance(storage, Storage) and len(sizes) <= MAX_DIMENSIONS:
            return Tensor(storage, offset, tuple(sizes), tuple(steps[: len(sizes)]))
    return Object(function)


_Instruction = Callable[[_Machine, Any], object]


def _push(make: Callable[[Any], object]) -> _Instruction:
    """Push what is made of the instruction's argument."""
    return lambda machine, argument: machine.stack.append(make(argument))


def _replace(count: int | None, make: Callable[[list[Any]], object]) -> _Instruction:
    """Replace the last objects by one that is made of them; for None those after the mark."""
    return lambda machine, _: machine.stack.append(make(machine.take(count)))


def _extend(count: int | None) -> _Instruction:
    """Add the last objects to the one before them."""

    def run(machine: _Machine, _: object) -> None:
        items = machine.take(count)
        _add(machine.stack[-1], items)

    return run


_LITERALS = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8"
)
# Those that PyTorch writes; all others are a KeyError.
_INSTRUCTIONS: dict[str, _Instruction] = {
    **dict.fromkeys(_LITERALS.split(), _push(lambda literal: literal)),
    **dict.fromkeys(("PROTO", "FRAME"), lambda *_: None),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), lambda m, key: m.put(key)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, key: m.stack.append(m.memo[key])),
    **dict.fromkeys(("APPENDS", "ADDITEMS", "SETITEMS"), _extend(None)),
    "NONE": _push(lambda _: None),
    "NEWTRUE": _push(lambda _: True),
    "NEWFALSE": _push(lambda _: False),
    "EMPTY_TUPLE": _push(lambda _: ()),
    "EMPTY_LIST": _push(lambda _: []),
    "EMPTY_DICT": _push(lambda _: Dict()),
    "EMPTY_SET": _push(lambda _: Object("set")),
    "GLOBAL": _push(lambda name: Name(name.replace(" ", "."))),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": lambda machine, _: machine.stack.pop(),
    "TUPLE": _replace(None, tuple),
    **{f"TUPLE{count}": _replace(count, tuple) for count in (1, 2, 3)},
    "LIST": _replace(None, list),
    "DICT": _replace(None, lambda items: _add(Dict(), items)),
    "FROZENSET": _replace(None, lambda _: Object("frozenset")),
    "STACK_GLOBAL": _replace(2, lambda parts: Name(f"{parts[0]:s}.{parts[1]:s}")),
    "NEWOBJ": _replace(2, lambda parts: _call(parts[0])),
    "NEWOBJ_EX": _replace(3, lambda parts: _call(parts[0])),
    "APPEND": _extend(1),
    "SETITEM": _extend(2),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.persistent_id(),
}


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
