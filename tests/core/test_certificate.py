"""The certificate passes what is right and fails what is wrong, on the change itself."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError

from drep_jax.core.certificate import certify, figure
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.fusion import fuse, fuse_exact
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import find_sites
from drep_jax.errors import FusionError
from tests.trees import Conv, Dense, Net, Scan, normal, setup

SCHEDULE = Schedule(beta_end=0.02)
NET = Net((Conv(2, groups=2),), (Scan(2, 5), Dense(4)))
X = normal(7, (4, 5, 5, 4))
SITES = find_sites(NET, X, pattern=".*", steps=2)
VARIABLES, DENOISE = setup(NET, X, SITES)
FUSED = fuse_exact({"backbone": VARIABLES["params"], "denoise": DENOISE}, SITES, SCHEDULE)


def run(fused=None, denoise=DENOISE, variables=VARIABLES, **options):
    return certify(NET, variables, denoise, SITES, SCHEDULE, X, fused=fused, **options)


@pytest.fixture(scope="module")
def good():
    return run(FUSED)


def test_correct_fusion_passes(good):
    assert good.passed
    assert set(good.end_to_end) == {"float64", "float32"}
    assert good.end_to_end["float64"].error < 1e-11
    assert 1e-3 < good.end_to_end["float64"].change < 1.0
    assert [s.path for s in good.sites["float64"]] == [
        "conv0",
        "scan0/fc1",
        "scan0/fc1",
        "scan0/fc2",
        "scan0/fc2",
        "dense1",
        "head",
    ]
    assert [s.times for s in good.sites["float64"]][:3] == [(14, 13), (12, 11), (8, 7)]
    assert good.structure == {"same_tree": True, "same_dtypes": True, "same_program": True}


def test_forms(good):
    table = json.loads(json.dumps(good.to_json()))
    assert table["passed"] is True
    assert (table["rule"], table["steps"]) == ("ddpm", 2)
    for result in table["results"].values():
        assert {"passed", "error", "bound", "change", "sites"} <= set(result)
        assert {"path", "slice", "t", "error", "bound", "change", "passed"} <= set(result["sites"][0])
    assert "PASSED" in str(good)


def test_tampering_with_one_hundredth_of_one_change_fails():
    before, after = (np.asarray(tree["dense1"]["kernel"]) for tree in (VARIABLES["params"], FUSED))
    tampered = {**FUSED, "dense1": {**FUSED["dense1"], "kernel": after + 0.01 * (after - before)}}
    certificate = run(tampered)
    assert not certificate.passed
    assert [s.path for s in certificate.sites["float32"] if not s.figure.passed] == ["dense1"]
    assert not certificate.end_to_end["float32"].passed
    assert [s.path for s in certificate.sites["float64"] if not s.figure.passed] == ["dense1"]
    assert "FAILED" in str(certificate)


def test_fusion_that_does_nothing_fails():
    certificate = run(jax.tree_util.tree_map(np.asarray, VARIABLES["params"]))
    assert not certificate.passed
    assert certificate.end_to_end["float32"].error == pytest.approx(1.0, rel=1e-3)
    assert certificate.end_to_end["float32"].decisive


def test_rounding_is_not_taken_for_an_error():
    """Weights fused in float32 differ from those fused in float64 in the last bits, and pass."""
    certificate = run(
        jax.jit(lambda p: fuse(p, SITES, SCHEDULE))({"backbone": VARIABLES["params"], "denoise": DENOISE})
    )
    assert certificate.passed
    assert certificate.end_to_end["float64"].error < 1e-11


class Coarse(nn.Module):
    """A layer that computes in bfloat16, whose output therefore cannot show a small change."""

    dtype: object = jnp.bfloat16

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, dtype=self.dtype, name="layer")(x)


@pytest.mark.parametrize("weights", [jnp.bfloat16, jnp.float32, np.float64])
def test_fusion_that_does_nothing_fails_whatever_the_types(weights):
    """The output is too coarse to decide, or there is no type but float64: what was deployed must still be looked at."""
    net, x = Coarse(None if weights == np.float64 else jnp.bfloat16), normal(1, (6, 5))
    sites = find_sites(net, x)
    variables, denoise = setup(net, x, sites)
    with jax.enable_x64(weights == np.float64):
        variables = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf).astype(weights), variables)
        x = np.asarray(x).astype(weights)
        right = certify(net, variables, denoise, sites, SCHEDULE, x)
        assert right.passed, str(right)
        assert not any(f.decisive for name, f in right.end_to_end.items() if name != "float64")
        wrong = certify(net, variables, denoise, sites, SCHEDULE, x, fused=variables["params"])
    assert not wrong.passed
    assert wrong.end_to_end["float64"].error == pytest.approx(1.0, rel=1e-6)


def test_another_type_or_tree_fails():
    half = jax.tree_util.tree_map(lambda leaf: leaf, FUSED)
    half["head"] = {name: leaf.astype(np.float16) for name, leaf in half["head"].items()}
    certificate = run(half)
    assert certificate.structure == {"same_tree": True, "same_dtypes": False, "same_program": False}
    assert not certificate.passed
    cut = {**FUSED, "head": {**FUSED["head"], "bias": FUSED["head"]["bias"][None]}}
    with pytest.raises(ScopeParamShapeError):  # Flax refuses another shape before anything is compared
        run(cut)
    extra = {**FUSED, "left": {"over": np.zeros(2)}}
    certificate = run(extra)
    assert not certificate.structure["same_tree"]
    assert not certificate.passed


def test_zero_change_is_handled():
    certificate = run(None, init_denoise(SITES), rule="paper")
    assert certificate.passed
    assert certificate.end_to_end["float64"].change < 1e-14
    assert certificate.sites["float64"][-1].figure.change == 0.0
    noisy = figure([1.0, 1.0, 0.0, 1e-6], 1e-16)
    assert not noisy.passed


def test_a_constant_that_cancels_the_mean_is_counted_in_the_bound():
    """Features that hardly vary about a large mean, amplified: x·W′ and b′ are each 1e4 times their sum."""
    net = Net(tail=(Dense(5),))
    x = 10.0 + 1e-3 * normal(3, (64, 6))
    sites = find_sites(net, x, pattern="dense0")
    variables = net.init(jax.random.key(0), x)
    amplified = -1e4 * np.eye(6) + normal(5, (6, 6))
    constant = -np.asarray(x, np.float64).mean(0) @ amplified
    denoise = {"dense0": {"kernel": jnp.asarray(amplified, jnp.float32), "bias": jnp.asarray(constant, jnp.float32)}}
    params = {"backbone": variables["params"], "denoise": denoise}
    certificate = certify(net, variables, denoise, sites, SCHEDULE, x, rule="affine")
    exact = certificate.sites["float64"][0].figure
    assert certificate.passed and exact.decisive and exact.error > 0
    terms = 32 * np.finfo(np.float64).eps / exact.change  # what ‖base‖ + ‖explicit‖ alone would allow, at least
    assert exact.bound > 10 * terms
    off = fuse_exact(params, sites, SCHEDULE, rule="affine")
    off = {**off, "dense0": {**off["dense0"], "kernel": off["dense0"]["kernel"] * (1 + 1e-4)}}
    assert not certify(net, variables, denoise, sites, SCHEDULE, x, rule="affine", fused=off).passed


def test_coarse_types_are_left_to_float64():
    half = jax.tree_util.tree_map(lambda leaf: leaf.astype(jnp.bfloat16), VARIABLES)
    little = jax.tree_util.tree_map(lambda leaf: 0.01 * leaf, DENOISE)
    certificate = certify(NET, half, little, SITES, SCHEDULE, X.astype(jnp.bfloat16))
    assert not certificate.end_to_end["bfloat16"].decisive
    assert certificate.end_to_end["float64"].decisive
    assert certificate.end_to_end["float64"].passed


def test_figures_that_are_not_finite_fail():
    assert not figure([1.0, 1.0, 1.0, np.nan], 1e-7).passed
    assert not figure([1.0, np.inf, np.inf, 1.0], 1e-7).passed


class Typed(nn.Module):
    """Two layers with types of their own, and a cast between them."""

    dtype_of_layers: object = None
    param_dtype: object = jnp.float32
    cast: object = None

    @nn.compact
    def __call__(self, x):
        types = {"dtype": self.dtype_of_layers, "param_dtype": self.param_dtype}
        x = jnp.tanh(nn.Dense(5, **types, name="one")(x))
        x = x if self.cast is None else x.astype(self.cast)
        return nn.Dense(3, name="two")(x)


@pytest.mark.parametrize(
    ("net", "held"),
    [
        (Typed(param_dtype=jnp.bfloat16), None),
        (Typed(dtype_of_layers=jnp.float16, param_dtype=jnp.float16), None),
        (Typed(cast=jnp.bfloat16), "bfloat16"),
    ],
    ids=["weights", "layers", "cast"],
)
def test_the_bound_follows_the_types_of_weights_and_code(net, held):
    """Each is a right fusion in a type that cannot show it; a wrong one still fails, in float64."""
    x = normal(1, (6, 4))
    sites = find_sites(net, x, pattern=".*")
    variables, denoise = setup(net, x, sites)
    right = certify(net, variables, denoise, sites, SCHEDULE, x)
    assert right.passed, str(right)
    assert right.held == right.to_json()["held"] == held
    assert right.end_to_end["float64"].decisive == (held is None)
    assert all(site.figure.error < 1e-10 for site in right.sites["float64"])
    assert ("its outputs cannot show float64" in str(right)) == (held is not None)
    fused = fuse_exact({"backbone": variables["params"], "denoise": denoise}, sites, SCHEDULE)
    wrong = {**variables["params"], "two": fused["two"]}  # one layer is left as it was
    assert not certify(net, variables, denoise, sites, SCHEDULE, x, fused=wrong).passed


def test_a_network_that_cannot_be_widened_is_named():
    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3, name="layer")(x)
            return jax.lax.scan(lambda c, _: (c + x, None), jnp.zeros(x.shape, jnp.float32), None, length=2)[0]

    x = normal(1, (6, 4))
    sites = find_sites(Loop(), x)
    variables, denoise = setup(Loop(), x, sites)
    with pytest.raises(FusionError, match=r"in which this network cannot be run.*jnp.zeros\(shape, x.dtype\)"):
        certify(Loop(), variables, denoise, sites, SCHEDULE, x)
