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

from drep_jax.core.certificate import certify, figure
from drep_jax.core.denoisers import init_denoise, sample_noise
from drep_jax.core.explicit import explicit_apply
from drep_jax.core.fusion import composed_maps, fuse, fuse_exact, survival
from drep_jax.core.schedule import Schedule, reverse_steps
from drep_jax.core.sites import find_sites
from drep_jax.errors import FusionError, NonFiniteError
from drep_jax.trees import get_in, set_in
from tests.trees import (
    PADDINGS,
    Block,
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


def compiled(params, sites, **options):
    """`fuse` as one program: step by step, every new shape costs a compilation."""
    return jax.jit(lambda p: fuse(p, sites, SCHEDULE, **options))(params)


def explicit_outputs(net, variables, denoise, sites, x, **options):
    """`explicit_apply` as one program."""
    return jax.jit(lambda v, d, x: explicit_apply(net, v, d, sites, SCHEDULE, x, **options))(variables, denoise, x)


def outputs(net, variables, x, **options):
    """`net.apply` as one program."""
    return jax.jit(lambda v, x: net.apply(v, x, **options))(variables, x)


def compare(net, variables, fused, denoise, sites, x, **options):
    """The certificate's figure of the outputs, with the type's own ε."""

    @jax.jit
    def squares(variables, fused, denoise, x):
        base = net.apply(variables, x)
        explicit = explicit_apply(net, variables, denoise, sites, SCHEDULE, x, **options)
        after = net.apply({**variables, "params": fused}, x)
        return jnp.stack([jnp.sum(jnp.square(v)) for v in (base, explicit, explicit - base, after - explicit)])

    sums = np.asarray(squares(variables, fused, denoise, x))
    return figure(sums, float(jnp.finfo(sums.dtype).eps))


schedules = st.builds(
    lambda timesteps, start, factor: Schedule(timesteps, start, start * factor),
    st.integers(60, 400),
    st.floats(1e-4, 1e-3),
    st.floats(1.0, 20.0),
)


@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(
    nets(),
    schedules,
    st.floats(0.0, 1.0),
    st.integers(1, 3),
    st.sampled_from(("ddpm", "paper", "ddim", "ddim:0", "affine")),
    st.booleans(),
    st.booleans(),
)
def test_explicit_equals_fused_on_the_change(example, schedule, later, steps, rule, pointwise, noise):
    net, x = example
    steps = 1 if rule in ("ddim:0", "affine") else steps
    sites = find_sites(
        net, x, pattern=".*", steps=steps, kind="pointwise" if pointwise else "patch", timesteps=schedule.timesteps
    )
    shift = int(later * (schedule.timesteps - max(max(site.times) for site in sites)))
    sites = [dataclasses.replace(site, times=tuple(t + shift for t in site.times)) for site in sites]
    variables, denoise = setup(net, x, sites)
    if noise:
        denoise = sample_noise(denoise, [site for site in sites if site.bias], jax.random.key(1))

    @jax.jit
    def squares(variables, denoise, x):
        base = net.apply(variables, x)
        explicit = explicit_apply(net, variables, denoise, sites, schedule, x, rule=rule)
        fused = fuse(params_of(variables, denoise), sites, schedule, rule=rule)
        after = net.apply({**variables, "params": fused}, x)
        return jnp.stack([jnp.sum(jnp.square(v)) for v in (base, explicit, explicit - base, after - explicit)])

    single = figure(np.asarray(squares(variables, denoise, x)), float(jnp.finfo(jnp.float32).eps))
    with jax.enable_x64(True):
        wide = squares(*map(float64, (variables, denoise, x)))
    assert wide.dtype == np.float64
    double = figure(np.asarray(wide), float(np.finfo(np.float64).eps))
    assert double.change > 1e-5
    assert double.decisive
    assert double.passed, double
    assert single.passed, single
    np.testing.assert_allclose(double.change, single.change, rtol=max(1e-2, single.bound))


class Branches(nn.Module):
    """Layers that the random networks lack, each with an output of its own."""

    @nn.compact
    def __call__(self, signal, volume):
        causal = nn.Conv(4, (3,), padding="CAUSAL", kernel_dilation=2, name="causal")(signal)
        return (
            causal,
            nn.Conv(3, (4,), padding="SAME_LOWER", strides=2, use_bias=False, name="lower")(jnp.tanh(causal)),
            nn.Conv(4, 3, padding=2, feature_group_count=2, name="one_number")(signal),
            nn.Conv(4, (2, 3, 1), (2, 1, 1), feature_group_count=2, kernel_dilation=(1, 2, 1), name="volume")(volume),
            nn.Conv(2, (2, 3, 1), padding=((1, 0), (2, 1), (0, 0)), input_dilation=(2, 1, 3), name="spread")(volume),
            nn.Conv(3, (2, 2), name="more_batch_axes")(volume),
            nn.Conv(3, (3, 2), padding="REFLECT", name="no_batch_axis")(volume[0, 0]),
            nn.DenseGeneral((2, 3), axis=(-1, 1), name="reversed_axes")(volume),
            nn.DenseGeneral(4, axis=1, name="inner_axis")(signal),
            nn.MultiHeadDotProductAttention(2, name="attention")(signal),
        )


@pytest.mark.parametrize("kind", [pytest.param("patch", marks=pytest.mark.slow), "pointwise"])
def test_every_other_kind_of_layer(kind):
    inputs = normal(1, (2, 7, 6)), normal(2, (2, 4, 5, 3, 2))
    sites = find_sites(Branches(), *inputs, pattern=".*", kind=kind)
    variables, denoise = setup(Branches(), inputs, sites)
    certificate = certify(Branches(), variables, denoise, sites, SCHEDULE, *inputs)
    assert certificate.passed, str(certificate)
    rows = {row.path: row.figure.change for row in certificate.sites["float64"]}
    assert len(rows) == 13
    assert min(rows.values()) > 1e-4, rows


def test_dropout_draws_the_same_mask_in_both():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(16, name="first")(x))
            return nn.Dense(3, name="second")(x)

    x, rngs = normal(1, (4, 5)), {"dropout": jax.random.key(3)}
    sites = find_sites(Dropped(), x, train=True)
    variables = randomize(jax.jit(lambda key: Dropped().init(key, x, train=False))(jax.random.key(0)))
    denoise = randomize(init_denoise(sites), 1)
    fused = compiled(params_of(variables, denoise), sites)
    explicit = explicit_outputs(Dropped(), variables, denoise, sites, x, train=True, rngs=rngs)
    after = outputs(Dropped(), {"params": fused}, x, train=True, rngs=rngs)
    np.testing.assert_allclose(after, explicit, rtol=1e-4, atol=1e-5)
    assert not np.allclose(after, outputs(Dropped(), variables, x, train=True, rngs=rngs), atol=1e-3)
    assert not np.allclose(after, outputs(Dropped(), {"params": fused}, x, train=False), atol=1e-1)


def test_stacked_copies_fuse_as_the_unrolled_layers_do():
    """Slices of nn.scan interleave in time exactly as the blocks run one after another."""

    class Unrolled(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(3):
                x, _ = Block(4, name=f"block{i}")(x)
            return x

    class Stacked(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "denoise": 0}
            scan = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)
            return scan(4, name="blocks")(x, None)[0]

    x = normal(1, (2, 5, 6))
    sites = {net: find_sites(net, x, pattern=".*", steps=2) for net in (Unrolled(), Stacked())}
    variables, denoise = setup(Stacked(), x, sites[Stacked()])
    params = params_of(variables, denoise)

    def unroll(tree):
        arrays = jax.tree_util.tree_map(np.asarray, tree["blocks"])
        return {f"block{i}": jax.tree_util.tree_map(lambda leaf, i=i: leaf[i], arrays) for i in range(3)}

    assert [site.times[0] for site in sites[Unrolled()]] == [12, 10, 8, 6, 4, 2]
    one = unroll(compiled(params, sites[Stacked()]))
    other = compiled({name: unroll(tree) for name, tree in params.items()}, sites[Unrolled()])
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), one, other)
    explicit = [
        explicit_outputs(net, {"params": p}, d, sites[net], x)
        for net, p, d in (
            (Stacked(), variables["params"], denoise),
            (Unrolled(), unroll(variables["params"]), unroll(denoise)),
        )
    ]
    np.testing.assert_allclose(*explicit, rtol=1e-5, atol=1e-5)


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
    denoiser = float64(denoise["conv"])

    def denoised(window, group):
        kernel, bias = denoiser["kernel"], denoiser.get("bias")
        if site.groups > 1:
            kernel, bias = kernel[group], None if bias is None else bias[group]
        return denoise_vector(window.reshape(-1), kernel, bias, triples).reshape(window.shape)

    weights, image = float64(variables["params"]["conv"]), np.asarray(x, np.float64)
    expected = conv_oracle(conv, image, weights["kernel"], weights.get("bias"), denoised)
    after = conv_oracle(conv, image, fused["conv"]["kernel"], fused["conv"].get("bias"))
    base = conv_oracle(conv, image, weights["kernel"], weights.get("bias"))
    assert np.linalg.norm(expected - base) > 1e-3 * np.linalg.norm(base)
    np.testing.assert_allclose(after - base, expected - base, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(outputs(net, variables, x), base, rtol=1e-4, atol=1e-5)  # the oracle itself
    explicit = explicit_outputs(net, variables, denoise, [site], x)
    np.testing.assert_allclose(explicit, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", ((1, 2), (0, 1))])
def test_pointwise_denoisers_act_before_padding(padding):
    conv = Conv(3, padding=padding, groups=2)
    net, x = ConvOnly(conv), normal(3, (2, 6, 7, 4))
    (site,) = find_sites(net, x, kind="pointwise")
    assert site.bias == (padding in ("VALID", "CIRCULAR"))
    variables, denoise = setup(net, x, [site])
    fused = fuse_exact(params_of(variables, denoise), [site], SCHEDULE, round_back=False)
    triples, denoiser = reverse_steps(SCHEDULE, 1, 1, "ddpm"), float64(denoise["conv"])
    image, weights = np.asarray(x, np.float64), float64(variables["params"]["conv"])
    clean = np.empty_like(image)
    for where in np.ndindex(image.shape[:3]):
        for g in range(2):
            part = slice(2 * g, 2 * g + 2)
            bias = denoiser["bias"][g] if site.bias else None
            clean[where][part] = denoise_vector(image[where][part], denoiser["kernel"][g], bias, triples)
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
        old, new, denoiser = (float64(get_in(t, site.path)) for t in (variables["params"], fused, denoise))
        for copy in range(site.stack or 1):
            pick = (lambda leaf, i=copy: leaf[i]) if site.stack else (lambda leaf: leaf)
            weights, bias = pick(old["kernel"]).T, pick(old["bias"])
            matrix, constant = np.eye(site.width), np.zeros(site.width)
            for scale, gain, _ in reverse_steps(SCHEDULE, site.times[copy], 3, "paper"):
                step = scale * np.eye(site.width) - gain * pick(denoiser["kernel"]).T
                matrix, constant = step @ matrix, step @ constant - gain * pick(denoiser["bias"])
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
    one = compiled(params_of(variables, denoise), sites, steps=1)
    jax.tree_util.tree_map(np.testing.assert_array_equal, one, compiled(params_of(variables, denoise), single))
    with pytest.raises(FusionError, match="learned at other time steps"):
        fuse(params_of(variables, denoise), sites, SCHEDULE, steps=4)


def test_zero_denoiser_under_the_papers_rule_is_the_identity():
    sites, variables, _ = mixed()
    fused = compiled(params_of(variables, init_denoise(sites)), sites, rule="paper")
    jax.tree_util.tree_map(np.testing.assert_array_equal, fused, variables["params"])
    other = compiled(params_of(variables, init_denoise(sites)), sites, rule="ddpm")
    assert not np.array_equal(other["head"]["kernel"], variables["params"]["head"]["kernel"])


def test_strength_zero_is_the_backbone_and_one_is_plain_fusion():
    sites, variables, denoise = mixed()
    params = params_of(variables, denoise)
    many = jax.jit(jax.vmap(lambda tau: fuse(params, sites, SCHEDULE, strength=tau)))(jnp.array([0.0, 0.5, 1.0]))
    pick = [jax.tree_util.tree_map(lambda leaf, i=i: leaf[i], many) for i in range(3)]
    jax.tree_util.tree_map(np.testing.assert_array_equal, pick[0], variables["params"])
    plain = compiled(params, sites)
    jax.tree_util.tree_map(np.testing.assert_array_equal, compiled(params, sites, strength=0.0), variables["params"])
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
        fused = compiled({"backbone": backbone, "denoise": denoise}, sites)
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
    fused = compiled(params_of(variables, denoise), sites)
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
    for again in (randomize(params), params):
        plain = jitted(again)
    assert len(traced) == 1
    count = jax.local_device_count()
    assert count == 8
    copies = jax.tree_util.tree_map(
        lambda leaf: np.stack([np.asarray(leaf) * np.float32(i + 1) for i in range(count)]), params
    )
    everywhere = jax.pmap(lambda p: fuse(p, sites, SCHEDULE))(copies)
    first = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf)[0], everywhere)
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), first, plain)
    third = jitted(jax.tree_util.tree_map(lambda leaf: np.asarray(leaf) * np.float32(3), params))
    on_third = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf)[2], everywhere)
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), on_third, third)


def test_composed_map_is_what_fuse_applies():
    sites, variables, denoise = mixed()
    params = params_of(variables, denoise)
    maps = jax.jit(lambda p: {"/".join(k): v for k, v in composed_maps(p, sites, SCHEDULE).items()})(params)
    tree = {}
    for site in sites:
        site_map = maps[site.name]
        leaves = {"kernel": -site_map["matrix"]}
        if site.bias:
            leaves["bias"] = -site_map["constant"]
        assert ("constant" in site_map) == site.bias
        tree = set_in(tree, site.path, leaves)
    again = compiled({**params, "denoise": tree}, sites, rule="affine", steps=1)
    plain = compiled(params, sites)
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), again, plain)


def test_sampled_noise_is_fixed_by_its_seed():
    sites = find_sites(MIXED, X, pattern="head|scan.*", steps=2)
    variables, denoise = setup(MIXED, X, sites)
    one, same, other = (sample_noise(denoise, sites, jax.random.key(seed)) for seed in (1, 1, 2))
    fused = [compiled(params_of(variables, d), sites) for d in (one, one, same, other, denoise)]
    for twin in fused[1:3]:
        jax.tree_util.tree_map(np.testing.assert_array_equal, fused[0], twin)
    for different in fused[3:]:
        assert not np.array_equal(fused[0]["scan0"]["fc1"]["bias"], different["scan0"]["fc1"]["bias"])
        np.testing.assert_array_equal(fused[0]["scan0"]["fc1"]["kernel"], different["scan0"]["fc1"]["kernel"])
    assert compare(MIXED, variables, fused[0], one, sites, X).passed


def test_sampled_noise_needs_a_bias():
    sites, _, denoise = mixed()
    with pytest.raises(FusionError, match="this site may not have one"):
        sample_noise(denoise, sites, jax.random.key(0))
    with pytest.raises(FusionError, match="head: there is no denoiser"):
        sample_noise({}, find_sites(MIXED, X, pattern="head"), jax.random.key(0))


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
    assert survival(base, exact, half).fraction < 0.5
    assert survival(base, exact, single).fraction > 0.99
    assert survival(base, base, base).fraction == 1.0


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
    boxed = {**variables["params"], "head": {"kernel": nn.Partitioned(jnp.zeros((5, 3)), ("a", "b"))}}
    with pytest.raises(FusionError, match=r"flax\.linen\.unbox"):
        fuse({"backbone": boxed, "denoise": denoise}, sites, SCHEDULE)
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
