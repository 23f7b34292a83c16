"""What the pickles inside PyTorch files may hold: values that stand for objects, and the names that are accepted.

Nothing here is imported or called for a file's sake: a name such as "torch.FloatStorage" stays a
name.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class Global:
    """A name that a pickle wanted to import; nothing was."""

    name: str


@dataclass(frozen=True, eq=False)
class Inert:
    """Stands for an object of a class that is not looked into; it takes any state and keeps none."""

    name: str


@dataclass(frozen=True, eq=False)
class Storage:
    """Bytes kept elsewhere in the file: `size` elements of `dtype`, of which a view sees `seen` from `start` on."""

    key: str
    dtype: np.dtype
    size: int
    start: int = 0
    seen: int | None = None


@dataclass(frozen=True, eq=False)
class Tensor:
    """A strided view of a storage; `offset` and `strides` count elements. Not yet checked against the storage."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(eq=False)
class Dtype:
    """NumPy's type of numbers as a pickle writes it: "f4" and the like, and a byte order that follows."""

    code: str
    order: str = "="


@dataclass(eq=False)
class Array:
    """A NumPy array inside a pickle, once its state has been set; `dtype` is None for what is no array of numbers."""

    dtype: np.dtype | None = None
    shape: tuple[int, ...] = ()
    fortran: bool = False
    swapped: bool = False
    data: bytes = b""

    def fill(self, dtype: Any, shape: Any, fortran: Any, data: Any) -> bool:
        """Takes what a pickle says of the array; returns whether that can be, which other types of numbers can."""
        if not isinstance(dtype, Dtype) or not isinstance(shape, tuple) or not isinstance(data, bytes | list | Inert):
            return False
        numbers = NUMPY_DTYPES.get(dtype.code)
        if numbers is None or not isinstance(data, bytes):
            return True
        if not all(type(size) is int and size >= 0 for size in shape):
            return False
        if math.prod(shape) * numbers.itemsize != len(data):
            return False
        self.dtype, self.shape, self.fortran, self.data = numbers, shape, bool(fortran), data
        self.swapped = dtype.order == ">"
        return True


@dataclass(frozen=True)
class Unpickled:
    """What a pickle held; `end` is the position after it."""

    value: Any  # of None, bool, int, float, str, bytes, tuple, list, dict, Global, Inert, Dtype, Array, Storage, Tensor
    end: int
    tensors: list[Tensor]  # all that were made on the way, those inside `Inert` objects too
    storages: list[Storage]


NUMPY_DTYPES: dict[str, np.dtype] = {
    f"{kind}{size}": np.dtype(f"{kind}{size}")
    for kind, sizes in {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "b": (1,), "c": (8, 16)}.items()
    for size in sizes
}
"""Numbers by NumPy's codes for them."""

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "float32": np.float32,
        "float64": np.float64,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e5m2": ml_dtypes.float8_e5m2,
        "int64": np.int64,
        "int32": np.int32,
        "int16": np.int16,
        "int8": np.int8,
        "uint64": np.uint64,
        "uint32": np.uint32,
        "uint16": np.uint16,
        "uint8": np.uint8,
        "bool": np.bool_,
        "complex64": np.complex64,
        "complex128": np.complex128,
    }.items()
}
STORAGES: dict[str, str] = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}

# Names that are accepted and stay without effect. Configuration classes are accepted from any
# module, since projects copy them into their own; nothing is imported, so what a module of that
# name would do is of no concern.
_CONFIGURATIONS = {
    "Namespace",
    "CfgNode",
    "Config",
    "ConfigDict",
    "EasyDict",
    "AttrDict",
    "DictConfig",
    "ListConfig",
}
# So are all names of these packages, and methods of their classes.
PACKAGES = {"yacs", "omegaconf", "mmcv", "mmengine", "easydict", "fvcore", "ml_collections", "pathlib"}
_NUMPY = {"dtype", "ndarray", "scalar", "_reconstruct", "_frombuffer"} | set(DTYPES) | {"bool_", "str_", "bytes_"}
_PLAIN = {
    "collections": {"OrderedDict", "defaultdict", "Counter", "deque"},
    "builtins": {"set", "frozenset", "slice", "range", "complex", "bytearray", "dict", "list", "tuple", "int", "float"}
    | {"str", "bool", "bytes", "getattr"}
    | {"long", "unicode", "xrange"},
    "datetime": {"datetime", "date", "time", "timedelta", "timezone"},
    "typing": {"Any", "Union", "Optional", "Dict", "List", "Tuple"},
    "uuid": {"UUID"},
    "_codecs": {"encode"},  # how protocol 2 keeps bytes
    "torch": {"Size", "device", "Tensor", "dtype", "strided", "Generator"} | set(DTYPES) | set(STORAGES),
    "torch.cuda": set(STORAGES) | {"FloatTensor", "HalfTensor"},
    "torch.storage": {"UntypedStorage", "_UntypedStorage", "TypedStorage", "_TypedStorage"},
    "torch.nn.parameter": {"Parameter", "Buffer"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
    },
    "torch._tensor": {"_rebuild_from_type_v2"},
}
_PLAIN["__builtin__"] = _PLAIN["builtins"]  # as Python 2 called it


def is_known(module: str, name: str) -> bool:
    """Returns whether a name may appear in a file; it is never imported either way."""
    if not name.isidentifier():  # "os.system" in the module "torch.serialization", say
        return False
    package = module.partition(".")[0]
    return (
        name in _PLAIN.get(module, ())
        or (package == "numpy" and name in _NUMPY)
        or (package == "torch" and module.startswith("torch.optim."))
        or package in PACKAGES
        or name in _CONFIGURATIONS
    )


def is_key(key: Any) -> bool:
    """Returns whether a pickle may call a storage so."""
    return isinstance(key, str) and re.fullmatch(r"[\w.-]{1,80}", key, re.ASCII) is not None


def short(text: str) -> str:
    """Returns a file's text as a message may quote it."""
    return text if len(text) <= 120 and text.isprintable() else repr(text[:120])
