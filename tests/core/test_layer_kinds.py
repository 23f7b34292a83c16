"""THE TABLE of layer kinds × operations: every kind works in all of them, or is refused with the reason.

All kinds that work stand side by side in one network, so that each operation is compiled once for all of them.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.core.algorithm1 import algorithm1_losses
from drep_jax.core.certificate import certify
from drep_jax.core.closed_form import closed_form, expected_loss
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.fusion import fuse_exact
from drep_jax.core.layers import find_layers
from drep_jax.core.measured import measure
from drep_jax.core.moments import batch_sums, collect_moments, moments_from_sums
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import find_sites
from drep_jax.errors import SiteError
from drep_jax.trees import get_in
from tests import trees

SCHEDULE = Schedule(beta_end=0.02)
X = trees.normal(3, (8, 5, 4, 4))  # one image for each device


def conv(*args, outputs=3, **options):
    return lambda x: nn.Conv(outputs, *args, **options, name="layer")(x)


def tokens(function):
    return lambda x: function(x.reshape(x.shape[0], -1, x.shape[-1]))


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + jnp.tanh(nn.Dense(x.shape[-1], name="layer")(x)), None


class Around(nn.Module):
    """Calls a layer that belongs to another module."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return jnp.tanh(self.layer(x))


class Shared(nn.Module):
    """Its scope, and with it its path, is that of its layer."""

    def setup(self):
        self.layer = nn.Dense(3)
        nn.share_scope(self, self.layer)

    def __call__(self, x):
        return jnp.tanh(self.layer(2 * x))


class Penalized(nn.Module):
    """Computes a penalty on its weights that no output depends on."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(3, name="layer")
        y = layer(x)
        self.sow("losses", "penalty", jnp.sum(layer.variables["params"]["kernel"] ** 2))
        return y


def stacked(x):
    axes = {"params": 0, "denoise": 0}
    return nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=2)(name="scan")(x, None)[0]


def repeated(x):
    options = {"variable_broadcast": "params", "variable_axes": {"denoise": 0}, "split_rngs": {"params": False}}
    return nn.scan(Step, **options, length=3)(name="scan")(x, None)[0]


def twice(layer):
    def run(x):
        made = layer(x.shape[-1])
        return made(jnp.tanh(made(x)))

    return run


def recurrent(x):
    cell = nn.GRUCell(3, name="cell")
    return nn.RNN(cell, variable_axes={"denoise": 0}, name="loop")(x[:, :3, 0])


def spread(layer, axis, *size):
    options = {"variable_axes": {"params": None, "denoise": 0}, "split_rngs": {"params": False}}
    return lambda x: nn.vmap(layer, **options, in_axes=axis, out_axes=axis)(3, *size, name="layer")(x)


def edges(x):
    sides = [(0, 0), (1, 1), (1, 1), (0, 0)]
    return nn.Conv(3, (3, 3), padding="VALID", name="layer")(jnp.pad(x, sides, mode="edge"))


def beside(layer):
    """Reads two tensors side by side, the second one narrower."""
    return lambda x: layer(jnp.concatenate([x, jnp.tanh(x[..., :3])], axis=-1))


def borrowed(x):
    return Around(nn.Dense(3, name="layer"), name="around")(x)


DECODERS = {
    "dilation 2": conv((3, 3), padding=2, kernel_dilation=2),
    "dilation 4": conv((3, 3), padding=4, kernel_dilation=4),
    "stride 2": conv((3, 3), padding=1, strides=2),
    "groups, dilated": conv((3, 3), outputs=4, feature_group_count=2, padding=2, kernel_dilation=2),
    "depthwise": conv((3, 3), outputs=4, feature_group_count=4, padding=1),
    "stride = kernel, the remainder cropped": conv((2, 2), padding="VALID", strides=2),
    "7×7, stride 4": conv((7, 7), padding=3, strides=4),
    "concatenation, conv": beside(conv((3, 3), padding=1)),
    "concatenation, 1×1": beside(conv((1, 1))),
    "concatenation, dense": beside(lambda x: nn.DenseGeneral((3, 2), name="layer")(x)),
}
"""Kinds of dense prediction, each with patch and with pointwise denoisers."""


ONCE = {
    **DECODERS,
    "dense": lambda x: nn.Dense(3, name="layer")(x),
    "dense without bias": lambda x: nn.Dense(3, use_bias=False, name="layer")(x),
    "general": lambda x: nn.DenseGeneral((2, 3), axis=(1, -1), name="layer")(x),
    "name with a slash": lambda x: nn.Dense(3, name="a/layer")(x),
    "SAME": conv((3, 3)),
    "SAME_LOWER": conv((2, 2), padding="SAME_LOWER", strides=2),
    "CIRCULAR": conv((3, 2), padding="CIRCULAR"),
    "REFLECT": conv((3, 3), padding="REFLECT", strides=(1, 2)),
    "CAUSAL": tokens(conv((3,), padding="CAUSAL", kernel_dilation=2)),
    "CIRCULAR, one pixel": conv((1, 1), padding="CIRCULAR"),
    "padding of the user's own": edges,
    "negative padding": conv((2, 2), padding=((-1, 0), (1, -1))),
    "input dilation": conv((2, 2), padding=((1, 1), (1, 1)), input_dilation=2),
    "groups": conv((3, 3), outputs=4, feature_group_count=2),
    "two batch axes": conv((3,)),
    "stacked by nn.scan": stacked,
    "nn.jit": lambda x: nn.jit(Step)(name="step")(x)[0],
    "nn.remat": lambda x: nn.remat(Step)(name="step")(x)[0],
    "nn.vmap over images": spread(nn.Dense, 0),
    "borrowed layer": borrowed,
    "shared scope": lambda x: Shared(name="shared")(x),
    "penalized weights": lambda x: Penalized(name="penalized")(x),
    "attention": lambda x: nn.MultiHeadDotProductAttention(2, name="attention")(x[:, :, 0], x[:, :, 0]),
}
"""Kinds that work in every operation."""

SEVERAL = {
    "Dense called twice": (twice(lambda width: nn.Dense(width, name="layer")), 2),
    "Conv called twice": (twice(lambda width: nn.Conv(width, (2, 2), name="layer")), 2),
    "nn.scan with shared weights": (repeated, 3),
    "recurrent cell": (recurrent, 3),
    "nn.vmap over another axis": (spread(nn.Dense, 1), 1),
    "nn.vmap of a convolution": (spread(nn.Conv, 1, (2,)), 1),
}
"""Kinds that are called several times, with the number of calls; measured noise refuses those of `nn.vmap`."""


class SideBySide(nn.Module):
    """Every kind on features of its own; the outputs as one vector for each image."""

    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return jnp.concatenate(
            [Kind(name, name=f"kind{n}")((0.5 + 0.1 * n) * x) for n, name in enumerate(self.names)], 1
        )


class Kind(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        run = ONCE[self.kind] if self.kind in ONCE else SEVERAL[self.kind][0]
        return run(x).reshape(x.shape[0], -1)


def case(names, kind="auto"):
    """Returns the network, its sites, random variables and random denoisers."""
    net = SideBySide(tuple(names))
    sites = find_sites(net, X, pattern=".*", kind=kind, train=False)
    variables = trees.zeros(jax.eval_shape(lambda: net.init(jax.random.key(0), X, train=False)))
    denoise = trees.zeros(jax.eval_shape(lambda: init_denoise(sites)))
    return net, sites, trees.randomize(variables, 0, 0.5), trees.randomize(denoise, 1, 0.1)


def test_every_kind_is_found_with_its_number_of_calls():
    names = [*ONCE, *SEVERAL]
    sites = find_sites(SideBySide(tuple(names)), X, pattern=".*", train=False)
    assert {names[int(site.path[0].removeprefix("kind"))] for site in sites} == {*names}
    counts = {name: count for name, (_, count) in SEVERAL.items()}
    for site in sites:
        kind = names[int(site.path[0].removeprefix("kind"))]
        assert {layer.calls for layer in site.layers} == {counts.get(kind, 1)}, kind
        assert {layer.spread for layer in site.layers} == {kind in SEVERAL and "vmap" in kind}, kind


SOME = ["name with a slash", "CIRCULAR", "CAUSAL", "two batch axes", "shared scope", "recurrent cell"]
"""Kinds that no other test of these operations has; compiling all of them takes a minute."""


some_and_all = pytest.mark.parametrize(
    "names", [SOME, pytest.param([*ONCE, *SEVERAL], marks=pytest.mark.slow)], ids=["some", "all"]
)


@some_and_all
def test_every_kind_is_fused_to_what_the_explicit_path_computes(names):
    """Tracing, explicit path, fusion and certificate."""
    net, sites, variables, denoise = case(names)
    certificate = certify(net, variables, denoise, sites, SCHEDULE, X, train=False)
    assert certificate.passed, str(certificate)
    assert min(site.figure.change for site in certificate.sites["float64"]) > 1e-5


@some_and_all
def test_every_kind_is_learned(names):
    """Moments, closed form and Algorithm 1, whose least loss the closed form has; all calls of a layer are pooled."""
    net, sites, variables, _ = case(names)
    shifts = {site.name: np.zeros(site.denoiser_shape[:-1], np.float32) for site in sites}
    mask = np.ones(len(X), np.float32)
    sums = jax.device_get(jax.jit(lambda v: batch_sums(net, v, sites, shifts, mask, X, train=False))(variables))
    moments = {site.path: moments_from_sums(site, sums[site.name], shifts[site.name]) for site in sites}
    denoise = closed_form(moments, sites, SCHEDULE)
    arguments = (jax.random.key(0), jnp.arange(len(X)), X)
    losses = jax.jit(lambda d: algorithm1_losses(net, variables, d, sites, SCHEDULE, *arguments, train=False))(denoise)
    for site in sites:
        expected = expected_loss(site, moments[site.path], SCHEDULE, get_in(denoise, site.path))
        np.testing.assert_allclose(losses[site.name], expected, rtol=0.5, err_msg=site.name)


def test_moments_take_arguments_of_the_backbone():
    net, sites, variables, _ = case(["dense"])
    moments = collect_moments(net, variables, sites, [(np.asarray(X), np.ones(len(X), np.float32))], train=False)
    np.testing.assert_allclose(moments[sites[0].path].mean, 0.5 * np.mean(X, axis=(0, 1, 2)), atol=1e-6)


@some_and_all
def test_every_kind_is_measured(names):
    names = [name for name in names if name in ONCE or "vmap" not in name]
    net, sites, variables, _ = case(names)
    streams = np.stack([X, X, X + 0.3 * trees.normal(5, X.shape)])
    measured = measure(net, variables, sites, streams, [1, 1], train=False)
    assert {key.partition("[")[0] for key in measured.errors} == {site.name for site in sites}
    fused = fuse_exact(
        {"backbone": variables["params"], "denoise": measured.denoise}, sites, SCHEDULE, rule="affine", steps=1
    )
    outputs = net.apply({"params": fused}, streams[2], train=False)
    np.testing.assert_allclose(measured.outputs[2], outputs, atol=2e-4)
    assert np.abs(outputs - net.apply(variables, streams[2], train=False)).max() > 1e-3


@pytest.mark.parametrize("name", [name for name in SEVERAL if "vmap" in name])
def test_measured_noise_refuses_layers_under_vmap(name):
    net, sites, variables, _ = case([name])
    with pytest.raises(SiteError, match=r"(?s)Measured noise follows the images.*nn.vmap spreads its input"):
        measure(net, variables, sites, np.stack([X, X]), [1], train=False)


@pytest.mark.parametrize("kind", [pytest.param("patch", marks=pytest.mark.slow), "pointwise"])
def test_dense_prediction(kind):
    """Fusion is exact, the closed form is least, and measured noise gives what it has fused."""
    names = [*DECODERS]
    net, sites, variables, denoise = case(names, kind)
    kinds = {names[int(site.path[0].removeprefix("kind"))]: site for site in sites}
    assert {name: site.kind for name, site in kinds.items() if "dense" not in name and "1×1" not in name} == {
        name: kind for name in names if "dense" not in name and "1×1" not in name
    }
    padded = [site for site in sites if site.layers[0].window and site.layers[0].window.fills_with_zeros]
    assert len(padded) == 8 and all(site.bias == (kind == "patch") for site in padded)  # zeros that no constant reaches
    assert all(site.bias for site in sites if site not in padded)
    parts = {kind: [site.width for site in sites if f"kind{names.index(kind)}" in site.path] for kind in names[-3:]}
    window = 9 if kind == "patch" else 1
    assert [*parts.values()] == [[4 * window, 3 * window], [4, 3], [4, 3]]

    certificate = certify(net, variables, denoise, sites, SCHEDULE, X, train=False)
    assert certificate.passed, str(certificate)
    assert len(certificate.sites["float64"]) == len(names)  # a layer is compared as a whole

    mask = np.ones(len(X), np.float32)
    moments = collect_moments(net, variables, sites, [(np.asarray(X), mask)], train=False)
    best = closed_form(moments, sites, SCHEDULE, dtype=np.float64)
    rng = np.random.default_rng(0)
    for site in sites:
        leaves = get_in(best, site.path)
        least = expected_loss(site, moments[site.path], SCHEDULE, leaves)
        for name in leaves:
            for _ in range(5):
                moved = {**leaves, name: leaves[name] + 1e-3 * rng.normal(size=leaves[name].shape)}
                assert expected_loss(site, moments[site.path], SCHEDULE, moved) > least, (site.name, name)

    net, sites, variables, _ = case(["dilation 4", "concatenation, conv"], kind)  # a program a kind: two of them
    streams = np.stack([X, X + 0.3 * trees.normal(5, X.shape)])
    measured = measure(net, variables, sites, streams, [1], train=False)
    fused = fuse_exact(
        {"backbone": variables["params"], "denoise": measured.denoise}, sites, SCHEDULE, rule="affine", steps=1
    )
    outputs = net.apply({"params": fused}, streams[1], train=False)
    np.testing.assert_allclose(measured.outputs[1], outputs, atol=2e-4)
    assert np.abs(outputs - net.apply(variables, streams[1], train=False)).max() > 1e-3


# ---- refused by find_sites --------------------------------------------------------------------------------------------


class Tied(nn.Module):
    leaf: str = "kernel"

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, name="layer")
        y = jnp.tanh(layer(x))
        leaf = layer.variables["params"][self.leaf]
        return y @ leaf.T if self.leaf == "kernel" else y * leaf.reshape(1, 1, 1, -1)


class TiedInLoop(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, name="layer")
        kernel = layer.variables["params"]["kernel"] if layer(x) is not None else None
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ kernel), None), layer(x), None, length=2)[0]


class Attending(nn.Dense):
    def attend(self, x):
        return x @ self.get_variable("params", "kernel").T


def attending(x):
    layer = Attending(4, name="layer")
    return layer.attend(jnp.tanh(layer(x)))


class Standardized(nn.Conv):
    def param(self, name, *args, **kwargs):
        leaf = super().param(name, *args, **kwargs)
        return leaf - leaf.mean((0, 1, 2), keepdims=True) if name == "kernel" else leaf


class Padded(nn.Conv):
    @nn.compact
    def __call__(self, x):
        return super().__call__(jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge"))


class Adapted(nn.Module):
    """The layer's scope is that of the adapter around it."""

    def setup(self):
        self.base = nn.Dense(4)
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x):
        return self.base(x) + nn.Dense(4, name="low")(x)


class Doubled(nn.Module):
    """A functional lift of another module's layer."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, name="layer")
        first = self.is_initializing()
        double = lambda leaves: jax.tree_util.tree_map(lambda leaf: 2 * leaf, leaves)  # noqa: E731
        return nn.map_variables(lambda m, x: m(x), "params", double, init=first, mutable=first)(layer, x)


class Branch(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, name="layer")
        if self.is_initializing():
            return layer(x)
        return nn.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: x, layer, x)


def padding(x, kernel, strides, _, **options):
    x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
    return jax.lax.conv_general_dilated(x, kernel, strides, "VALID", **options)


padding.is_convolution = True


def doubled(x, kernel, bias, dtype=None):
    return x, 2 * kernel, bias


REFUSED = {
    "kernel read a second time": (lambda x: Tied(name="tied")(x), "its kernel is read outside of the layer"),
    "bias read a second time": (lambda x: Tied("bias", name="tied")(x), "its bias is read outside of the layer"),
    "kernel read in a loop": (lambda x: TiedInLoop(name="tied")(x), "its kernel is read outside of the layer"),
    "method that reads the kernel": (attending, "its kernel is read outside of the layer"),
    "standardized weights": (lambda x: Standardized(3, (2, 2), name="layer")(x), "Standardized overrides param"),
    "padding in the layer": (lambda x: Padded(3, (2, 2), name="layer")(x), "Padded overrides __call__"),
    "function that pads": (
        lambda x: nn.Conv(3, (3, 3), padding="SAME", conv_general_dilated=padding, name="layer")(x),
        "its function padding says is_convolution and computes something else",
    ),
    "adapter in its scope": (lambda x: Adapted(name="adapted")(x), "its scope belongs to another module, .* low there"),
    "lifted weights": (lambda x: Doubled(name="doubled")(x), "its weights (pass through map_variables|are changed)"),
    "branch": (lambda x: Branch(name="branch")(x), "branch|cond"),
    "promote_dtype": (lambda x: nn.Dense(3, promote_dtype=doubled, name="layer")(x), "promote_dtype is not Flax's"),
}
"""Kinds that cannot be fused exactly, with the reason."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fused_is_refused_with_the_reason(name):
    run, reason = REFUSED[name]

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return run(x)

    with pytest.raises(SiteError, match=f"(?s)cannot be denoising sites.*({reason})"):
        find_sites(Net(), X, pattern=".*(layer|adapted)")
    (refusal,) = [layer.refusal for layer in find_layers(Net(), X) if layer.refusal]
    assert re.search(reason, refusal), refusal
