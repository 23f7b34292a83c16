"""Sites of FCN and SegFormer: which, in which order and form; fusion, certified at several sizes."""

import re
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax import find_sites
from drep_jax.core.certificate import certify
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.forms import form_lines
from drep_jax.core.fusion import fuse_variables
from drep_jax.core.idle import find_idle
from drep_jax.core.schedule import Schedule
from drep_jax.models import create_model
from tests.pixel_classifiers import abstract, tiny

IMAGE = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
SCHEDULE = Schedule(beta_end=0.02)


def full(name):
    return create_model(name, num_classes=150, image_size=(64, 64))


def random_leaves(shapes, gain, seed=0):
    """Returns kernels that keep the size of features, and other leaves near those of a trained network."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("var", "scale"):
            return np.asarray(rng.uniform(0.8, 1.2, leaf.shape), np.float32)
        scale = gain / np.sqrt(max(1, np.prod(leaf.shape[:-1]))) if name == "kernel" else 0.1
        return np.asarray(scale * rng.normal(size=leaf.shape), np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def certified(module, sites, size):
    variables = random_leaves(abstract(module), 1.4)
    denoise = random_leaves(jax.eval_shape(lambda: init_denoise(sites)), 0.1, seed=1)
    x = np.random.default_rng(2).normal(size=(1, *size, 3)).astype(np.float32)
    return certify(module, variables, denoise, sites, SCHEDULE, x)


@pytest.mark.slow
def test_sites_of_an_fcn():
    """In order of execution: stem … stages, the shortcut after a block's third convolution, then the head."""
    net = full("fcn_r50")
    sites = find_sites(net, IMAGE, pattern=".*", batchnorm_bias=True)
    by_name = {site.name: site for site in sites}
    layers = {layer.name: site for site in sites for layer in site.layers}
    # Three shortcuts read what the first convolution reads, through the same window; conv_cat has two denoisers.
    assert (len(layers), len(sites)) == (59, 57) and sites[0].times == (56,) and sites[-1].times == (1,)
    assert [layers[f"layer{i}_0/downsample_conv"].path[-1] for i in (1, 2, 3, 4)] == [
        "conv1",
        "downsample_conv",
        "conv1",
        "conv1",
    ]
    names = [*by_name]
    block = ["conv1", "conv2", "conv3", "downsample_conv"]
    assert names[:3] == ["stem_conv1", "stem_conv2", "stem_conv3"]
    assert [name for name in names if "layer2_0" in name] == [f"layer2_0/{name}" for name in block]
    head = [f"decode_head/{name}" for name in ("conv1", "conv2", "conv_cat/part0", "conv_cat/part1", "classifier")]
    assert names[-5:] == head and [by_name[name].times[0] for name in head] == [4, 3, 2, 2, 1]
    assert {by_name[f"layer3_{j}/conv2"].layers[0].window.kernel_dilation for j in (0, 1)} == {(1, 1), (2, 2)}
    assert by_name["layer3_1/conv2"].denoiser_shape == (2304, 2304)
    assert [by_name[f"layer4_1/{name}"].kind for name in block[:3]] == ["pointwise"] * 3  # 4,608 is too wide
    assert [by_name[name].width for name in head] == [2048, 512, 2048, 512, 512]
    assert max(site.width for site in sites) == 2304  # no moments of 18,432 or 23,040

    norms = {layer.norm for site in sites for layer in site.layers}
    assert len(norms) == 59 and sites[-1].layers[0].norm is None  # all 58 on the path, and none behind the classifier
    padded = {site.name for site in sites if not site.bias}
    assert all(by_name[n].kind == "pointwise" and by_name[n].layers[0].window.fills_with_zeros for n in padded)

    wide, parts, unused = form_lines(sites, 2304, find_idle(net, abstract(net), IMAGE))
    assert "decode_head/conv1 (18,432)" in wide and "decode_head/conv_cat/part0 (18,432)" in wide
    assert parts.endswith("decode_head/conv_cat (2,048 + 512).")
    assert unused.startswith("No output depends on auxiliary_head/classifier, auxiliary_head/conv1:")


def test_sites_of_a_segformer():
    sites = find_sites(full("segformer_b0"), IMAGE, pattern=".*")
    readers = [[layer.path[-1] for layer in site.layers] for site in sites]
    block = [["sr"], ["query"], ["key", "value"], ["out"], ["fc1"], ["dwconv"], ["fc2"]]
    assert readers[:8] == [["patch_embed1"], *block]
    last = [["query", "key", "value"], ["out"], ["fc1"], ["dwconv"], ["fc2"]]  # nothing is reduced: one input
    assert readers[-19:-9] == [*last, *last]
    by_name = {site.name: site for site in sites}
    assert [by_name[f"patch_embed{i}"].width for i in (1, 2, 3, 4)] == [147, 288, 576, 1440]
    assert [by_name[f"block{i}_0/attn/sr"].width for i in (1, 2, 3)] == [2048, 1024, 640]
    assert by_name["block1_0/mlp/dwconv/dwconv"].denoiser_shape == (128, 9, 9)
    assert all(site.bias or site.layers[0].path[0] == "decode_head" for site in sites)
    assert len(find_sites(full("segformer_b0"), IMAGE)) == 16  # the paper's: both linears of every MLP


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcn", "segformer"])
def test_auxiliary_head_is_no_site_and_left_as_it_is(name):
    """Nothing is compiled: sites and idle layers are traced, and fusion is arithmetic of the host."""
    net = tiny(name)
    sites = find_sites(net, IMAGE, pattern="layer4_0/conv1|block4_0/mlp/fc1|.*_head/.*", batchnorm_bias=True)
    auxiliary = [path for path in find_idle(net, abstract(net), IMAGE) if path[0] == "auxiliary_head"]
    assert len(auxiliary) == (2 if name == "fcn" else 0)
    assert not [site.name for site in sites if "auxiliary_head" in site.name]
    variables = random_leaves(abstract(net), 1.4)
    fused = fuse_variables(variables, random_leaves(jax.eval_shape(lambda: init_denoise(sites)), 0.1), sites, SCHEDULE)
    same = jax.tree_util.tree_map(np.array_equal, fused["params"], variables["params"])
    assert all(jax.tree_util.tree_leaves(same.pop("auxiliary_head", {})))
    assert not all(jax.tree_util.tree_leaves(same["decode_head"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcn", "segformer"])
def test_fusion_is_certified_on_odd_images(name):
    """97×131 is no multiple of anything: reduced keys drop rows, and stages round up. It compiles six networks."""
    net = tiny(name)
    pattern = {
        "fcn": "stem_conv1|layer4_0/.*|decode_head/.*",
        "segformer": "patch_embed1|block[14]_0/.*|decode_head/.*",
    }
    sites = find_sites(net, IMAGE, pattern=pattern[name], batchnorm_bias=True)
    certificate = certified(net, sites, (97, 131))
    assert certificate.passed, str(certificate)
    assert min(row.figure.change for row in certificate.sites["float64"]) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("size", ["97x131", "512x512", "512x683"])
@pytest.mark.parametrize("name", ["segformer_b0", "fcn_r50"])
def test_full_networks_are_certified_at_several_sizes(name, size):
    """Minutes each: pytest -n 0 -m slow tests/models/test_pixel_sites.py -k "fcn_r50 and 512x683" -s."""
    net = full(name)
    sites = find_sites(net, IMAGE, pattern=".*", batchnorm_bias=True)
    certificate = certified(net, sites, tuple(map(int, re.findall(r"\d+", size))))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name} at {size}, peak {peak:.1f} GiB\n{certificate}")
    assert certificate.passed, str(certificate)
