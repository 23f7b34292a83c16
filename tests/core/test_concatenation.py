"""Networks of dense prediction: features with several readers, concatenations, auxiliary heads, upsampling."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.core.certificate import certify
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.forms import form_lines
from drep_jax.core.fusion import fuse, fuse_exact, fuse_variables
from drep_jax.core.idle import find_idle
from drep_jax.core.layers import find_layers
from drep_jax.core.measured import measure
from drep_jax.core.moments import Moments, collect_moments
from drep_jax.core.recipes import Recipe, solve
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import coverage, find_sites
from drep_jax.errors import ConfigError, FusionError, SiteError
from drep_jax.trees import get_in
from tests import trees

SCHEDULE = Schedule(beta_end=0.02)
X = trees.normal(2, (2, 6, 6, 4))


def norm(x, name):
    return nn.BatchNorm(use_running_average=True, name=name)(x)


class Decoder(nn.Module):
    """A feature of a stage is read by the next stage, the head and the auxiliary head; the head concatenates."""

    auxiliary: bool = True

    @nn.compact
    def __call__(self, x, *, train=False):
        stage = nn.relu(norm(nn.Conv(6, (3, 3), use_bias=False, name="stage1")(x), "bn1"))
        late = nn.relu(nn.Conv(5, (3, 3), strides=2, padding=1, name="stage2")(stage))
        if self.auxiliary and (train or self.is_initializing()):
            nn.Conv(2, (1, 1), name="auxiliary_head")(stage)
        up = jax.image.resize(nn.Conv(3, (1, 1), name="lateral2")(late), (*stage.shape[:3], 3), "bilinear")
        same = nn.Conv(3, (1, 1), name="lateral1")(stage)
        fused = nn.Conv(4, (3, 3), use_bias=False, name="fuse")(jnp.concatenate([stage, up, same], axis=-1))
        return nn.Conv(2, (1, 1), name="classifier")(nn.relu(norm(fused, "bn2")))


NET = Decoder()
OPTIONS = {"pattern": ".*", "max_patch_width": 40, "batchnorm_bias": True}
SITES = find_sites(NET, X, **OPTIONS)
VARIABLES = trees.randomize(trees.zeros(jax.eval_shape(lambda: NET.init(jax.random.key(0), X))), 0, 0.5)
VARIABLES = {**VARIABLES, "batch_stats": jax.tree_util.tree_map(jnp.abs, VARIABLES["batch_stats"])}


def random_denoisers(sites):
    return trees.randomize(trees.zeros(jax.eval_shape(lambda: init_denoise(sites))), 1, 0.1)


def test_a_denoiser_belongs_to_the_layer_that_reads():
    """Readers of one feature through different windows have denoisers of their own, and one t each, in order."""
    names = {site.name: (site.kind, site.width, site.times) for site in SITES}
    assert names == {
        "stage1": ("patch", 36, (6,)),
        "stage2": ("pointwise", 6, (5,)),  # its patch, 54, is too wide
        "lateral2": ("pointwise", 5, (4,)),
        "lateral1": ("pointwise", 6, (3,)),
        "fuse/part0": ("pointwise", 6, (2,)),  # 54 as a patch
        "fuse/part1": ("patch", 27, (2,)),
        "fuse/part2": ("patch", 27, (2,)),
        "classifier": ("pointwise", 4, (1,)),
    }
    norms = {site.name: site.layers[0].norm for site in SITES if site.layers[0].norm}
    assert norms == {"stage1": ("bn1",), **{f"fuse/part{n}": ("bn2",) for n in range(3)}}
    assert {site.name: site.bias for site in SITES} == {
        name: name not in ("stage2", "fuse/part0") for name in names
    }  # padded zeros


def test_the_forms_and_their_reasons_are_said():
    idle = find_idle(NET, VARIABLES, X)
    assert idle == (("auxiliary_head",),)
    wide, parts, unused = form_lines(SITES, 40, idle)
    assert wide == ("Pointwise, because a patch is wider than sites.max_width=40: stage2 (54), fuse/part0 (54).")
    assert parts == "One denoiser for each source of a concatenation: fuse (6 + 3 + 3)."
    assert unused.startswith("No output depends on auxiliary_head: no denoiser there")
    assert form_lines(find_sites(NET, X, pattern="stage1"), 2304) == []


def test_an_auxiliary_head_has_no_site_and_keeps_its_weights():
    assert not any("auxiliary" in layer.name for layer in find_layers(NET, X))
    covered = coverage(SITES, VARIABLES["params"], find_idle(NET, VARIABLES, X))
    assert (covered.layers, covered.candidates, covered.kernel_share) == (6, 6, 1.0)
    fused = fuse_variables(VARIABLES, random_denoisers(SITES), SITES, SCHEDULE)
    for name, leaf in VARIABLES["params"]["auxiliary_head"].items():
        np.testing.assert_array_equal(fused["params"]["auxiliary_head"][name], leaf)
    assert find_sites(NET, X, **OPTIONS) == find_sites(Decoder(auxiliary=False), X, **OPTIONS)


def test_a_head_that_is_called_for_nothing_is_no_site():
    class Called(nn.Module):
        @nn.compact
        def __call__(self, x):
            nn.Dense(2, name="auxiliary")(x)
            return nn.Dense(2, name="head")(x)

    assert [site.name for site in find_sites(Called(), X, pattern=".*")] == ["head"]
    with pytest.raises(SiteError, match="no output of the network depends on it"):
        find_sites(Called(), X, pattern="auxiliary")


def test_fusion_is_exact_at_every_strength():
    denoise = random_denoisers(SITES)
    certificate = certify(NET, VARIABLES, denoise, SITES, SCHEDULE, X, steps=1)
    assert certificate.passed, str(certificate)
    assert [row.path for row in certificate.sites["float64"]].count("fuse") == 1
    plain = find_sites(NET, X, pattern="fuse", max_patch_width=40)
    denoise = random_denoisers(plain)
    params = {"backbone": VARIABLES["params"], "denoise": denoise}
    none, half, full = (fuse_exact(params, plain, SCHEDULE, strength=tau) for tau in (0.0, 0.5, 1.0))
    kernels = [np.asarray(tree["fuse"]["kernel"], np.float64) for tree in (none, half, full)]
    np.testing.assert_array_equal(kernels[0], VARIABLES["params"]["fuse"]["kernel"])
    np.testing.assert_allclose(kernels[1], (kernels[0] + kernels[2]) / 2, atol=1e-6)
    one = fuse_exact({**params, "denoise": {"fuse": {"part1": denoise["fuse"]["part1"]}}}, plain[1:2], SCHEDULE)
    changed = np.abs(np.asarray(one["fuse"]["kernel"]) - kernels[0]).max(axis=(0, 1, 3)) > 1e-6
    assert changed.tolist() == [False] * 6 + [True] * 3 + [False] * 3


def test_blocks_are_what_a_full_denoiser_with_zeros_between_them_is():
    """The closed form of independent sources, and any fusion of equal maps, agree with the full form."""
    blocks = find_sites(NET, X, pattern="fuse", kind="pointwise")
    (full,) = find_sites(NET, X, pattern="fuse", kind="pointwise", concatenated="full")
    assert [site.width for site in blocks] == [6, 3, 3] and full.width == 12
    rng = np.random.default_rng(0)
    factors = [rng.normal(size=(width, width)) for width in (6, 3, 3)]
    moments = {site.path: Moments(100, np.zeros(site.width), f @ f.T) for site, f in zip(blocks, factors, strict=True)}
    whole = np.zeros((12, 12))
    for site, first in zip(blocks, (0, 6, 9), strict=True):
        whole[first : first + site.width, first : first + site.width] = moments[site.path].covariance
    (small,) = solve([Recipe("ddpm", 1, 5.0)], moments, blocks, SCHEDULE)
    (large,) = solve([Recipe("ddpm", 1, 5.0)], {full.path: Moments(100, np.zeros(12), whole)}, (full,), SCHEDULE)
    one, two = (
        fuse({"backbone": VARIABLES["params"], "denoise": tree}, sites, SCHEDULE, rule="affine", steps=1)
        for tree, sites in ((small, blocks), (large, (full,)))
    )
    np.testing.assert_allclose(one["fuse"]["kernel"], two["fuse"]["kernel"], atol=1e-6)
    with pytest.raises(FusionError, match=r'(?s)over the whole concatenation that fuse reads.*concatenated="full"'):
        fuse({"backbone": VARIABLES["params"], "denoise": large}, blocks, SCHEDULE, rule="affine", steps=1)


def test_each_source_is_measured_by_itself():
    """A source whose noise is independent of the others has the regression of its own features."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, name="layer")(jnp.concatenate([x, jnp.tanh(x[..., :2])], -1))

    images = trees.normal(0, (40, 3, 3, 4))
    streams = np.stack([images, images + 0.5 * trees.normal(1, images.shape)])
    variables = Net().init(jax.random.key(0), images[:1])
    sites = find_sites(Net(), images[:1])
    result = measure(Net(), variables, sites, streams, [1.0], ridge=1e-6, vectors=10**6)
    assert [*result.errors] == ["layer/part0", "layer/part1"]
    for site, take in zip(sites, (lambda x: x, lambda x: np.tanh(x[..., :2])), strict=True):
        u, w = (take(np.asarray(stream, np.float64)).reshape(-1, site.width) for stream in streams)
        u, w = u - u.mean(0), w - w.mean(0)
        ridge = 1e-6 * np.trace(w.T @ w) / site.width * np.eye(site.width)
        expected = np.eye(site.width) - np.linalg.solve(w.T @ w + ridge, w.T @ u + ridge)
        np.testing.assert_allclose(get_in(result.denoise, site.path)["kernel"], expected, atol=1e-4)


# ---- which sources there are ------------------------------------------------------------------------------------------


def sources(function, x=X):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return function(x)

    return {layer.name: layer.sources for layer in find_layers(Net(), x)}


def read(*tensors):
    return nn.Dense(2, name="layer")(jnp.concatenate(tensors, axis=-1))


def patch_merging(x):
    return read(*(x[:, i::2, j::2] for i in range(2) for j in range(2)))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: read(x, jnp.tanh(x)), (4, 4)),
        (lambda x: read(jnp.concatenate([x, jnp.tanh(x)], -1), jnp.sin(x)[..., :2]), (4, 4, 2)),
        (patch_merging, ()),  # slices of one tensor
        (lambda x: read(x[..., :1], jnp.tanh(x), x[..., 1:]), (1, 4, 3)),
        (lambda x: read(x[..., :1], x[..., 1:], jnp.tanh(x)), (4, 4)),
        (lambda x: nn.Dense(2, name="layer")(jnp.concatenate([x, jnp.tanh(x)], axis=1)), ()),  # along the pixels
        (lambda x: nn.Dense(2, name="layer")(jnp.concatenate([x, jnp.tanh(x)], -1).reshape(2, 36, 8)), (4, 4)),
        (lambda x: nn.Dense(2, name="layer")(jnp.concatenate([x, jnp.tanh(x)], -1).reshape(2, 72, 4)), ()),
        (lambda x: nn.relu(read(x)), ()),
        (lambda x: nn.Conv(2, (1, 1), feature_group_count=2, name="layer")(jnp.concatenate([x, -x], -1)), ()),
        (lambda x: nn.DenseGeneral(2, axis=(-2, -1), name="layer")(jnp.concatenate([x, -x], -1)), ()),
        (lambda x: nn.Dense(2, name="layer")(jax.jit(lambda y: jnp.concatenate([y, -y], -1))(x)), (4, 4)),
        (lambda x: nn.Dense(2, name="layer")(jnp.concatenate([x, -x], -1).astype(jnp.bfloat16)), (4, 4)),
    ],
)  # fmt: skip
def test_sources_are_found_in_the_equations(function, expected):
    assert sources(function)["layer"] == expected


def test_under_remat_too():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return read(x, jnp.tanh(x))

    assert sources(lambda x: nn.remat(Inner)(name="inner")(x)) == {"inner/layer": (4, 4)}


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match=r'Unknown form "block" of the denoiser of a concatenation.*blocks'):
        find_sites(NET, X, concatenated="block")
    with pytest.raises(ConfigError, match="largest width of a patch denoiser must be at least 1, got 0"):
        find_sites(NET, X, max_patch_width=0)


# ---- attention and upsampling -----------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Keys and values of reduced tokens where `reduction` is above 1, as in SegFormer."""

    reduction: int

    @nn.compact
    def __call__(self, x):
        query = nn.Dense(4, name="q")(x)
        small = x
        if self.reduction > 1:
            size = (self.reduction,) * 2
            small = nn.LayerNorm(name="norm")(nn.Conv(4, size, size, "VALID", name="sr")(x))
        key_value = nn.Dense(8, name="kv")(small)
        return nn.Dense(4, name="out")(query + key_value.mean((1, 2), keepdims=True)[..., :4])


def test_a_packed_projection_with_two_inputs_is_two_sites():
    reduced, plain = (find_sites(Attention(r), X, pattern=".*") for r in (4, 1))
    assert [[layer.name for layer in site.layers] for site in reduced] == [["q"], ["sr"], ["kv"], ["out"]]
    assert [[layer.name for layer in site.layers] for site in plain] == [["q", "kv"], ["out"]]


def test_upsampling_commutes_with_pointwise_maps():
    """So a layer before it takes the moments at low resolution, and may be moved behind it afterwards."""

    class Net(nn.Module):
        late: bool = False

        @nn.compact
        def __call__(self, x):
            head = nn.Conv(3, (1, 1), name="head")

            def up(x):
                return jax.image.resize(x, (x.shape[0], 12, 12, x.shape[-1]), "bilinear")

            return head(up(x)) if self.late else up(head(x))

    variables = Net().init(jax.random.key(0), X)
    sites = find_sites(Net(), X)
    assert sites == find_sites(Net(late=True), X)
    images = trees.normal(0, (8, 6, 6, 4))
    moments = collect_moments(Net(), variables, sites, [(images, np.ones(8, np.float32))])
    assert moments["head",].count == 8 * 36
    denoise = random_denoisers(sites)
    fused = fuse({"backbone": variables["params"], "denoise": denoise}, sites, SCHEDULE)
    early, late = (Net(late=late).apply({"params": fused}, X) for late in (False, True))
    np.testing.assert_allclose(early, late, atol=1e-5)
