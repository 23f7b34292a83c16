"""Reads the pickles inside PyTorch files without running anything that they ask for.

A pickle is a program for a small stack machine. This is such a machine, and it knows data only: it
imports no module, calls no function of a pickle's choice and sets no attribute of any object. A
name such as "torch.FloatStorage" stays a name; PyTorch's own few rebuilding functions are done here
as data; configuration objects that training scripts save beside their weights become `Inert`. Every
other name is refused. Opcodes are those of protocols 2 to 5 that torch.save writes.
"""

import struct
from collections.abc import Callable
from typing import Any, NoReturn

from drep_jax.errors import CheckpointError
from drep_jax.weights.files.pickled import (
    DTYPES,
    PACKAGES,
    STORAGES,
    Array,
    Dtype,
    Global,
    Inert,
    Storage,
    Tensor,
    Unpickled,
    is_key,
    is_known,
    short,
)

LONGEST_NAME = 256
LONGEST_INTEGER = 64  # bytes
MOST_OPCODES = 20_000_000


_KEYS = (str, bytes, int, float, type(None), Global, Inert)


def unpickle(data: memoryview, start: int, where: str) -> Unpickled:
    """Reads the pickle that begins at `start`.

    Args:
      data: bytes that hold it, and perhaps more after it.
      start: where it begins.
      where: what errors call the file.

    Raises:
      CheckpointError: if it is damaged, or wants anything that is not data.
    """
    machine = _Machine(data, start, where)
    return Unpickled(machine.run(), machine.position, machine.tensors, machine.storages)


class _Machine:
    def __init__(self, data: memoryview, start: int, where: str) -> None:
        self.data, self.position, self.where = data, start, where
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.tensors: list[Tensor] = []
        self.storages: list[Storage] = []
        self.encoded: dict[str, bytes] = {}

    def run(self) -> Any:
        for _ in range(MOST_OPCODES):
            at = self.position
            opcode = self.read(1)
            if opcode == b".":
                return self.pop()
            act = _OPCODES.get(opcode)
            if act is None:
                raise CheckpointError(
                    f"{self.where}: opcode {opcode!r} at byte {at} is none that torch.save writes; nothing was run."
                )
            act(self)
        raise CheckpointError(f"{self.where}: its pickle is longer than {MOST_OPCODES} operations.")

    def damaged(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.where} is damaged: {what} at byte {self.position} of its pickle.")

    def read(self, count: int) -> bytes:
        end = self.position + count
        if count < 0 or end > len(self.data):
            self.damaged(f"it ends where {count} more bytes were expected,")
        piece = bytes(self.data[self.position : end])
        self.position = end
        return piece

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.read(struct.calcsize(form)))[0]

    def text(self, form: str, encoding: str = "utf-8") -> str:
        try:
            return self.read(self.number(form)).decode(encoding)
        except UnicodeDecodeError:
            self.damaged("text that is no UTF-8")

    def line(self) -> str:
        piece = bytes(self.data[self.position : self.position + LONGEST_NAME + 1])
        length = piece.find(b"\n")
        if length < 0 or not piece[:length].isascii():
            self.damaged("a name without an end")
        self.position += length + 1
        return piece[:length].decode("ascii")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            self.damaged("a value is missing")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            self.damaged("a value is missing")
        return self.stack[-1]

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[Any]:
        if not self.marks:
            self.damaged("a mark is missing")
        values, self.stack = self.stack, self.marks.pop()
        return values

    def pop_or_unmark(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.to_mark()

    def integer(self, form: str) -> None:
        count = self.number(form)
        if not 0 <= count <= LONGEST_INTEGER:
            self.damaged(f"an integer of {count} bytes")
        self.push(int.from_bytes(self.read(count), "little", signed=True))

    def make_tuple(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(values[::-1]))

    def bytes_of(self, form: str) -> None:
        self.push(self.read(self.number(form)))

    def string(self, form: str) -> None:
        self.push(self.text(form, "latin-1"))  # as Python 2 wrote it

    def skip_protocol(self) -> None:
        if not 2 <= self.number("<B") <= 5:
            self.damaged("a protocol that is not 2 to 5")

    def store(self, index: int) -> None:
        self.memo[index] = self.top()

    def fetch(self, index: int) -> None:
        if index not in self.memo:
            self.damaged(f"value {index}, which was not stored, is asked for")
        self.push(self.memo[index])

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Inert):
            self.damaged("values are appended to what is no list")

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if len(values) % 2:
            self.damaged("a key without a value")
        if isinstance(target, dict):
            for key, value in zip(values[::2], values[1::2], strict=True):
                target[self.key(key)] = value
        elif not isinstance(target, Inert):
            self.damaged("items are set in what is no dictionary")

    def key(self, key: Any) -> Any:
        """Tuples of tuples are refused as keys: hashing a few hundred bytes of them can take for ever."""
        if not isinstance(key, _KEYS) and not (isinstance(key, tuple) and all(isinstance(part, _KEYS) for part in key)):
            self.damaged(f"a {type(key).__name__} as a key")
        return key

    def add_items(self) -> None:
        self.to_mark()
        if not isinstance(self.top(), Inert):
            self.damaged("items are added to what is no set")

    def frozen_set(self) -> None:
        self.to_mark()
        self.push(Inert("builtins.frozenset"))

    def name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            self.damaged("a name that is no text")
        if not is_known(module, name):
            self.refuse(f"{module}.{name}")
        self.push(Global(f"{module}.{name}"))

    def refuse(self, name: str) -> NoReturn:
        divided = "Its tensors are divided among processes. " if name.startswith("torch.distributed.") else ""
        raise CheckpointError(
            f"{self.where} wants {short(name)}: refused; nothing was run. {divided}Only tensors and plain data are read here. "
            'If you trust the file, save its weights alone with PyTorch: torch.save(model.state_dict(), "weights.pth").'
        )

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def call(self, function: Any, args: Any) -> None:
        if not isinstance(function, Global) or not isinstance(args, tuple):
            self.damaged("a call of what is no name")
        if function.name in _CALLS:
            self.push(_CALLS[function.name](self, args))
        else:
            self.push(Inert(function.name))

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        self.call(function, args)

    def new(self) -> None:
        args, made_of = self.pop(), self.pop()
        if isinstance(made_of, Global) and made_of.name.startswith("torch._"):
            self.refuse(f"{made_of.name} as a class")
        self.call(made_of, args)

    def new_with_keywords(self) -> None:
        self.pop()
        self.new()

    def build(self) -> None:
        """State is dropped: that of a state dict is PyTorch's own bookkeeping, and other objects are not looked into."""
        state = self.pop()
        match self.top(), state:
            case Array(dtype=None) as array, (_, shape, dtype, fortran, data):
                if not array.fill(dtype, shape, fortran, data):
                    self.damaged("a NumPy array whose type, shape or size cannot be")
            case Dtype() as dtype, (_, "<" | ">" | "|" | "=" as order, *_):
                dtype.order = order
        if not isinstance(self.top(), Inert | dict | Tensor | Array | Dtype):
            self.damaged("state is set on what is no object")

    def persistent(self) -> None:
        """PyTorch's reference to a storage: ("storage", type, key, location, elements[, view])."""
        reference = self.pop()
        if not (isinstance(reference, tuple) and len(reference) in (5, 6) and reference[0] == "storage"):
            self.damaged("a persistent reference that is no storage")
        kind, key, _, size = reference[1:5]
        dtype = STORAGES.get(kind.name.rpartition(".")[2].removeprefix("_")) if isinstance(kind, Global) else None
        if dtype is None or not is_key(key) or type(size) is not int or size < 0:
            self.damaged("a storage whose type, key or size cannot be")
        view = reference[5] if len(reference) == 6 else None
        start, seen = 0, None
        if view is not None:
            if not (isinstance(view, tuple) and len(view) == 3 and all(type(n) is int and n >= 0 for n in view[1:])):
                self.damaged("a view of a storage that cannot be")
            start, seen = view[1:]
        self.storages.append(Storage(key, DTYPES[dtype], size, start, seen))
        self.push(self.storages[-1])

    def encode(self, args: tuple[Any, ...]) -> Any:
        """Bytes as protocol 2 keeps them; each text once, so that a small file stays small."""
        if len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin1", "latin-1"):
            if args[0] not in self.encoded:
                try:
                    self.encoded[args[0]] = args[0].encode("latin-1")
                except UnicodeEncodeError:
                    self.damaged("bytes that are none")
            return self.encoded[args[0]]
        return Inert("_codecs.encode")

    def numpy_buffer(self, args: tuple[Any, ...]) -> Array:
        array = Array()
        if len(args) != 4 or not array.fill(args[1], args[2], args[3] == "F", args[0]):
            self.damaged("a NumPy array whose type, shape or size cannot be")
        return array

    def ordered(self, args: tuple[Any, ...]) -> dict[Any, Any]:
        pairs = args[0] if args else []
        if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            self.damaged("an OrderedDict of what are no pairs")
        return {self.key(key): value for key, value in pairs}

    def tensor(self, args: tuple[Any, ...], dtype: Any = None) -> Tensor:
        if len(args) < 4 or not isinstance(args[0], Storage):
            self.damaged("a tensor without a storage")
        storage, offset, shape, strides = args[:4]
        numbers = (offset, *shape, *strides) if isinstance(shape, tuple) and isinstance(strides, tuple) else ("",)
        if not all(type(number) is int and number >= 0 for number in numbers) or len(shape) != len(strides):
            self.damaged("a tensor whose offset, shape or strides cannot be")
        tensor = Tensor(storage, dtype or storage.dtype, offset, shape, strides)
        self.tensors.append(tensor)
        return tensor

    def tensor_v2(self, args: tuple[Any, ...]) -> Tensor:
        if len(args) > 6 and args[6]:
            self.refuse("a tensor that is negated or conjugated on reading")
        return self.tensor(args)

    def tensor_v3(self, args: tuple[Any, ...]) -> Tensor:
        kind = args[6] if len(args) > 6 else None
        dtype = DTYPES.get(kind.name.removeprefix("torch.")) if isinstance(kind, Global) else None
        if dtype is None:
            self.refuse(f"a tensor of type {kind.name if isinstance(kind, Global) else type(kind).__name__}")
        return self.tensor(args, dtype)

    def attribute(self, args: tuple[Any, ...]) -> Inert:
        """A method of a class that is not looked into: mmengine's history of losses keeps some beside the weights."""
        if len(args) != 2 or not isinstance(args[0], Global) or args[0].name.partition(".")[0] not in PACKAGES:
            self.refuse("builtins.getattr")
        return Inert("builtins.getattr")

    def parameter(self, args: tuple[Any, ...]) -> Tensor:
        if not args or not isinstance(args[0], Tensor):
            self.damaged("a parameter without a tensor")
        return args[0]

    def of_type(self, args: tuple[Any, ...]) -> Tensor:
        if len(args) < 3 or not isinstance(args[0], Global) or not isinstance(args[2], tuple):
            self.damaged("a tensor without its parts")
        rebuild = _CALLS.get(args[0].name)
        if rebuild not in (_Machine.tensor, _Machine.tensor_v2, _Machine.tensor_v3, _Machine.parameter):
            self.refuse(f"{args[0].name} to make a tensor")
        return rebuild(self, args[2])


_CORES = ("core", "_core")  # of NumPy 1 and 2
_CALLS: dict[str, Callable[[_Machine, tuple[Any, ...]], Any]] = {
    "_codecs.encode": _Machine.encode,
    "numpy.dtype": lambda machine, args: Dtype(args[0]) if args and isinstance(args[0], str) else Inert("numpy.dtype"),
    **dict.fromkeys((f"numpy.{core}.multiarray._reconstruct" for core in _CORES), lambda machine, args: Array()),
    **dict.fromkeys((f"numpy.{core}.numeric._frombuffer" for core in _CORES), _Machine.numpy_buffer),
    **dict.fromkeys(("builtins.getattr", "__builtin__.getattr"), _Machine.attribute),
    "collections.OrderedDict": _Machine.ordered,
    "collections.defaultdict": lambda machine, args: {},
    "torch._utils._rebuild_tensor": _Machine.tensor,
    "torch._utils._rebuild_tensor_v2": _Machine.tensor_v2,
    "torch._utils._rebuild_tensor_v3": _Machine.tensor_v3,
    "torch._utils._rebuild_parameter": _Machine.parameter,
    "torch._utils._rebuild_parameter_with_state": _Machine.parameter,
    "torch._tensor._rebuild_from_type_v2": _Machine.of_type,
}

_OPCODES: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": _Machine.skip_protocol,
    b"\x95": lambda m: m.read(8),  # the length of a frame
    b"(": _Machine.mark,
    b"0": _Machine.pop_or_unmark,
    b"1": _Machine.to_mark,
    b"2": lambda m: m.push(m.top()),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.integer("<B"),
    b"\x8b": lambda m: m.integer("<i"),
    b"G": lambda m: m.push(m.number(">d")),
    b"X": lambda m: m.push(m.text("<I")),
    b"\x8c": lambda m: m.push(m.text("<B")),
    b"\x8d": lambda m: m.push(m.text("<Q")),
    b"T": lambda m: m.string("<i"),
    b"U": lambda m: m.string("<B"),
    b"B": lambda m: m.bytes_of("<I"),
    b"C": lambda m: m.bytes_of("<B"),
    b"\x8e": lambda m: m.bytes_of("<Q"),
    b"\x96": lambda m: m.bytes_of("<Q"),
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.to_mark()),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.to_mark()),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.to_mark())),
    b"\x85": lambda m: m.make_tuple(1),
    b"\x86": lambda m: m.make_tuple(2),
    b"\x87": lambda m: m.make_tuple(3),
    b"}": lambda m: m.push({}),
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.set_items(m.to_mark()),
    b"\x8f": lambda m: m.push(Inert("builtins.set")),
    b"\x90": _Machine.add_items,
    b"\x91": _Machine.frozen_set,
    b"c": lambda m: m.name(m.line(), m.line()),
    b"\x93": _Machine.stack_name,
    b"q": lambda m: m.store(m.number("<B")),
    b"r": lambda m: m.store(m.number("<I")),
    b"\x94": lambda m: m.store(len(m.memo)),
    b"h": lambda m: m.fetch(m.number("<B")),
    b"j": lambda m: m.fetch(m.number("<I")),
    b"R": _Machine.reduce,
    b"\x81": _Machine.new,
    b"\x92": _Machine.new_with_keywords,
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
}
