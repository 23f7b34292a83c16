"""Discovery, selection and time steps."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.core.layers import NO_IMAGES, find_layers
from drep_jax.core.sites import assign_times, coverage, find_sites, select_sites
from drep_jax.errors import ConfigError, SiteError
from drep_jax.models import create_model
from tests.trees import Conv, Dense, Inner, Net, Scan

IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
VECTOR = jax.ShapeDtypeStruct((2, 5, 6), jnp.float32)


def wrap(function):
    """Makes a module of a function (module, x) -> y."""

    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            return function(x)

    return Wrapped()


def refusals(module, x=VECTOR):
    return {layer.name: layer.refusal for layer in find_layers(module, x)}


def test_time_falls_with_depth_by_k_a_site():
    vit = create_model(
        "vit", num_classes=10, image_size=(8, 8), patch_size=4, width=8, depth=3, num_heads=2, mlp_dim=12
    )
    sites = find_sites(vit, IMAGE, steps=2)
    assert [site.name for site in sites] == [f"encoderblock_{i}/mlp/fc{j}" for i in range(3) for j in (1, 2)]
    assert [site.times for site in sites] == [(12,), (10,), (8,), (6,), (4,), (2,)]
    assert [site.width for site in sites] == [8, 12] * 3


def test_same_tensor_shares_one_denoiser():
    vit = create_model(
        "vit", num_classes=10, image_size=(8, 8), patch_size=4, width=8, depth=2, num_heads=2, mlp_dim=12
    )
    sites = find_sites(vit, IMAGE, pattern=".*/attn/.*")
    assert [len(site.layers) for site in sites] == [3, 1, 3, 1]
    assert {layer.path[-1] for layer in sites[0].layers} == {"query", "key", "value"}
    assert [site.times[0] for site in sites] == [4, 3, 2, 1]
    only = find_sites(vit, IMAGE, pattern=".*/attn/key")
    assert [site.name for site in only] == ["encoderblock_0/attn/key", "encoderblock_1/attn/key"]


def test_equal_but_separate_tensors_do_not_share():
    module = wrap(lambda x: nn.Dense(3, name="a")(x * 2) + nn.Dense(3, name="b")(x * 2))
    assert len(find_sites(module, VECTOR, pattern=".*")) == 2
    module = wrap(lambda x: nn.Dense(3, name="a")(x) + nn.Dense(3, name="b")(x))
    assert len(find_sites(module, VECTOR, pattern=".*")) == 1


def test_first_convolution_and_shortcut_do_not_share():
    module = wrap(lambda x: nn.Conv(4, (3, 3), name="conv1")(x) + nn.Conv(4, (1, 1), name="shortcut")(x))
    assert [site.kind for site in find_sites(module, IMAGE)] == ["patch", "pointwise"]


def test_scan_slices_interleave_as_they_run():
    sites = find_sites(Net(tail=(Dense(4), Scan(3, 5), Dense(6))), IMAGE, pattern=".*")
    table = {site.name: site.times for site in sites}
    assert table == {
        "dense0": (9,),
        "scan1/fc1": (8, 6, 4),
        "scan1/fc2": (7, 5, 3),
        "dense2": (2,),
        "head": (1,),
    }


@pytest.mark.parametrize("remat", [False, True])
def test_two_scans_and_remat(remat):
    sites = find_sites(Net(tail=(Scan(2, 5, remat=remat), Scan(2, 4, remat=remat))), IMAGE, pattern="scan.*", steps=3)
    assert [site.stack for site in sites] == [2] * 4
    assert [site.times for site in sites] == [(24, 18), (21, 15), (12, 6), (9, 3)]


@pytest.mark.parametrize(("scan", "remat"), [(False, False), (True, False), (False, True), (True, True)])
def test_vit_scan_and_remat_give_the_same_times(scan, remat):
    vit = create_model(
        "vit",
        num_classes=3,
        image_size=(8, 8),
        patch_size=4,
        width=8,
        depth=2,
        num_heads=2,
        mlp_dim=12,
        scan=scan,
        remat=remat,
    )
    sites = find_sites(vit, IMAGE)
    assert sorted(t for site in sites for t in site.times) == [1, 2, 3, 4]
    assert {site.refusal for s in sites for site in s.layers} == {None}


def test_layers_inside_one_scanned_body_share_too():
    vit = create_model(
        "vit", num_classes=3, image_size=(8, 8), patch_size=4, width=8, depth=2, num_heads=2, mlp_dim=12, scan=True
    )
    sites = find_sites(vit, IMAGE, pattern=".*/attn/.*")
    assert [len(site.layers) for site in sites] == [3, 1]
    assert [site.times for site in sites] == [(4, 2), (3, 1)]


def test_scan_of_a_function_and_remat_scan():
    class Functional(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(module, x, _):
                return nn.Dense(x.shape[-1], name="two")(nn.Dense(4, name="one")(x)), None

            scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return scan(self, x, None)[0]

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(x.shape[-1], name="d")(x)

    def both(x):
        return nn.remat_scan(Step, lengths=(3,))(name="steps")(Functional(name="scanned")(x))

    table = {site.name: site.times for site in find_sites(wrap(both), VECTOR)}
    assert table == {"scanned/one": (7, 5), "scanned/two": (6, 4), "steps/d": (3, 2, 1)}


def test_partitioned_parameters_are_unboxed():
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    (site,) = find_sites(wrap(lambda x: nn.Dense(3, kernel_init=boxed, name="a")(x)), VECTOR)
    assert site.denoiser_shape == (6, 6)


def test_layer_called_twice_is_one_site():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(x.shape[-1], name="shared")
            return layer(jnp.tanh(layer(x)))

    sites = find_sites(Twice(), VECTOR, pattern=".*")
    assert [(site.name, site.times) for site in sites] == [("shared", (1,))]


def test_dropout_and_train_flag():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))

    assert [layer.name for layer in find_layers(Dropped(), VECTOR, train=True)] == ["Dense_0"]


def test_dense_general_contracts_several_axes():
    module = wrap(lambda x: nn.DenseGeneral((2, 3), axis=(-2, -1), name="all")(x))
    (site,) = find_sites(module, VECTOR, pattern=".*")
    assert (site.width, site.layers[0].axes) == (30, (-2, -1))


@pytest.mark.parametrize(
    ("conv", "kind", "expected"),
    [
        (Conv(), "auto", ("patch", 27, 1, True)),
        (Conv(), "pointwise", ("pointwise", 3, 1, False)),  # zeros are padded after a pointwise denoiser
        (Conv(padding="VALID"), "pointwise", ("pointwise", 3, 1, True)),
        (Conv(padding="CIRCULAR"), "pointwise", ("pointwise", 3, 1, True)),
        (Conv(padding=((0, 0), (0, 0)), input_dilation=2), "pointwise", ("pointwise", 3, 1, False)),
        (Conv(size=(1, 1)), "patch", ("pointwise", 3, 1, True)),  # the window is the pixel
        (Conv(size=(1, 1), padding=((1, 1), (0, 0))), "auto", ("patch", 3, 1, True)),
        (Conv(groups=0), "auto", ("patch", 9, 3, True)),
        (Conv(groups=0), "pointwise", ("pointwise", 1, 3, False)),
        (Conv(padding="REFLECT"), "pointwise", ("pointwise", 3, 1, True)),
        (Conv(bias=False), "auto", ("patch", 27, 1, False)),
    ],
)
def test_kinds_of_convolutional_denoisers(conv, kind, expected):
    (site,) = find_sites(wrap(lambda x: conv.module(3, "conv")(x)), IMAGE, kind=kind)
    assert (site.kind, site.width, site.groups, site.bias) == expected


def test_wide_windows_become_pointwise():
    layers = find_layers(wrap(lambda x: Conv().module(3, "conv")(x)), IMAGE)
    assert select_sites(layers, max_patch_width=26)[0].kind == "pointwise"
    assert select_sites(layers, max_patch_width=27)[0].kind == "patch"


def test_one_layer_without_bias_takes_the_constant_from_its_site():
    module = wrap(lambda x: nn.Dense(3, name="q")(x) + nn.Dense(3, use_bias=False, name="k")(x))
    (site,) = find_sites(module, VECTOR, pattern=".*")
    assert not site.bias
    assert find_sites(module, VECTOR, pattern="q")[0].bias
    assert not find_sites(module, VECTOR, pattern="q", bias=False)[0].bias


class Doubled(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


def vmapped(x):
    return nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)(
        4, name="v"
    )(x)


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        inner = nn.scan(Inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return inner(name="inner")(x, None)[0], None


class SecondAxis(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Inner, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        return scan(name="s")(x, None)[0]


def nested(x):
    return nn.scan(Nested, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="outer")(x, None)[0]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (wrap(lambda x: nn.Conv(4, (3,), mask=jnp.ones((3, 6, 4)))(x)), "masked"),
        (wrap(lambda x: Doubled(4)(x)), "overrides __call__"),
        (wrap(lambda x: nn.WeightNorm(nn.Dense(4))(x)), "map_variables"),
        (wrap(lambda x: nn.SpectralNorm(nn.Dense(4))(x, update_stats=False)), "map_variables"),
        (wrap(vmapped), "side by side"),
        (wrap(nested), "exactly one nn.scan"),
        (SecondAxis(), "first axis"),
        (wrap(lambda x: nn.DenseGeneral(4, batch_dims=(0,))(x)), "batch_dims"),
        (wrap(lambda x: nn.Dense(4, dot_general=jax.lax.dot_general)(x)), "matrix product"),
        (wrap(lambda x: nn.Conv(4, (2,), conv_general_dilated=jax.lax.conv_general_dilated)(x)), "matrix product"),
        (nn.Dense(4), "wrap it"),
    ],
)
def test_what_cannot_be_fused_is_refused_with_the_reason(module, reason):
    (text,) = refusals(module).values()
    assert reason in text
    with pytest.raises(SiteError, match="cannot be denoising sites"):
        find_sites(module, VECTOR, pattern=".*")
    with pytest.raises(SiteError, match="selects no layer"):
        find_sites(module, VECTOR)  # the default passes over them


class Positions(nn.Module):
    """Two layers on a constant, whose result the images are added to."""

    @nn.compact
    def __call__(self, x):
        table = nn.Dense(4, name="fc1")(np.arange(10, dtype=np.float32).reshape(5, 2))
        return x + nn.Dense(6, name="fc2")(nn.relu(table))[None]


class Biased(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        positions = (nn.remat(Positions) if self.remat else Positions)(name="positions")
        return nn.Dense(6, name="mixed")(positions(x)), None


class Accumulated(nn.Module):
    """Its carry starts as a constant and becomes a function of the images in the second round."""

    @nn.compact
    def __call__(self, x):
        def body(module, carry, x):
            return carry + x.mean(), nn.Dense(2, name="reads_carry")(carry) + nn.Dense(2, name="reads_x")(x)

        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan(self, jnp.zeros((5, 6)), jnp.stack([x[0], x[1]]))[1]


def scanned(x):
    return nn.scan(Biased, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(name="s")(x, None)[0]


@pytest.mark.parametrize(
    ("module", "prefix"),
    [(Biased(), ""), (Biased(remat=True), ""), (wrap(scanned), "s/")],
    ids=["plain", "remat", "scan"],
)
def test_layers_that_read_no_image_are_no_sites(module, prefix):
    table = refusals(module)
    assert table.pop(f"{prefix}mixed") is None
    assert table == dict.fromkeys((f"{prefix}positions/fc1", f"{prefix}positions/fc2"), NO_IMAGES)
    assert [site.name for site in find_sites(module, VECTOR)] == [f"{prefix}mixed"]
    assert [site.name for site in find_sites(module, VECTOR, pattern=".*")] == [f"{prefix}mixed"]
    with pytest.raises(SiteError, match=f"{prefix}positions/fc1: what it reads is the same for all images"):
        find_sites(module, VECTOR, pattern=[".*", ".*positions.*"])


def test_a_carry_that_the_images_reach_later_counts():
    assert set(refusals(Accumulated()).values()) == {None}


def test_parameters_are_no_images_and_layers_called_twice_count_if_one_call_does():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            queries = self.param("queries", nn.initializers.ones, (1, 5, 6))
            shared = nn.Dense(6, name="shared")
            return nn.Dense(6, name="alone")(queries) + shared(queries) + shared(x)

    assert refusals(Twice()) == {"alone": NO_IMAGES, "shared": None}


def test_pattern_that_selects_nothing_lists_the_layers():
    with pytest.raises(SiteError, match=r"selects no layer.*dense0, head"):
        find_sites(Net(tail=(Dense(4),)), IMAGE, pattern="mlp")


def test_patterns_match_whole_paths_and_may_be_several():
    net = Net(tail=(Dense(4), Dense(4)))
    assert [s.name for s in find_sites(net, IMAGE, pattern=["dense1", "he.d"])] == ["dense1", "head"]
    with pytest.raises(SiteError):
        find_sites(net, IMAGE, pattern="dense")
    with pytest.raises(SiteError, match="is not a regular expression"):
        find_sites(net, IMAGE, pattern="(")


def test_unknown_kind():
    with pytest.raises(ConfigError, match='Did you mean "pointwise"'):
        find_sites(Net(), IMAGE, kind="pointwize")


def test_chain_must_fit_into_the_schedule():
    layers = select_sites(find_layers(Net(tail=(Dense(), Dense())), IMAGE))
    assert len(assign_times(layers, timesteps=3)) == 3
    with pytest.raises(ConfigError, match=r"3 sites of 1 step\(s\) each need 3 time steps, but the schedule has 2"):
        assign_times(layers, timesteps=2)
    with pytest.raises(ConfigError):
        assign_times(layers, timesteps=5, steps=2)
    with pytest.raises(ConfigError, match="at least 1"):
        assign_times(layers, timesteps=5, steps=0)


@pytest.mark.parametrize(
    ("steps", "scale", "expected"),
    [
        (1, 1.0, [3, 2, 1]),
        (2, 10.0, [60, 40, 20]),
        (1, 2.5, [8, 5, 2]),
        (3, 0.5, [4, 3, 3]),  # never below k, so that k steps end at t = 1 or later
    ],
)
def test_time_scale_multiplies_the_time_steps(steps, scale, expected):
    sites = find_sites(Net(tail=(Dense(), Dense())), IMAGE, steps=steps, time_scale=scale)
    assert [site.times for site in sites] == [(t,) for t in expected]
    assert {site.steps for site in sites} == {steps}


def test_scaled_chain_must_fit_into_the_schedule():
    layers = select_sites(find_layers(Net(tail=(Dense(), Dense())), IMAGE))
    assert max(site.times for site in assign_times(layers, timesteps=30, time_scale=10.0)) == (30,)
    with pytest.raises(ConfigError, match="need 30 time steps at time scale 10, but the schedule has 29"):
        assign_times(layers, timesteps=29, time_scale=10.0)
    for bad in (0.0, -1.0, float("nan"), float("inf"), True):
        with pytest.raises(ConfigError, match="scale of the time steps"):
            assign_times(layers, timesteps=29, time_scale=bad)


def test_coverage_counts_kernels():
    net = Net(tail=(Dense(4), Scan(3, 5)))
    params = jax.eval_shape(net.init, jax.random.key(0), IMAGE)["params"]
    sites = find_sites(net, IMAGE, pattern="scan.*")
    covered = coverage(sites, params)
    assert (covered.layers, covered.candidates) == (2, 4)
    assert covered.kernel_share == pytest.approx(120 / (12 + 120 + 12))


def test_sites_are_hashable_and_compare_by_value():
    first, second = (find_sites(Net(tail=(Dense(4),)), IMAGE) for _ in range(2))
    assert hash(first) == hash(second)
    assert first == second
    assert dataclasses.replace(first[0], times=(7,)) != first[0]
