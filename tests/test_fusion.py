"""Fused equals explicit, on the change itself, for random networks, schedules, rules and steps; and what fuse refuses."""

import dataclasses
import functools

import flax.core
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.certificate import figure
from drep_jax.denoise_tree import get_in, init_denoise, sample_noise, set_in
from drep_jax.denoiser import explicit_apply
from drep_jax.errors import FusionError, NonFiniteError
from drep_jax.fusion import composed_maps, fuse, fuse_exact, survival
from drep_jax.schedule import Schedule, reverse_steps
from drep_jax.sites import find_sites
from tests.trees import (
    PADDINGS,
    Conv,
    Dense,
    Net,
    Scan,
    conv_oracle,
    denoise_vector,
    float64,
    nets,
    normal,
    randomize,
    setup,
)

SCHEDULE = Schedule(beta_end=0.02)
MIXED = Net((Conv(2, strides=(2, 1)), Conv(1, groups=0, bias=False)), (Scan(2, 3), Dense(5, bias=False)), True)
X = normal(5, (2, 6, 5, 3))


@functools.cache
def mixed():
    sites = find_sites(MIXED, X, pattern=".*", steps=3)
    return sites, *setup(MIXED, X, sites)


def params_of(variables, denoise):
    return {"backbone": variables["params"], "denoise": denoise}


def compare(net, variables, fused, denoise, sites, x, **options):
    """The certificate's figure of the outputs, with the type's own ε."""
    base = net.apply(variables, x)
    explicit = explicit_apply(net, variables, denoise, sites, SCHEDULE, x, **options)
    after = net.apply({**variables, "params": fused}, x)
    squares = [jnp.sum(jnp.square(v)) for v in (base, explicit, explicit - base, after - explicit)]
    return figure(np.asarray(squares), float(jnp.finfo(base.dtype).eps))


@hypothesis.settings(max_examples=14, deadline=None, derandomize=True)
@hypothesis.given(
    nets(),
    st.integers(1, 3),
    st.sampled_from(("ddpm", "paper", "ddim", "ddim:0", "affine")),
    st.booleans(),
    st.booleans(),
)
def test_explicit_equals_fused_on_the_change(example, steps, rule, pointwise, noise):
    net, x = example
    steps = 1 if rule in ("ddim:0", "affine") else steps
    sites = find_sites(net, x, pattern=".*", steps=steps, kind="pointwise" if pointwise else "patch")
    variables, denoise = setup(net, x, sites)
    if noise and all(site.bias for site in sites):
        denoise = sample_noise(denoise, sites, jax.random.key(1))
    fused = jax.jit(lambda p: fuse(p, sites, SCHEDULE, rule=rule))(params_of(variables, denoise))
    found = jax.jit(lambda v, f, d, x: _squares(net, v, f, d, sites, x, rule))(variables, fused, denoise, x)
    single = figure(np.asarray(found), float(jnp.finfo(jnp.float32).eps))
    assert single.change > 1e-6
    assert single.passed, single

    exact = fuse_exact(params_of(variables, denoise), sites, SCHEDULE, rule=rule, round_back=False)
    with jax.enable_x64(True):
        wide = float64(variables), exact, float64(denoise), np.asarray(x, np.float64)
        found = jax.jit(lambda v, f, d, x: _squares(net, v, f, d, sites, x, rule))(*wide)
    double = figure(np.asarray(found), float(np.finfo(np.float64).eps))
    assert double.passed, double
    assert double.decisive
    np.testing.assert_allclose(double.change, single.change, rtol=1e-2)


def _squares(net, variables, fused, denoise, sites, x, rule):
    base = net.apply(variables, x)
    explicit = explicit_apply(net, variables, denoise, sites, SCHEDULE, x, rule=rule)
    after = net.apply({**variables, "params": fused}, x)
    return jnp.stack([jnp.sum(jnp.square(v)) for v in (base, explicit, explicit - base, after - explicit)])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    "conv",
    [Conv(), Conv(2, (3, 2), (2, 1), groups=0), Conv(1, (2, 3), (1, 2), groups=2, kernel_dilation=2), Conv(bias=False)],
)
def test_patch_denoisers_are_exact_at_borders(conv, padding):
    """Against loops over windows in NumPy: pad, cut out, denoise, multiply."""
    conv = dataclasses.replace(conv, padding=padding)
    net, x = ConvOnly(conv), normal(3, (2, 6, 7, 4))
    (site,) = find_sites(net, x, kind="patch", steps=2)
    variables, denoise = setup(net, x, [site])
    fused = fuse_exact(params_of(variables, denoise), [site], SCHEDULE, round_back=False)
    triples = reverse_steps(SCHEDULE, site.times[0], 2, "ddpm")
    own = float64(denoise["conv"])

    def denoised(window, group):
        kernel, bias = own["kernel"], own.get("bias")
        if site.groups > 1:
            kernel, bias = kernel[group], None if bias is None else bias[group]
        return denoise_vector(window.reshape(-1), kernel, bias, triples).reshape(window.shape)

    weights, image = float64(variables["params"]["conv"]), np.asarray(x, np.float64)
    expected = conv_oracle(conv, image, weights["kernel"], weights.get("bias"), denoised)
    after = conv_oracle(conv, image, fused["conv"]["kernel"], fused["conv"].get("bias"))
    base = conv_oracle(conv, image, weights["kernel"], weights.get("bias"))
    assert np.linalg.norm(expected - base) > 1e-3 * np.linalg.norm(base)
    np.testing.assert_allclose(after - base, expected - base, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(net.apply(variables, x), base, rtol=1e-4, atol=1e-5)  # the oracle itself
    explicit = explicit_apply(net, variables, denoise, [site], SCHEDULE, x)
    np.testing.assert_allclose(explicit, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", ((1, 2), (0, 1))])
def test_pointwise_denoisers_act_before_padding(padding):
    conv = Conv(3, padding=padding, groups=2)
    net, x = ConvOnly(conv), normal(3, (2, 6, 7, 4))
    (site,) = find_sites(net, x, kind="pointwise")
    assert site.bias == (padding in ("VALID", "CIRCULAR"))
    variables, denoise = setup(net, x, [site])
    fused = fuse_exact(params_of(variables, denoise), [site], SCHEDULE, round_back=False)
    triples, own = reverse_steps(SCHEDULE, 1, 1, "ddpm"), float64(denoise["conv"])
    image, weights = np.asarray(x, np.float64), float64(variables["params"]["conv"])
    clean = np.empty_like(image)
    for where in np.ndindex(image.shape[:3]):
        for g in range(2):
            part = slice(2 * g, 2 * g + 2)
            bias = own["bias"][g] if site.bias else None
            clean[where][part] = denoise_vector(image[where][part], own["kernel"][g], bias, triples)
    expected = conv_oracle(conv, clean, weights["kernel"], weights["bias"])
    after = conv_oracle(conv, image, fused["conv"]["kernel"], fused["conv"]["bias"])
    base = conv_oracle(conv, image, weights["kernel"], weights["bias"])
    assert np.linalg.norm(expected - base) > 1e-4 * np.linalg.norm(base)
    np.testing.assert_allclose(after - base, expected - base, rtol=1e-9, atol=1e-11)


class ConvOnly(nn.Module):
    conv: Conv

    @nn.compact
    def __call__(self, x):
        return self.conv.module(x.shape[-1], "conv")(x)


def test_dense_against_an_independent_loop():
    net, x = Net(tail=(Scan(2, 4),)), normal(2, (2, 3, 3, 4))
    sites = find_sites(net, x, pattern=".*", steps=3)
    variables, denoise = setup(net, x, sites)
    fused = fuse_exact(params_of(variables, denoise), sites, SCHEDULE, rule="paper", round_back=False)
    for site in sites:
        old, new, own = (float64(get_in(t, site.path)) for t in (variables["params"], fused, denoise))
        for copy in range(site.stack or 1):
            pick = (lambda leaf, i=copy: leaf[i]) if site.stack else (lambda leaf: leaf)
            weights, bias = pick(old["kernel"]).T, pick(old["bias"])
            matrix, constant = np.eye(site.width), np.zeros(site.width)
            for scale, gain, _ in reverse_steps(SCHEDULE, site.times[copy], 3, "paper"):
                step = scale * np.eye(site.width) - gain * pick(own["kernel"]).T
                matrix, constant = step @ matrix, step @ constant - gain * pick(own["bias"])
            np.testing.assert_allclose(pick(new["kernel"]), (weights @ matrix).T, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(pick(new["bias"]), bias + weights @ constant, rtol=1e-12, atol=1e-14)


def test_k_steps_equal_k_single_fusions():
    """W A_3 A_2 A_1: fusing single steps into the layer, the smallest t first."""
    sites, variables, denoise = mixed()
    whole = fuse_exact(params_of(variables, denoise), sites, SCHEDULE, round_back=False)
    partial = float64(variables["params"])
    for back in (2, 1, 0):
        single = [dataclasses.replace(s, steps=1, times=tuple(t - back for t in s.times)) for s in sites]
        partial = fuse_exact({"backbone": partial, "denoise": denoise}, single, SCHEDULE, round_back=False)
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), whole, partial)


def test_fewer_steps_start_at_the_same_t():
    sites, variables, denoise = mixed()
    single = [dataclasses.replace(site, steps=1) for site in sites]
    one = fuse(params_of(variables, denoise), sites, SCHEDULE, steps=1)
    jax.tree_util.tree_map(np.testing.assert_array_equal, one, fuse(params_of(variables, denoise), single, SCHEDULE))
    with pytest.raises(FusionError, match="learned at other time steps"):
        fuse(params_of(variables, denoise), sites, SCHEDULE, steps=4)


def test_zero_denoiser_under_the_papers_rule_is_the_identity():
    sites, variables, _ = mixed()
    fused = fuse(params_of(variables, init_denoise(sites)), sites, SCHEDULE, rule="paper")
    jax.tree_util.tree_map(np.testing.assert_array_equal, fused, variables["params"])
    other = fuse(params_of(variables, init_denoise(sites)), sites, SCHEDULE, rule="ddpm")
    assert not np.array_equal(other["head"]["kernel"], variables["params"]["head"]["kernel"])


def test_strength_zero_is_the_backbone_and_one_is_plain_fusion():
    sites, variables, denoise = mixed()
    params = params_of(variables, denoise)
    many = jax.vmap(lambda tau: fuse(params, sites, SCHEDULE, strength=tau))(jnp.array([0.0, 0.5, 1.0]))
    pick = [jax.tree_util.tree_map(lambda leaf, i=i: leaf[i], many) for i in range(3)]
    jax.tree_util.tree_map(np.testing.assert_array_equal, pick[0], variables["params"])
    plain = fuse(params, sites, SCHEDULE)
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), pick[2], plain)
    half = jax.tree_util.tree_map(lambda a, b: (a + b) / 2, variables["params"], plain)
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), pick[1], half)


def test_gradients_match_finite_differences():
    sites, variables, denoise = mixed()
    weights = float64(variables["params"])

    def total(denoise):
        fused = fuse({"backbone": weights, "denoise": denoise}, sites, SCHEDULE)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree_util.tree_leaves(fused))

    with jax.enable_x64(True):
        point = float64(denoise)
        gradient = jax.jit(jax.grad(total))(point)
        direction = float64(randomize(jax.tree_util.tree_map(np.zeros_like, point), 9, 1.0))
        ahead, behind = (
            float(jax.jit(total)(jax.tree_util.tree_map(lambda p, d, h=h: p + h * d, point, direction)))
            for h in (1e-5, -1e-5)
        )
        slope = sum(np.vdot(g, d) for g, d in zip(*map(jax.tree_util.tree_leaves, (gradient, direction)), strict=True))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree_util.tree_leaves(gradient))
    np.testing.assert_allclose((ahead - behind) / 2e-5, slope, rtol=1e-6)


def test_structure_shapes_types_and_container_are_kept():
    sites, variables, denoise = mixed()
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        backbone = jax.tree_util.tree_map(lambda leaf, d=dtype: leaf.astype(d), variables["params"])
        fused = fuse({"backbone": backbone, "denoise": denoise}, sites, SCHEDULE)
        assert jax.tree_util.tree_structure(fused) == jax.tree_util.tree_structure(backbone)
        assert jax.tree_util.tree_map(lambda x: (x.shape, x.dtype), fused) == jax.tree_util.tree_map(
            lambda x: (x.shape, x.dtype), backbone
        )
        assert not np.array_equal(fused["head"]["kernel"], backbone["head"]["kernel"])
    frozen = flax.core.freeze({"backbone": variables["params"], "denoise": denoise})
    assert isinstance(fuse(frozen, sites, SCHEDULE), flax.core.FrozenDict)


def test_unselected_layers_are_untouched():
    sites = find_sites(MIXED, X, pattern="head")
    variables, denoise = setup(MIXED, X, sites)
    fused = fuse(params_of(variables, denoise), sites, SCHEDULE)
    for name in variables["params"]:
        same = jax.tree_util.tree_map(np.array_equal, fused[name], variables["params"][name])
        assert all(jax.tree_util.tree_leaves(same)) == (name != "head")


def test_jit_compiles_once_and_pmap_agrees():
    sites, variables, denoise = mixed()
    traced = []

    def run(params):
        traced.append(1)
        return fuse(params, sites, SCHEDULE)

    jitted, params = jax.jit(run), params_of(variables, denoise)
    plain = fuse(params, sites, SCHEDULE)
    for again in (params, randomize(params)):
        jitted(again)
    assert len(traced) == 1
    count = jax.local_device_count()
    assert count == 8
    copies = jax.tree_util.tree_map(lambda leaf: jnp.stack([leaf * (i + 1) for i in range(count)]), params)
    everywhere = jax.pmap(lambda p: fuse(p, sites, SCHEDULE))(copies)
    first = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf)[0], everywhere)
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), first, plain)
    third = fuse(jax.tree_util.tree_map(lambda leaf: leaf * 3, params), sites, SCHEDULE)
    found = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf)[2], everywhere)
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, third)


def test_composed_map_is_what_fuse_applies():
    sites, variables, denoise = mixed()
    params = params_of(variables, denoise)
    maps = composed_maps(params, sites, SCHEDULE)
    tree = {}
    for site in sites:
        found = maps[site.path]
        leaves = {"kernel": -found["matrix"]}
        if site.bias:
            leaves["bias"] = -found["constant"]
        assert ("constant" in found) == site.bias
        tree = set_in(tree, site.path, leaves)
    again = fuse({**params, "denoise": tree}, sites, SCHEDULE, rule="affine", steps=1)
    plain = fuse(params, sites, SCHEDULE)
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), again, plain)


def test_sampled_noise_is_fixed_by_its_seed():
    sites = find_sites(MIXED, X, pattern="head|scan.*", steps=2)
    variables, denoise = setup(MIXED, X, sites)
    one, same, other = (sample_noise(denoise, sites, jax.random.key(seed)) for seed in (1, 1, 2))
    fused = [fuse(params_of(variables, d), sites, SCHEDULE) for d in (one, one, same, other, denoise)]
    for twin in fused[1:3]:
        jax.tree_util.tree_map(np.testing.assert_array_equal, fused[0], twin)
    for different in fused[3:]:
        assert not np.array_equal(fused[0]["scan0"]["fc1"]["bias"], different["scan0"]["fc1"]["bias"])
        np.testing.assert_array_equal(fused[0]["scan0"]["fc1"]["kernel"], different["scan0"]["fc1"]["kernel"])
    assert compare(MIXED, variables, fused[0], one, sites, X).passed


def test_sampled_noise_needs_a_bias():
    sites, _, denoise = mixed()
    with pytest.raises(FusionError, match="nowhere|may not have one"):
        sample_noise(denoise, sites, jax.random.key(0))


def test_exact_fusion_rounds_once():
    sites, variables, denoise = mixed()
    params = params_of(variables, denoise)
    exact = fuse_exact(params, sites, SCHEDULE, round_back=False)
    stored = fuse_exact(params, sites, SCHEDULE)
    assert {leaf.dtype for leaf in jax.tree_util.tree_leaves(stored)} == {np.dtype("float32")}
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_array_equal(a.astype(np.float32), b), exact, stored)
    assert not jax.config.jax_enable_x64


def test_survival_tells_coarse_storage_from_fine():
    sites, variables, _ = mixed()
    little = randomize(init_denoise(sites), 4, 0.01)
    base = jax.tree_util.tree_map(lambda leaf: leaf.astype(jnp.bfloat16), variables["params"])
    exact = fuse_exact({"backbone": base, "denoise": little}, sites, Schedule(), rule="paper", round_back=False)
    half = jax.tree_util.tree_map(lambda leaf: leaf.astype(jnp.bfloat16), exact)
    single = jax.tree_util.tree_map(lambda leaf: leaf.astype(np.float32), exact)
    assert survival(base, exact, half).share < 0.5
    assert survival(base, exact, single).share > 0.99
    assert survival(base, base, base).share == 1.0


# ---- refusals ---------------------------------------------------------------------------------------------------------


def test_plain_or_fused_parameters_are_refused():
    sites, variables, denoise = mixed()
    fused = fuse(params_of(variables, denoise), sites, SCHEDULE)
    for params in (variables["params"], fused, {"backbone": fused}):
        with pytest.raises(FusionError, match=r"no `denoise` subtree.*already fused"):
            fuse(params, sites, SCHEDULE)


def test_misfits_name_the_site():
    sites, variables, denoise = mixed()
    head = denoise["head"]
    for broken, message in [
        ({**denoise, "head": {**head, "kernel": jnp.zeros((4, 4))}}, r"head.*kernel.*\(4, 4\), expected \(5, 5\)"),
        ({**denoise, "head": {**head, "bias": jnp.zeros(4)}}, r"head.*bias.*\(4,\), expected \(5,\)"),
        ({k: v for k, v in denoise.items() if k != "head"}, "head: there is no denoiser"),
        ({**denoise, "extra": {"kernel": jnp.zeros((5, 5))}}, "denoise/extra/kernel"),
        (
            {**denoise, "conv1": {**denoise["conv1"], "bias": jnp.zeros((4, 9))}},
            r"conv1.*constant \(bias\).*nowhere to put",
        ),
    ]:
        with pytest.raises(FusionError, match=message):
            fuse(params_of(variables, broken), sites, SCHEDULE)
    wrong = {**variables["params"], "head": {"kernel": jnp.zeros((6, 3)), "bias": jnp.zeros(3)}}
    with pytest.raises(FusionError, match=r"head: the backbone's kernel has shape \(6, 3\), expected \(5, 3\)"):
        fuse({"backbone": wrong, "denoise": denoise}, sites, SCHEDULE)
    no_bias = {**variables["params"], "head": {"kernel": variables["params"]["head"]["kernel"]}}
    with pytest.raises(FusionError, match="head: expected a bias"):
        fuse({"backbone": no_bias, "denoise": denoise}, sites, SCHEDULE)


def test_sites_without_times_are_refused():
    sites, variables, denoise = mixed()
    with pytest.raises(FusionError, match="assign_times"):
        fuse(params_of(variables, denoise), [dataclasses.replace(s, times=()) for s in sites], SCHEDULE)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    sites, variables, denoise = mixed()
    broken = {**denoise, "head": {**denoise["head"], "kernel": denoise["head"]["kernel"].at[0, 0].set(bad)}}
    with pytest.raises(NonFiniteError, match="denoise/head/kernel"):
        fuse(params_of(variables, broken), sites, SCHEDULE)
    weights = jax.tree_util.tree_map(lambda leaf: leaf, variables["params"])
    weights["head"]["bias"] = weights["head"]["bias"].at[1].set(bad)
    with pytest.raises(NonFiniteError, match="backbone/head/bias"):
        fuse_exact({"backbone": weights, "denoise": denoise}, sites, SCHEDULE)
