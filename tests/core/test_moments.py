"""One pass for the moments: NumPy's mean and covariance at every kind of site, however many images, devices and calls."""

import dataclasses
import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.core import moments as moments_module
from drep_jax.core.measured import measure
from drep_jax.core.moments import batch_sums, collect_moments, image_keys, moments_from_sums, zero_sums
from drep_jax.core.sites import find_sites
from drep_jax.core.vector_sums import row_blocks
from drep_jax.core.working import fitting_batch, forward_bytes
from drep_jax.errors import ConfigError, DataError, NonFiniteError
from drep_jax.parallel import devices
from drep_jax.run.moments import load_moments
from tests import trees
from tests.core.test_measured import Mlp, streams

MASK = np.array([1, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0], np.float32)  # of two batches of eight: 11 images


class Whole(nn.Module):
    """One Dense layer, whose features are the input itself."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(x)


def pass_over(net, x, mask=None, **options):
    """Moments of every site of `net` from images x, in batches of eight."""
    pattern, kind = options.pop("pattern", ".*"), options.pop("kind", "auto")
    variables = options.pop("variables", None)
    if variables is None:
        variables = trees.randomize(trees.zeros(jax.eval_shape(net.init, jax.random.key(0), x[:1])))
    sites = find_sites(net, x[:1], pattern=pattern, kind=kind)
    mask = np.ones(len(x), np.float32) if mask is None else mask
    batches = [(jnp.asarray(x[i : i + 8]), mask[i : i + 8]) for i in range(0, len(x), 8)]
    return sites, variables, collect_moments(net, variables, sites, batches, **options)


def check(site_moments, vectors, site):
    """Compares with vectors (n, groups, d), in float64."""
    vectors = np.asarray(vectors, np.float64).reshape(-1, site.groups, site.width)
    assert site_moments.count == len(vectors)
    mean = site_moments.mean.reshape(site.groups, -1)
    covariance = site_moments.covariance.reshape(site.groups, *[site.width] * 2)
    for group in range(site.groups):
        expected = np.cov(vectors[:, group].T, bias=True).reshape(site.width, site.width)
        np.testing.assert_allclose(mean[group], vectors[:, group].mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(covariance[group], expected, rtol=1e-4, atol=3e-6)
        np.testing.assert_array_equal(covariance[group], covariance[group].T)


def windows(conv, x, kind):
    """The vectors of a convolution by loops: (n, groups, d)."""
    groups = conv.groups or x.shape[-1]
    if kind == "pointwise":
        return x.reshape(-1, groups, x.shape[-1] // groups)
    sides, mode = trees.pad_sides(conv, *x.shape[1:3])
    x = np.pad(x, [(0, 0), *sides, (0, 0)], mode=mode)
    (kh, kw), d = conv.size, conv.kernel_dilation
    rows = range(0, x.shape[1] - (kh - 1) * d, conv.strides[0])
    cols = range(0, x.shape[2] - (kw - 1) * d, conv.strides[1])
    moments = []
    for image, r, c in itertools.product(x, rows, cols):
        window = image[r : r + (kh - 1) * d + 1 : d, c : c + (kw - 1) * d + 1 : d]
        moments.append(window.transpose(2, 0, 1).reshape(groups, -1))
    return np.stack(moments)


CONVS = {
    "patch": trees.Conv(),
    "strided": trees.Conv(size=(3, 2), strides=(2, 1)),
    "valid": trees.Conv(padding="VALID", size=(2, 2)),
    "dilated": trees.Conv(kernel_dilation=2, padding="CIRCULAR"),
    "grouped": trees.Conv(groups=2),
    "depthwise": trees.Conv(groups=0),
    "one pixel": trees.Conv(size=(1, 1)),
}


@pytest.mark.parametrize("kind", ["patch", "pointwise"])
@pytest.mark.parametrize("case", CONVS)
def test_convolutions(case, kind):
    """Padding images (here: not even small ones) count for nothing."""
    conv, x = CONVS[case], np.array(trees.normal(0, (16, 5, 6, 4))) + 1.0
    x[MASK == 0] = 1e4
    ((site,), _, moments) = pass_over(trees.Net((conv,)), x, MASK, pattern="conv0", kind=kind)
    assert site.kind == ("pointwise" if case == "one pixel" else kind)
    check(moments[site.path], windows(conv, x[MASK == 1].astype(np.float64), site.kind), site)


def test_dense_layers_scanned_layers_and_layers_called_twice():
    net = trees.Net(tail=(trees.General((2, 3)), trees.Scan(length=3, hidden=5), trees.Twice()))
    x = np.array(trees.normal(0, (16, 3, 4, 3)))
    x[MASK == 0] = 7.0
    sites, variables, moments = pass_over(net, x, MASK)
    params = trees.float64(variables["params"])

    def dense(layer, v):
        return v @ layer["kernel"].reshape(v.shape[-1], -1) + layer["bias"].reshape(-1)

    v = x[MASK == 1].astype(np.float64).reshape(-1, 3)
    wanted = {"general0": np.concatenate([v, np.cos(v)], axis=-1)}
    v = np.tanh(dense(params["general0"], wanted["general0"]))
    inputs = {"scan1/fc1": [], "scan1/fc2": []}
    for copy in range(3):
        block = jax.tree_util.tree_map(lambda leaf, copy=copy: leaf[copy], params["scan1"])
        inputs["scan1/fc1"].append(v)
        hidden = np.tanh(dense(block["fc1"], v))
        inputs["scan1/fc2"].append(hidden)
        v = v + dense(block["fc2"], hidden)
    again = np.tanh(dense(params["twice2"], v))
    wanted["twice2"] = np.concatenate([v, again])
    wanted["head"] = dense(params["twice2"], again).reshape(11, -1, 6).mean(1)
    table = {site.name: site for site in sites}
    for name, vectors in wanted.items():
        check(moments[table[name].path], vectors, table[name])
    for name, copies in inputs.items():
        site, site_moments = table[name], moments[table[name].path]
        for copy, vectors in enumerate(copies):
            of_copy = type(site_moments)(site_moments.count, site_moments.mean[copy], site_moments.covariance[copy])
            check(of_copy, vectors, site)


def test_a_layer_that_a_scan_repeats_is_one_site():
    """Its copies share their weights, and so all their inputs are features of that one layer."""

    class Repeated(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"denoise": 0}
            scan = nn.scan(
                trees.Inner, variable_axes=axes, variable_broadcast="params", split_rngs={"params": False}, length=3
            )
            return scan(name="same")(x, None)[0]

    x = np.array(trees.normal(0, (8, 6, 4)))
    sites, variables, moments = pass_over(Repeated(), x, pattern="same/d")
    layer, v, inputs = trees.float64(variables["params"]["same"]["d"]), x.reshape(-1, 4).astype(np.float64), []
    for _ in range(3):
        inputs.append(v)
        v = v @ layer["kernel"] + layer["bias"]
    check(moments["same", "d"], np.concatenate(inputs), sites[0])


def test_ten_million_vectors_lose_no_accuracy():
    """Mean a thousand standard deviations, and drifting: plain float32 sums would leave nothing of the covariance."""
    rng = np.random.default_rng(0)
    sites = find_sites(Whole(), jnp.zeros((1, 2, 3)), pattern="head")
    variables = trees.zeros(jax.eval_shape(Whole().init, jax.random.key(0), jnp.zeros((1, 2, 3))))
    mixing = np.array([[1.0, 0.5, 0.0], [0.0, 1.0, -0.3], [0.0, 0.0, 0.01]], np.float32)
    count, total, outer, plain = 0, np.zeros(3), np.zeros((3, 3)), np.zeros((3, 3), np.float32)
    origin = np.array([1000.0, -1000.0, 10.0])

    def batches():
        nonlocal count, total, outer, plain
        for number in range(100):
            drift = np.float32(number / 100)
            x = rng.standard_normal((8, 12_500, 3), np.float32) @ mixing + origin.astype(np.float32) + drift
            exact = x.reshape(-1, 3).astype(np.float64) - origin
            count, total, outer = count + len(exact), total + exact.sum(0), outer + exact.T @ exact
            flat = x.reshape(-1, 3)
            plain = plain + flat.T @ flat
            yield x, np.ones(8, np.float32)

    site_moments = collect_moments(Whole(), variables, sites, batches())["head",]
    assert site_moments.count == count == 10_000_000
    mean = total / count
    covariance = outer / count - np.outer(mean, mean)
    scale = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(site_moments.mean, origin + mean, rtol=1e-8)
    np.testing.assert_array_less(np.abs(site_moments.covariance - covariance) / np.outer(scale, scale), 1e-6)
    lost = np.abs(plain / count - np.outer(site_moments.mean, site_moments.mean) - covariance) / np.outer(scale, scale)
    assert lost.max() > 1e-2


@pytest.mark.slow
def test_one_device_takes_the_moments_of_eight(monkeypatch):
    net = trees.Net((trees.Conv(groups=2),), (trees.Scan(length=2), trees.Dense(4)))
    x = np.asarray(trees.normal(1, (16, 6, 6, 4))) + 3.0
    for share in (1.0, 0.4):
        sites, variables, many = pass_over(net, x, MASK, tokens=share, seed=5)
        with monkeypatch.context() as patch:
            patch.setattr(devices, "local_device_count", lambda: 1)
            _, _, one = pass_over(net, x, MASK, tokens=share, seed=5, variables=variables)
        for site in sites:
            assert one[site.path].count == many[site.path].count
            for part in ("mean", "covariance"):
                ours, theirs = getattr(one[site.path], part), getattr(many[site.path], part)
                np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())


HOST = """
import os, sys
which, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"
import jax
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=which)
import numpy as np
from drep_jax.core.moments import collect_moments
from drep_jax.run.moments import save_moments
from tests.core.test_moments import measured, over_hosts
net, sites, variables, x = over_hosts()
mine = [(x[i : i + 4], np.ones(4, np.float32)) for i in (4 * which, 8 + 4 * which)]
save_moments(out, collect_moments(net, variables, sites, mine, shift_images=x[:8], tokens=0.4, seed=5), str(jax.device_count()))
np.savez(out + ".maps.npz", *measured())
"""


def over_hosts():
    net = trees.Net((trees.Conv(),), (trees.Scan(length=2),))
    x = np.asarray(trees.normal(1, (16, 5, 5, 2))) + 3.0
    sites = find_sites(net, x[:1], pattern=".*")
    return net, sites, trees.randomize(trees.zeros(jax.eval_shape(net.init, jax.random.key(0), x[:1]))), x


def measured():
    """Denoisers against measured noise, and what the network says: arrays."""
    model, images = Mlp(residual=True), streams(shape=(130, 6), count=3)
    variables = model.init(jax.random.key(0), images[0])
    sites = find_sites(model, images[0], pattern="[ab]")
    moments = measure(model, variables, sites, images, np.array([0.3, 0.3, 0.4]), vectors=20)
    return [*jax.tree_util.tree_leaves(moments.denoise), moments.outputs]


@pytest.mark.slow
def test_two_hosts_take_the_moments_of_one(tmp_path):
    """Two processes of two devices each, with half of every batch: both end with the moments of all images.

    And with the same maps against measured noise, for which five folds of images are divided among four devices.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    files = [str(tmp_path / f"{which}.npz") for which in range(2)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(which), port, file],
            env=environment,
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for which, file in enumerate(files)
    ]
    messages = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], messages
    net, sites, variables, x = over_hosts()
    wanted = collect_moments(
        net, variables, sites, [(x[i : i + 8], np.ones(8, np.float32)) for i in (0, 8)], tokens=0.4, seed=5
    )
    first, second = (load_moments(file, sites, "4") for file in files)
    for site in sites:
        path = site.path
        assert first[path].count == wanted[path].count
        np.testing.assert_array_equal(first[path].covariance, second[path].covariance)
        np.testing.assert_allclose(first[path].mean, wanted[path].mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(first[path].covariance, wanted[path].covariance, rtol=1e-4, atol=1e-6)
    maps = [[*np.load(f"{file}.maps.npz").values()] for file in files]
    for one, other, alone in zip(*maps, measured(), strict=True):
        assert np.abs(one).max() > 1e-3
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [1, 192, 193, 800])
def test_blocks_of_rows_make_the_whole_matrix(width):
    """Every number on and above the diagonal is in exactly one block, and wide sites do 5/8 of the work."""
    site = find_sites(Whole(), jnp.zeros((1, width)), pattern="head")[0]
    x = np.random.default_rng(0).standard_normal((40, width))
    sums = {name: np.zeros(value.shape) for name, value in zero_sums(site).items()}
    sums["count"] += len(x)
    sums["first"] += x.sum(0)
    operations = 0
    for number, (first, end) in enumerate(row_blocks(width)):
        sums[f"second{number}"] += x[:, first:end].T @ x[:, first:]
        operations += (end - first) * (width - first)
    site_moments = moments_from_sums(site, sums, np.full(width, 3.0))
    np.testing.assert_allclose(site_moments.covariance, np.cov(x.T, bias=True).reshape(width, width), atol=1e-12)
    np.testing.assert_allclose(site_moments.mean, x.mean(0) + 3.0, atol=1e-12)
    assert operations <= width**2 and (width < 800 or operations == 5 / 8 * width**2)


# ---- a sample of the vectors -------------------------------------------------------------------------------------------


def test_a_sample_is_the_images_own():
    """The same whatever the size of the batches and the padding; another one for another seed, image or site."""
    x = np.array(trees.normal(2, (32, 5, 5, 3)))
    net = trees.Net((trees.Conv(),), (trees.Dense(4),))
    sites, variables, first = pass_over(net, x, tokens=0.3, seed=1)
    whole = [(x, np.ones(32, np.float32))]
    at_once = collect_moments(net, variables, sites, whole, tokens=0.3, seed=1)
    longer = (np.concatenate([x, x[:8]]), np.repeat(np.float32([1, 0]), (32, 8)))
    _, _, padded = pass_over(net, *longer, tokens=0.3, seed=1, variables=variables)
    _, _, again = pass_over(net, x, tokens=0.3, seed=1, variables=variables)
    _, _, other = pass_over(net, x, tokens=0.3, seed=2, variables=variables)
    _, _, moved = pass_over(net, np.roll(x, 1, axis=0), tokens=0.3, seed=1, variables=variables)
    for site in sites:
        if site.name == "head":
            continue  # has one vector an image
        ours = first[site.path]
        assert ours.count == 32 * round(0.3 * 25)
        np.testing.assert_array_equal(again[site.path].covariance, ours.covariance)
        for same in (at_once, padded):
            np.testing.assert_allclose(same[site.path].covariance, ours.covariance, rtol=1e-5, atol=1e-6)
        for different in (other, moved):
            assert np.abs(different[site.path].covariance - ours.covariance).max() > 1e-3
    assert first["head",].count == 32


@pytest.mark.slow
def test_sites_and_stacked_copies_sample_by_themselves():
    """Three times the same features, at two sites and as two copies of one: other samples, so other means."""

    class Same(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                trees.Inner, variable_axes={"params": 0, "denoise": 0}, split_rngs={"params": True}, length=2
            )
            y = scan(name="scan")(x, None)[0]
            return nn.Dense(3, name="one")(y), nn.Dense(3, name="two")(y + 0.0)

    x = np.array(trees.normal(2, (8, 40, 3)))
    layer = {"kernel": np.eye(3, dtype=np.float32), "bias": np.zeros(3, np.float32)}
    stacked = jax.tree_util.tree_map(lambda leaf: np.stack([leaf] * 2), {"d": layer})
    variables = {"params": {"scan": stacked, "one": layer, "two": layer}}
    _, _, moments = pass_over(Same(), x, tokens=0.25, variables=variables)
    means = [*moments["scan", "d"].mean, moments["one",].mean, moments["two",].mean]
    for one, two in itertools.combinations(means, 2):
        assert np.abs(one - two).max() > 1e-3
    _, _, full = pass_over(Same(), x, variables=variables)
    for mean in [*full["scan", "d"].mean, full["one",].mean, full["two",].mean]:
        np.testing.assert_allclose(mean, x.reshape(-1, 3).mean(0), atol=1e-6)


@pytest.mark.parametrize("kind", ["patch", pytest.param("pointwise", marks=pytest.mark.slow)])
def test_samples_are_unbiased(kind):
    """The same images at 200 places each: their samples average to the moments of all vectors."""
    x = np.array(trees.normal(3, (8, 6, 5, 2))) + np.linspace(0, 2, 5).reshape(1, 1, 5, 1)
    net, count = trees.Net((trees.Conv(),), (trees.Dense(3),)), 200
    sites, variables, full = pass_over(net, x, kind=kind)
    _, _, sampled = pass_over(net, np.tile(x, (count, 1, 1, 1)), kind=kind, tokens=0.2, variables=variables)
    _, _, one = pass_over(net, x, kind=kind, tokens=0.2, variables=variables)
    for site in sites:
        if site.name == "head":
            continue
        scale = np.sqrt(np.diag(full[site.path].covariance))
        bound = 6 / np.sqrt(8 * 6 * count)  # six vectors of each image; spread evenly, so they err less than this
        off = np.abs(sampled[site.path].mean - full[site.path].mean) / scale
        assert off.max() < bound
        ratio = np.abs(sampled[site.path].second - full[site.path].second) / np.outer(scale, scale)
        assert ratio.max() < 3 * bound
        assert (
            np.abs(one[site.path].second - full[site.path].second).max()
            > np.abs(sampled[site.path].second - full[site.path].second).max()
        )


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_shares_that_are_none_are_refused(share):
    with pytest.raises(ConfigError, match=r"tokens is the fraction .*\(0, 1\]"):
        pass_over(Whole(), np.ones((8, 2, 3), np.float32), tokens=share)


# ---- bad input ---------------------------------------------------------------------------------------------------------


def test_nan_names_the_site():
    x = np.array(trees.normal(0, (8, 4, 4, 2)))
    x[3, 1, 1, 0] = np.nan
    with pytest.raises(NonFiniteError, match=r"^conv0: .*NaN"):
        pass_over(trees.Net((trees.Conv(),)), x)
    mask = np.ones(8, np.float32)
    mask[3] = 0
    _, _, moments = pass_over(Whole(), x.reshape(8, -1, 2), mask)  # in padding it is not looked at
    assert np.isfinite(moments["head",].covariance).all()


def test_nothing_to_see():
    sites = find_sites(Whole(), jnp.zeros((1, 2, 3)), pattern="head")
    with pytest.raises(DataError, match="no images"):
        collect_moments(Whole(), {"params": {}}, sites, [])
    with pytest.raises(DataError, match="head: no feature vector"):
        pass_over(Whole(), np.ones((8, 2, 3), np.float32), np.zeros(8, np.float32))


def test_a_backbone_with_unhashable_attributes():
    class Listed(nn.Module):
        widths: list

        @nn.compact
        def __call__(self, x):
            return nn.Dense(self.widths[0], name="head")(x)

    with pytest.raises(TypeError):
        hash(Listed([2]))
    x = np.array(trees.normal(0, (8, 4, 3)))
    sites, _, moments = pass_over(Listed([2]), x)
    check(moments["head",], x, sites[0])


@pytest.mark.parametrize("tokens", [pytest.param(1.0, marks=pytest.mark.slow), 0.5])
def test_several_passes_over_fewer_sites_give_the_same_moments(finished, tmp_path, tokens):
    """With room for one site at a time, the sites of later passes sample as they would have in one pass."""
    from drep_jax.core.moments import passes, sum_bytes
    from drep_jax.run.moments import moments_of

    setup, tables = finished.setup, []
    limit = 1.5 * max(sum_bytes(site) for site in setup.sites)
    groups = passes(setup.sites, limit)
    assert len(groups) > 1 and [site for group in groups for site in group] == list(setup.sites)
    for gib in (0.0, limit / 2**30):
        denoise = {**finished.config["denoise"], "moment_gib": gib, "moment_tokens": tokens, "moment_images": 96}
        path = str(tmp_path / f"{gib}.npz")
        run = dataclasses.replace(finished.run, config={**finished.config, "denoise": denoise})
        tables.append(moments_of(run, finished.variables, path))
    for site in setup.sites:
        one, several = (moments[site.path] for moments in tables)
        np.testing.assert_allclose(several.covariance, one.covariance, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(several.mean, one.mean, rtol=1e-6, atol=1e-7)
        assert several.count == one.count


@pytest.mark.parametrize("tokens", [1.0, 0.3])
def test_windows_of_large_images_are_gathered_in_parts(tokens, monkeypatch):
    class Large(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), strides=(2, 1), name="a")(x)
            return nn.Conv(4, (3, 3), feature_group_count=2, use_bias=False, name="b")(x)

    x = np.random.default_rng(0).normal(size=(3, 26, 25, 3)).astype(np.float32)
    sites = find_sites(Large(), x, pattern=".*")
    variables = Large().init(jax.random.key(0), x)
    shifts = {site.name: np.zeros(site.denoiser_shape[:-1], np.float32) for site in sites}
    keys = jax.random.wrap_key_data(image_keys(jax.random.key(0, impl="threefry2x32"), np.arange(3)))

    def compiled():
        def sums(x, mask):
            return batch_sums(Large(), variables, sites, shifts, mask, x, tokens=tokens, keys=keys)

        return jax.jit(sums).lower(x, np.array([1.0, 1.0, 0.0])).compile()

    whole = compiled()
    monkeypatch.setattr(moments_module, "WORKING", 8 * 3 * 27 * 40)
    parts = compiled()
    assert parts.memory_analysis().temp_size_in_bytes < 0.6 * whole.memory_analysis().temp_size_in_bytes
    mask = np.array([1.0, 1.0, 0.0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3), parts(x, mask), whole(x, mask))


def test_the_batch_that_fits_follows_from_the_features_of_an_image():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = jnp.tanh(nn.Conv(16, (1, 1), name="a")(x))
            return nn.Conv(2, (1, 1), name="b")(y)

    x = jax.ShapeDtypeStruct((2, 10, 10, 3), np.float32)
    variables = jax.eval_shape(Net().init, jax.random.key(0), x)
    image = 4 * 10 * 10
    assert 2 * 32 * image <= forward_bytes(Net(), variables, x) <= 2 * 52 * image  # a map of 16 before and after tanh
    assert fitting_batch(64, 4, 2**28) == 4 and fitting_batch(48, 1, 2**25) == 8 and fitting_batch(7, 7, 1) == 7
