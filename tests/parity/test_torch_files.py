"""Checkpoint files against an installed PyTorch, in both directions: what it writes is read, what is written it reads."""

import argparse
import collections
import datetime
import pathlib
import random

import ml_dtypes
import numpy as np
import pytest

from drep_jax.errors import CheckpointError
from drep_jax.weights import files

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

MARK = {"rule": "ddim"}
DTYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
    torch.complex64: np.complex64,
}
NEW_DTYPES = {  # without a storage class of their own: only in zip files
    torch.uint16: np.uint16,
    torch.uint32: np.uint32,
    torch.uint64: np.uint64,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
}
kinds = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(value, path, zipped):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return str(path)


def loads(path, zipped=True, weights_only=True):
    """What torch.load gives, in every way that it offers for such a file."""
    for mapped in (False, True)[: 1 + zipped]:
        yield torch.load(path, weights_only=weights_only, mmap=mapped)


def bits(tensor):
    """The bytes of a tensor, by PyTorch alone."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(array, tensor, dtypes=DTYPES):
    assert array.dtype == dtypes[tensor.dtype] and array.shape == tuple(tensor.shape)
    assert np.ascontiguousarray(array).tobytes() == bits(tensor)


@kinds
def test_every_dtype_is_read(zipped, tmp_path):
    dtypes = {**DTYPES, **(NEW_DTYPES if zipped else {})}
    torch.manual_seed(0)
    state = {str(dtype): (torch.randn(3, 4).abs() * 3).to(dtype) for dtype in dtypes}
    found = files.read(save(state, tmp_path / "a.pth", zipped))
    assert list(found.tensors) == list(state)
    for name, tensor in state.items():
        same(found.tensors[name], tensor, dtypes)


@kinds
def test_every_view_is_read(zipped, tmp_path):
    generator = random.Random(0)
    base = torch.randn(6, 5, 4)
    views = {
        "base": base,
        "expanded": torch.randn(1, 3).expand(4, 3),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(2, 0),
    }
    for i in range(40):
        view = base.permute(*generator.sample(range(3), 3))
        view = view[generator.randrange(2) :: generator.randrange(1, 3), ..., generator.randrange(3) :]
        views[f"view{i}"] = view.select(generator.randrange(3), 0) if generator.random() < 0.5 else view
    found = files.read(save(views, tmp_path / "a.pth", zipped))
    for name, tensor in views.items():
        same(found.tensors[name], tensor)


@kinds
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_training_checkpoint_is_read(zipped, protocol, tmp_path):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 2)
    )
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    schedule.step()
    value = {
        "model": torch.nn.DataParallel(model).state_dict(),
        "model_ema": averaged.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "args": argparse.Namespace(lr=1e-3, path=pathlib.Path("/x"), when=datetime.datetime(2020, 1, 1)),
        "rng": [torch.get_rng_state(), np.random.RandomState(0).get_state(), random.getstate()],
        "best": np.float32(0.5),
        "where": torch.device("cpu"),
        "counts": collections.Counter("ab"),
    }
    path = tmp_path / "a.pth"
    torch.save(value, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    plain = files.read(str(path), state="model")
    assert list(plain.tensors) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        same(plain.tensors[name], tensor)
    found = files.read(str(path))
    assert found.tensors.keys() == {*model.state_dict(), "n_averaged"}
    changed = {"3.weight": np.ones((2, 16))}
    files.write_changed(plain, str(tmp_path / "b.pth"), changed, MARK)
    for loaded in loads(tmp_path / "b.pth", zipped, weights_only=False):
        assert torch.equal(loaded["model"].pop("module.3.weight"), torch.ones(2, 16))
        assert all(torch.equal(tensor, value["model"][name]) for name, tensor in loaded["model"].items())
        assert all(torch.equal(tensor, value["model_ema"][name]) for name, tensor in loaded["model_ema"].items())
        moments = loaded["optimizer"]["state"][0]
        assert torch.equal(moments["exp_avg"], value["optimizer"]["state"][0]["exp_avg"])
        assert vars(loaded["args"]) == vars(value["args"])


@kinds
def test_what_is_changed_is_what_pytorch_reads(zipped, tmp_path):
    tied = torch.randn(3, 4)
    state = collections.OrderedDict(
        a=torch.randn(5, 3).half(),
        b=torch.randn(4, 2).T,
        tied=tied,
        tied_too=tied,
        part=torch.randn(20)[3:9].view(2, 3),
        c=torch.randn(7).bfloat16(),
        n=torch.tensor(3),
    )
    source = files.read(save(state, tmp_path / "a.pth", zipped))
    rng = np.random.default_rng(0)
    changed = {name: rng.normal(size=source.tensors[name].shape) for name in ("a", "b", "tied", "part", "c")}
    changed["tied_too"] = changed["tied"]
    files.write_changed(source, str(tmp_path / "b.pth"), changed, MARK)
    for loaded in loads(tmp_path / "b.pth", zipped):
        assert list(loaded) == list(state) and torch.equal(loaded.pop("n"), state["n"])
        assert loaded["tied"].data_ptr() == loaded["tied_too"].data_ptr()
        assert loaded["b"].stride() == state["b"].stride() and loaded["part"].storage_offset() == 3
        for name, tensor in loaded.items():
            same(np.asarray(changed[name]).astype(DTYPES[state[name].dtype]), tensor)
    assert files.read(str(tmp_path / "b.pth")).fused == MARK


@kinds
def test_parameters_with_attributes_are_read(zipped, tmp_path):
    parameter = torch.nn.Parameter(torch.randn(2, 2))
    parameter.no_decay = True
    attributed = torch.randn(3)
    attributed.note = "x"
    found = files.read(save({"p": parameter, "t": attributed}, tmp_path / "a.pth", zipped))
    same(found.tensors["p"], parameter)
    same(found.tensors["t"], attributed)


def test_files_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save({"a": torch.arange(6.0)}, tmp_path / "a.pth", True)
    finally:
        torch.serialization.set_crc32_options(True)
    files.write_changed(files.read(path), str(tmp_path / "b.pth"), {"a": np.arange(6.0) + 1}, MARK)
    for loaded in loads(tmp_path / "b.pth"):
        assert torch.equal(loaded["a"], torch.arange(6.0) + 1)


def test_big_endian_is_what_pytorch_reads():
    path = str(pathlib.Path(__file__).parents[1] / "weights" / "fixtures" / "big_endian.pth")
    loaded = torch.load(path, weights_only=True)
    for name, array in files.read(path).tensors.items():
        same(array, loaded[name])


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".th"])
def test_new_files_are_read(suffix, tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        f"layer.{name}": (rng.normal(size=(3, 4)) * 3).astype(dtype) for name, dtype in enumerate(DTYPES.values())
    }
    tensors |= {
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 2), np.float32),
        "transposed": rng.normal(size=(4, 3)).T,
    }
    path = str(tmp_path / f"new{suffix}")
    files.create(path, tensors, MARK)
    for loaded in loads(path):
        assert isinstance(loaded, collections.OrderedDict) and list(loaded) == list(tensors)
        for name, tensor in loaded.items():
            same(np.asarray(tensors[name]), tensor)
            assert tensor.is_contiguous() and tensor.storage_offset() == 0
    module = torch.nn.Linear(4, 3)
    files.create(path, {"weight": np.ones((3, 4), np.float32), "bias": np.zeros(3, np.float32)}, MARK)
    module.load_state_dict(torch.load(path, weights_only=True), strict=True)


@kinds
def test_whole_modules_are_refused(zipped, tmp_path):
    path = save(torch.nn.Linear(2, 2), tmp_path / "a.pth", zipped)
    with pytest.raises(CheckpointError, match=r"wants torch.nn.modules.linear.Linear: refused; nothing was run"):
        files.read(path)
    sparse = save({"a": torch.eye(3).to_sparse()}, tmp_path / "b.pth", zipped)
    with pytest.raises(CheckpointError, match=r"wants torch._utils._rebuild_sparse_tensor: refused"):
        files.read(sparse)
