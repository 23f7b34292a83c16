"""PyTorch files put together by hand, honest and malicious, around any pickle."""

import pickle
import struct
import zipfile

LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of PyTorch's magic number


def zip_file(path, program, storages=(("0", bytes(24)),), order=b"little", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", program, zipfile.ZIP_STORED)
        archive.writestr("a/byteorder", order, zipfile.ZIP_STORED)
        for key, data in storages:
            archive.writestr(f"a/data/{key}", data)
    return str(path)


def legacy_file(path, program, storages=(("0", 4, bytes(24)),)):
    parts = [LEGACY_START, pickle.dumps(1001, 2), pickle.dumps({"little_endian": True}, 2), program]
    parts.append(pickle.dumps([key for key, _, _ in storages], 2))
    parts += [struct.pack("<q", len(data) // size) + data for _, size, data in storages]
    path.write_bytes(b"".join(parts))
    return str(path)


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def number(value):
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tensor(shape=(2, 3), strides=(3, 1), offset=0, size=6, kind="FloatStorage", key="0", view=b""):
    """The opcodes of one tensor."""
    numbers = (b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides))
    storage = (
        b"(U\x07storage" + name("torch", kind) + b"U" + bytes([len(key)]) + key.encode() + b"U\x03cpu" + number(size)
    )
    made = (
        name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + view + b"tQ" + number(offset) + b"".join(numbers)
    )
    return made + b"\x89}tR"


def state(*tensors, after=b""):
    """The pickle of {"a": first, "b": second, …}."""
    items = b"".join(b"U\x01" + bytes([97 + i]) + one for i, one in enumerate(tensors))
    return b"\x80\x02}(" + items + b"u" + after + b"."
