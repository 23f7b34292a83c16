"""examples/: a network that the registry does not know through train.py and fuse.py, and both short scripts."""

import os

import jax
import numpy as np
import pytest

from drep_jax import weights
from drep_jax.weights import files
from examples.camera_noise import camera_noise
from examples.own_model import make_checkpoint
from examples.own_model.mynet import MyNet
from examples.pth_back import pth_back
from tests.command import ROOT, call

HERE = ROOT / "examples" / "own_model"
QUICK = (
    "--config.progress=False",
    "--config.measured.images=64",
    "--config.measured.ridge=0.001",  # so that every site is changed, however few images there are
    "--config.select.images=32",
    "--config.evaluate.batch_size=200",
    "--config.evaluate.resamples=200",
    "--config.evaluate.certificate_images=4",
    "--config.evaluate.conditions=('clean',)",
    "--config.latency_rounds=2",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The example's PyTorch file, as a user's own: without our mark, with what else training left in it."""
    path = str(tmp_path_factory.mktemp("own") / "net.pth")
    make_checkpoint.main(path)
    return path


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("own_run") / "run")
    ended = call(
        "train.py",
        f"--config={HERE / 'config.py'}",
        f"--workdir={directory}",
        f"--config.backbone.init_from={checkpoint}",
        *QUICK,
    )
    assert ended.status == 0, ended.messages
    assert "format mynet" in ended.output
    return directory


def test_the_stand_in_is_a_trained_network_in_pytorchs_layouts(checkpoint):
    tensors = files.read(checkpoint).tensors
    assert tensors["features.1.conv.0.weight"].shape == (16, 1, 3, 3)
    assert tensors["classifier.weight"].shape == (10, 16)
    images, labels = make_checkpoint.digits("test")
    read = weights.read(checkpoint, MyNet(10), (8, 8), names=str(HERE / "names.py"))
    x = make_checkpoint.normalize(images, make_checkpoint.MEAN, make_checkpoint.STD)
    assert np.mean(np.argmax(MyNet(10).apply(read.variables, x), -1) == labels) > 0.8


def test_the_same_file_comes_back_fused_from_the_command_line(checkpoint, run, tmp_path):
    ended = call("fuse.py", f"--workdir={run}", f"--out={tmp_path}", "--export=same")
    assert ended.status == 0, ended.messages
    old, new = (files.read(path).tensors for path in (checkpoint, str(tmp_path / "net_fused.pth")))
    assert list(old) == list(new)
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    convolutions = {name for name in old if old[name].ndim == 4}
    assert changed == {*convolutions, "classifier.weight", "classifier.bias"}
    options = {"names": str(HERE / "names.py"), "allow_fused": True}
    back = weights.read(str(tmp_path / "net_fused.pth"), MyNet(10), (8, 8), **options).variables
    ours = weights.load(str(tmp_path / "fused.safetensors"), back, allow_fused=True)
    jax.tree.map(np.testing.assert_array_equal, back, ours)
    again = f"--config.backbone.init_from={tmp_path / 'net_fused.pth'}"
    call("train.py", f"--config={HERE / 'config.py'}", f"--workdir={tmp_path / 'run'}", again).refused("already fused")


def test_a_new_file_and_a_table_that_has_moved(run, checkpoint, tmp_path):
    moved = tmp_path / "moved.py"
    moved.write_text((HERE / "names.py").read_text())
    where = f"--init_names={moved}"
    ended = call("fuse.py", f"--workdir={run}", f"--out={tmp_path / 'a'}", "--export=mynet,pytorch", where)
    assert ended.status == 0, ended.messages
    assert os.path.exists(tmp_path / "a" / "net_fused.pth")
    dotted = files.read(str(tmp_path / "a" / "fused_pytorch.pth")).tensors
    assert dotted["block0.bn1.running_var"].shape == (16,) and dotted["stem.weight"].shape == (16, 3, 3, 3)
    gone = f"--init_names={tmp_path / 'gone.py'}"
    call("fuse.py", f"--workdir={run}", f"--out={tmp_path / 'b'}", "--export=same", gone).refused(
        "There is no file", "--init_names"
    )
    call("fuse.py", f"--workdir={run}", f"--out={tmp_path / 'b'}", where).refused("goes with --export only")


@pytest.mark.slow
def test_the_noise_of_a_camera_costs_less_after_fusion(tmp_path):
    accuracy = camera_noise.main(str(tmp_path))
    assert accuracy["fused, noisy"] > accuracy["baseline, noisy"] + 0.02
    assert accuracy["fused, clean"] > accuracy["baseline, clean"] - 0.05


@pytest.mark.slow
def test_a_pth_with_timms_names_comes_back_with_the_same_names(tmp_path, capsys):
    path = str(tmp_path / "vit.pth")
    pth_back.stand_in(path)
    made = pth_back.main(path)
    assert "PASSED" in capsys.readouterr().out
    old, new = files.read(path), files.read(made)
    assert list(old.tensors) == list(new.tensors) and new.fused == {"noise": "gaussian:40"}
    changed = {name for name in old.tensors if not np.array_equal(old.tensors[name], new.tensors[name])}
    assert changed == {f"blocks.{i}.mlp.fc{j}.{leaf}" for i in (0, 1) for j in (1, 2) for leaf in ("weight", "bias")}
