"""`fuse.py --export`: the file that the backbone came in, new files of other formats, programs, folded BatchNorms."""

import json
import os

import jax
import numpy as np
import pytest

from drep_jax import weights
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.fusion import fuse_variables_exact
from drep_jax.core.sites import find_sites
from drep_jax.jobs import train
from drep_jax.models.resnet import ResNet
from drep_jax.models.vit import ViT
from drep_jax.run import export
from drep_jax.weights import files, formats
from drep_jax.weights.translation import Format, Rule
from tests import trees
from tests.command import call, same_bits
from tests.setups import make_setup

FLAT = (Rule(r"(?P<path>.*)/kernel", r"\g<path>.w"), Rule(r"(?P<path>.*)", r"\g<path>"))
TOY = Format("toy", ViT, (r"encoderblock_0/mlp/fc1\.w",), lambda module: FLAT, suffix=".npz")
TOY_RESNET = Format("toy", ResNet, (r"layer1_0/conv1\.w",), lambda module: FLAT)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", (TOY, TOY_RESNET))


def fuse(run, out, *arguments):
    return call("fuse.py", f"--workdir={run}", f"--out={out}", *arguments)


def run_on(config, tmp_path, path, **changes):
    """A closed-form run on weights read from a file; returns its directory."""
    config = json.loads(json.dumps(config))
    config["backbone"].update(init_from=str(path), steps=0)
    config["control"]["steps"] = 0
    config.update(learner="closed_form", compare=[])
    config["evaluate"].update(conditions=["clean"])
    for section, values in changes.items():
        config[section] = {**config[section], **values} if isinstance(values, dict) else values
    train.run(config, str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture(scope="module")
def foreign_file(finished, tmp_path_factory):
    """The tiny backbone in the toy format."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "FORMATS", (TOY,))
        path = str(tmp_path_factory.mktemp("foreign") / "vit")
        made = weights.write_new(finished.setup.backbone, finished.variables, "toy", path, {})
    # As others write it: without our mark.
    np.savez(made, **np.load(made))
    return made


def test_the_same_kind_of_file_comes_back_fused(finished, foreign_file, tmp_path):
    run = run_on(finished.config, tmp_path, foreign_file)
    ended = fuse(run, tmp_path / "out", "--export=same,stablehlo", "--rule=ddpm")
    assert ended.status == 0, ended.output
    made = tmp_path / "out" / "vit_fused.npz"
    old, new = files.read(foreign_file), files.read(str(made))
    assert list(old.tensors) == list(new.tensors)
    changed = {n for n in old.tensors if not np.array_equal(old.tensors[n], new.tensors[n])}
    assert changed == {f"encoderblock_{i}/mlp/fc{j}{leaf}" for i in (0, 1) for j in (1, 2) for leaf in (".w", "/bias")}
    assert "8 of its tensors replaced" in ended.output and "stablehlo" in ended.output
    ours = weights.load(str(tmp_path / "out" / "fused.safetensors"), finished.setup.abstract, allow_fused=True)
    back = weights.load_foreign(str(made), finished.setup.backbone, finished.setup.abstract, allow_fused=True)
    assert same_bits(back.variables, ours)
    assert os.path.getsize(tmp_path / "out" / "fused.stablehlo") > 1000

    other = tmp_path / "other.npz"
    np.savez(other, **{name: tensor * np.float32(1.5) for name, tensor in old.tensors.items()})
    fuse(run, tmp_path / "out2", "--export=same", f"--init_from={other}").refused("not the backbone of this run")
    fuse(run, tmp_path / "out2", f"--init_from={foreign_file}").refused("goes with --export only")
    fuse(run, tmp_path / "out2", "--export=tomm").refused('There is no export "tomm"', 'Did you mean "toy"?')
    fuse(run, tmp_path / "out2", "--export=same", f"--init_from={made}").refused("already fused")
    fuse(run, tmp_path / "out2", "--fold_batchnorm").refused("no BatchNorm that can be folded")
    assert not (tmp_path / "out2").exists()


def test_pruned_layers_come_back_dense_and_it_is_said(finished, foreign_file, tmp_path, capsys):
    name = "encoderblock_0/mlp/fc1/bias"
    tensors = dict(np.load(foreign_file))
    tensors |= {f"{name}_orig": tensors[name], f"{name}_mask": (np.arange(tensors[name].size) % 2).astype(np.float32)}
    expected = tensors[f"{name}_orig"] * tensors[f"{name}_mask"]
    del tensors[name]
    np.savez(tmp_path / "pruned.npz", **tensors)
    setup = finished.setup
    original = weights.load_foreign(str(tmp_path / "pruned.npz"), setup.backbone, setup.abstract)
    fused = jax.tree_util.tree_map(np.asarray, original.variables)
    np.testing.assert_array_equal(fused["params"]["encoderblock_0"]["mlp"]["fc1"]["bias"], expected)
    fused["params"]["encoderblock_0"]["mlp"]["fc1"]["bias"] = expected + 1
    output = export.Output(str(tmp_path / "out"), forms=("same",))
    paths = export.write(output, setup, original.variables, fused, {}, original=original)
    assert f"masks of fused layers are written back as ones ({name})" in capsys.readouterr().out
    back = weights.load_foreign(paths[-1], setup.backbone, setup.abstract, allow_fused=True)
    assert same_bits(back.variables, fused) and files.read(paths[-1]).tensors[f"{name}_mask"].all()


def test_a_backbone_of_no_foreign_file_goes_into_a_new_one(finished, tmp_path):
    fuse(finished.directory, tmp_path / "a", "--export=same").refused("from no foreign file", "toy", "stablehlo")
    ended = fuse(finished.directory, tmp_path / "a", "--export=toy")
    assert ended.status == 0, ended.output
    like = finished.setup.abstract
    ours = weights.load(str(tmp_path / "a" / "fused.safetensors"), like, allow_fused=True)
    back = weights.load_foreign(str(tmp_path / "a" / "fused_toy.npz"), finished.setup.backbone, like, allow_fused=True)
    assert same_bits(back.variables, ours) and back.source.fused["rule"] == "ddpm"


@pytest.mark.slow
def test_a_half_precision_file_must_keep_the_change(finished, foreign_file, tmp_path):
    halves = tmp_path / "half.npz"
    np.savez(halves, **{name: tensor.astype(np.float16) for name, tensor in files.read(foreign_file).tensors.items()})
    run = run_on(finished.config, tmp_path, halves)
    weak = ("--export=same", "--strength=0.002")
    fuse(run, tmp_path / "out", *weak).refused("rounds away", "--allow_rounding")
    assert not (tmp_path / "out").exists()
    ended = fuse(run, tmp_path / "out", *weak, "--allow_rounding")
    assert ended.status == 0 and "of the change survives" in ended.output
    kept = files.read(str(tmp_path / "out" / "half_fused.npz")).tensors
    assert {tensor.dtype for tensor in kept.values()} == {np.dtype(np.float16)}


def small_resnet(rng):
    """A ResNet, its variables with running statistics, and the model settings that make it."""
    shape = {"stage_sizes": (1, 1), "block": "basic", "width": 8, "stem": "cifar"}
    backbone = ResNet(num_classes=10, **shape)
    variables = dict(backbone.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32)))
    variables["batch_stats"] = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (rng.uniform(-0.2, 0.2, leaf.shape) + (path[-1].key == "var")).astype(np.float32),
        variables["batch_stats"],
    )
    return backbone, variables, {"name": "resnet", "num_classes": 10, **shape}


def test_running_means_that_took_constants_come_back_in_the_same_file(tmp_path, capsys):
    rng = np.random.default_rng(0)
    backbone, variables, _ = small_resnet(rng)
    made = weights.write_new(backbone, variables, "toy", str(tmp_path / "resnet"), {})
    images = np.zeros((1, 8, 8, 3), np.float32)
    sites = find_sites(backbone, images, pattern="conv1|layer2_0/conv2", batchnorm_bias=True)
    setup = make_setup(backbone, images, sites=sites)
    denoise = trees.randomize(init_denoise(sites), 1, 0.1)
    fused = fuse_variables_exact(variables, denoise, sites, setup.schedule)
    original = weights.load_foreign(made, backbone, setup.abstract)
    output = export.Output(str(tmp_path / "out"), forms=("same",))
    paths = export.write(output, setup, original.variables, fused, {}, original=original)
    assert "4 of its tensors replaced" in capsys.readouterr().out
    back = weights.load_foreign(paths[-1], backbone, setup.abstract, allow_fused=True)
    ours = weights.load(paths[0], setup.abstract, allow_fused=True)
    assert same_bits(back.variables, fused) and same_bits(ours, fused)
    assert not np.array_equal(fused["batch_stats"]["bn1"]["mean"], variables["batch_stats"]["bn1"]["mean"])
    assert np.array_equal(fused["batch_stats"]["bn1"]["var"], variables["batch_stats"]["bn1"]["var"])


@pytest.mark.slow
def test_batch_norms_are_folded_into_a_file_of_the_same_names(finished, tmp_path):
    rng = np.random.default_rng(0)
    backbone, variables, model = small_resnet(rng)
    made = weights.write_new(backbone, variables, "toy", str(tmp_path / "resnet"), {})
    config = {**finished.config, "model": model}
    sites = {"batchnorm_bias": True}  # fusing moves running means, which folding then takes up
    options = {"backbone": {"init_allow": []}, "sites": sites, "evaluate": {"statistics": ["image:0.1"]}}
    run = run_on(config, tmp_path, made, learner="closed_form", **options)
    rows = json.loads((run / "report.json").read_text())["metrics"]["clean"]
    assert "closed_form+image:0.1" in rows["denoised"] and "baseline+image:0.1" in rows["control"]
    ended = fuse(run, tmp_path / "mixed", "--export=stablehlo", "--statistics=image:0.1")
    assert ended.status == 0 and "Statistics image:0.1: another program" in ended.output, ended.output
    assert (tmp_path / "mixed" / "fused_image_0.1.stablehlo").exists()
    written = json.loads((tmp_path / "mixed" / "certificate.json").read_text())
    assert written["passed"] and written["statistics"]["latency_ratio"] > 0
    fuse(run, tmp_path / "out2", "--statistics=image:0.1").refused("add --export=stablehlo or onnx")
    ended = fuse(run, tmp_path / "out", "--export=same", "--fold_batchnorm")
    assert ended.status == 0, ended.output
    fused = export.weights.load(str(run / "fused" / "fused.safetensors"), variables, allow_fused=True)
    moved = np.abs(fused["batch_stats"]["bn1"]["mean"] - variables["batch_stats"]["bn1"]["mean"]).max()
    assert 0 < moved < 1
    assert "BatchNorm folded into the layer before: PASSED" in ended.output
    like = export.weights.load(str(run / "fused" / "fused.safetensors"), variables, allow_fused=True)
    folded = weights.load_foreign(
        str(tmp_path / "out" / "resnet_fused.pth"), backbone, variables, allow_fused=True
    ).variables
    assert all(not np.any(leaf) for leaf in jax.tree_util.tree_leaves(folded["batch_stats"]["bn1"]["mean"]))
    assert np.array_equal(folded["params"]["bn1"]["scale"], np.ones(8, np.float32))
    x = rng.normal(size=(3, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(backbone.apply(folded, x), backbone.apply(like, x), rtol=1e-4, atol=1e-5)
    assert not np.allclose(backbone.apply(folded, x), backbone.apply(variables, x), atol=1e-5)
