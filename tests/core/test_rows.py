"""What a network says of its rows: padding and empty proposals count for nothing; where to look follows the clean image."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import drep_jax.core.layers as layers_module
import drep_jax.core.moments as moments_module
from drep_jax.core.algorithm1 import algorithm1_losses
from drep_jax.core.chunks import InMemory
from drep_jax.core.closed_form import closed_form, expected_losses
from drep_jax.core.denoisers import Denoisers
from drep_jax.core.forms import form_lines
from drep_jax.core.fusion import fuse_exact
from drep_jax.core.layers import NO_IMAGES, find_layers
from drep_jax.core.measured import measure
from drep_jax.core.moments import batch_sums, collect_moments, moments_from_sums
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import find_sites, pattern_of, select_sites
from drep_jax.errors import ConfigError, DataError, SiteError
from drep_jax.evaluation.placebo import placebo_of_effect
from drep_jax.models import create_model
from drep_jax.rows import block_of, clean_stream, valid_pixels, valid_rows
from drep_jax.trees import get_in
from tests import trees

SCHEDULE = Schedule(beta_start=0.05, beta_end=0.05)
X = trees.normal(0, (8, 6, 5))  # images of six places with five numbers each
R = 3


class Regions(nn.Module):
    """Takes the best three of six places; those below 1 are empty. The head reads (images · 3, …)."""

    marked: bool = True
    clean: bool = True

    @nn.compact
    def __call__(self, x):
        score, index = jax.lax.top_k(x.sum(-1), R)
        valid = score > 1
        if self.clean:
            index, valid = clean_stream((index, valid))
        rows = jnp.take_along_axis(x, index[..., None], axis=1).reshape(-1, x.shape[-1])
        first, last = nn.Dense(4, name="first"), nn.Dense(2, use_bias=False, name="last")
        if not self.marked:
            return last(jnp.tanh(first(rows))).reshape(len(x), -1)
        with valid_rows(valid):
            y = last(jnp.tanh(first(rows)))
        return y.reshape(len(x), -1) * jnp.repeat(valid, 2, axis=1)


def parts(net, x=X):
    sites = find_sites(net, x)
    variables = trees.randomize(trees.zeros(jax.eval_shape(net.init, jax.random.key(0), x)), 0, 0.6)
    return sites, variables


def rows_of(x):
    """Returns the rows that the head reads, and which of them count."""
    order = np.argsort(-x.sum(-1), axis=1, kind="stable")[:, :R]
    rows = np.take_along_axis(x, order[..., None], axis=1)
    return rows.reshape(-1, x.shape[-1]).astype(np.float64), rows.sum(-1).reshape(-1) > 1


def test_empty_proposals_count_for_nothing():
    """Moments and closed form are those of the valid rows; Algorithm 1 gives the same loss, and its gradient vanishes there."""
    net = Regions()
    sites, variables = parts(net)
    rows, valid = rows_of(np.asarray(X))
    assert 3 < valid.sum() < len(valid) - 3
    moments = collect_moments(net, variables, sites, [(np.asarray(X), np.ones(len(X), np.float32))])
    leaves = trees.float64(variables["params"]["first"])
    for site, vectors in zip(sites, (rows, np.tanh(rows @ leaves["kernel"] + leaves["bias"])), strict=True):
        vectors = vectors[valid]
        assert moments[site.path].count == valid.sum()
        np.testing.assert_allclose(moments[site.path].mean, vectors.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(moments[site.path].covariance, np.cov(vectors.T, bias=True), rtol=1e-3, atol=1e-5)

    best = closed_form(moments, sites, SCHEDULE)
    least = expected_losses(moments, sites, SCHEDULE)
    zero = trees.zeros(best)

    def loss(denoise, key):
        losses = algorithm1_losses(net, variables, denoise, sites, SCHEDULE, key, jnp.arange(len(X)), X)
        return sum(losses.values()), losses

    def average(denoise):
        keys = jax.random.split(jax.random.key(0), 500)
        (_, losses), slopes = jax.lax.map(lambda key: jax.value_and_grad(loss, has_aux=True)(denoise, key), keys)
        return jax.tree_util.tree_map(lambda leaf: leaf.mean(0), (losses, slopes))

    average = jax.jit(average)
    (losses, slopes), (nothing, away) = average(best), average(zero)
    for site in sites:
        np.testing.assert_allclose(losses[site.name], least[site.name], rtol=0.03)
        np.testing.assert_allclose(nothing[site.name], 1.0, rtol=0.03)  # a mean over what counts
        sizes = [np.abs(get_in(tree, site.path)["kernel"]).max() for tree in (slopes, away)]
        assert sizes[0] < 0.1 * sizes[1], site.name


@pytest.mark.parametrize("working", [moments_module.WORKING, 1], ids=["whole", "in parts"])
def test_padded_pixels_count_for_nothing(working, monkeypatch):
    monkeypatch.setattr(moments_module, "WORKING", working)

    class Padded(nn.Module):
        @nn.compact
        def __call__(self, x, size=None):
            with valid_pixels(size, x.shape[1:3]):
                return nn.Conv(2, (2, 2), strides=2, padding="VALID", name="conv")(x).sum((1, 2))

    net, images = Padded(), trees.normal(1, (8, 8, 6, 2))
    size = np.array([[8, 6], [5, 6], [4, 2], [8, 6], [2, 3], [7, 5], [8, 1], [6, 6]], np.float32)
    sites, variables = parts(net, images)
    zero = {site.name: np.zeros(site.width, np.float32) for site in sites}
    sums = batch_sums(net, variables, sites, zero, np.ones(8), images, size=size)["conv"]
    moments = moments_from_sums(sites[0], jax.device_get(sums), zero["conv"])
    windows = [
        images[n, i : i + 2, j : j + 2].transpose(2, 0, 1).reshape(-1)
        for n, (height, width) in enumerate(size)
        for i in range(0, 8, 2)
        for j in range(0, 6, 2)
        if i < height and j < width
    ]
    assert moments.count == len(windows) == sum(-(-h // 2) * -(-w // 2) for h, w in size)
    np.testing.assert_allclose(moments.mean, np.mean(windows, 0), atol=1e-6)


class Grid(nn.Module):
    """Reads pixel by pixel, so that padding is nowhere in the features of the picture."""

    @nn.compact
    def __call__(self, x, size=None):
        with valid_pixels(size, x.shape[1:3]):
            x = jnp.tanh(nn.Conv(4, (1, 1), name="first")(x))
            return nn.Conv(2, (1, 1), name="last")(x)


class Told(InMemory):
    """Images with what the network is given beside them."""

    def __init__(self, images, **given):
        super().__init__(images)
        self.given = given

    def arguments(self, index):
        return {name: rows[index] for name, rows in self.given.items()}


def test_padded_pictures_give_what_the_pictures_alone_give():
    """Moments, measured noise and placebo: of a picture within whatever padding as of the picture by itself."""
    net, pictures = Grid(), trees.normal(3, (3, 8, 4, 3, 2))  # clean, clean, noisy; eight images of 4 x 3 pixels
    pictures = np.asarray(pictures.at[2].add(0.5 * trees.normal(4, (8, 4, 3, 2))).at[1].set(pictures[0]))
    padded = np.array(50 * trees.normal(5, (3, 8, 6, 5, 2)))
    padded[:, :, :4, :3] = pictures
    size, ones = np.tile(np.float32([[4, 3]]), (8, 1)), np.ones(8, np.float32)
    sites, variables = parts(net, pictures[0])
    told = {"size": size}

    taken = [
        collect_moments(net, variables, sites, [batch])
        for batch in ((pictures[0], ones), (padded[0], ones, told), (padded[0], ones))
    ]
    options = {"vectors": 10**6, "chunk": 1, "outputs": False, "ridge": 1e-3}
    solved = [
        measure(net, variables, sites, images, [0.5, 0.5], **options).denoise
        for images in (pictures, Told(padded, **told))
    ]
    learned, key = Denoisers(solved[0], "affine", 1), jax.random.key(0)
    random = [
        placebo_of_effect(net, variables, learned, sites, SCHEDULE, key, [batch])
        for batch in (pictures[0], (padded[0], told))
    ]
    for site in sites:
        alone, within, unsaid = (moments[site.path] for moments in taken)
        assert (alone.count, within.count, unsaid.count) == (96, 96, 240)
        np.testing.assert_allclose(within.mean, alone.mean, atol=1e-5)
        np.testing.assert_allclose(within.covariance, alone.covariance, atol=1e-5)
    for trees_ in (solved, random):
        for alone, within in zip(*map(jax.tree_util.tree_leaves, trees_), strict=True):
            np.testing.assert_allclose(within, alone, rtol=1e-3, atol=1e-4 * np.abs(alone).max())


def fused_params(variables, denoise, sites):
    return fuse_exact({"backbone": variables["params"], "denoise": denoise}, sites, SCHEDULE, rule="affine", steps=1)


def test_corrupted_rows_are_those_of_the_clean_image_and_empty_ones_do_not_count():
    net, noisy = Regions(), np.asarray(X) + 0.7 * np.asarray(trees.normal(7, X.shape))
    sites, variables = parts(net)
    order = np.argsort(-np.asarray(X).sum(-1), axis=1, kind="stable")[:, :R, None]
    assert (order != np.argsort(-noisy.sum(-1), axis=1, kind="stable")[:, :R, None]).any(1).mean() >= 0.5
    (u, valid), w = rows_of(np.asarray(X)), np.take_along_axis(noisy, order, axis=1).reshape(-1, 5).astype(np.float64)
    ridge, options = 1e-2, {"ridge": 1e-2, "vectors": 10**6, "chunk": 1}
    measured = measure(net, variables, sites, np.stack([X, noisy]), [1], **options)
    after = fused_params(variables, measured.denoise, sites)["first"]
    old = trees.float64(variables["params"]["first"])["kernel"]
    u, w = u[valid], w[valid]
    r, centered = (u - w) @ old, w - w.mean(0)
    square = centered.T @ centered / len(w)
    pull = ridge * np.trace(square) / len(square) * np.eye(len(square))
    change = np.linalg.solve(square + pull, centered.T @ (r - r.mean(0)) / len(w))
    np.testing.assert_allclose(after["kernel"], old + change, atol=1e-3 * np.abs(change).max())
    # Each stream with places of its own, or with empty rows: another regression.
    others = [
        measure(Regions(*which), variables, sites, np.stack([X, noisy]), [1], **options) for which in ((0, 1), (1, 0))
    ]
    for other in others:
        moved = fused_params(variables, other.denoise, sites)["first"]["kernel"]
        assert np.abs(moved - after["kernel"]).max() > 0.1 * np.abs(change).max()


def test_what_the_author_says_wrongly_is_said():
    class Wrong(nn.Module):
        mask: tuple = (True, False)

        @nn.compact
        def __call__(self, x):
            with valid_rows(jnp.asarray(self.mask)):
                return nn.Dense(2, name="layer")(x)

    with pytest.raises(SiteError, match=r"by a mask \(2,\), and none of the layers there reads such rows: layer"):
        find_sites(Wrong(), X)

    class Scalar(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="layer")(x) + clean_stream(x.sum())

    with pytest.raises(SiteError, match=r"clean_stream got an array \(\) whose first axis is not the images"):
        measure(Scalar(), *reversed(parts(Scalar())), np.stack([X, X]), [1])

    class Empty(nn.Module):
        @nn.compact
        def __call__(self, x):
            with valid_rows(x[..., 0] > 1e9):
                return nn.Dense(2, name="layer")(x)

    with pytest.raises(DataError, match="layer: no row of its input counts in any image"):
        measure(Empty(), *reversed(parts(Empty())), np.stack([X, X + 1]), [1])


def test_blocks_nest_and_may_name_their_layers():
    seen = []

    def ask(name, *positions):
        block = block_of(name, positions)
        seen.append(None if block is None else block.at(positions).sum().item())

    rows, tokens = np.arange(8).reshape(2, 4) < 3, np.ones((2, 9), bool)
    with valid_rows(rows):
        ask("a", 2, 4)
        ask("a", 8, 5, 5)  # flattened
        ask("a", 2, 5)
        with valid_rows(tokens, only="key|value"):
            ask("key", 2, 9)
            ask("query", 2, 9)
        with valid_rows(None):
            ask("a", 2, 4)
        with valid_pixels(None, (4, 4)):
            ask("a", 2, 4)
    ask("a", 2, 4)
    assert seen == [3, 3 * 25, None, 18, None, None, 3, None]


def test_rows_that_count_differently_are_no_one_site():
    class Net(nn.Module):
        same: bool

        @nn.compact
        def __call__(self, x):
            mask, other = x[..., 0] > 0, x[..., 1] > 0
            with valid_rows(mask):
                y = nn.Dense(2, name="a")(x)
            with valid_rows(mask if self.same else other):
                return y + nn.Dense(2, name="b")(x)

    assert [[len(site.layers) for site in find_sites(Net(same), X)] for same in (True, False)] == [[2], [1, 1]]


@pytest.mark.slow
def test_a_padded_transformer_masks_tokens_and_not_queries(monkeypatch):
    """At 10 × 10 cells there are as many tokens as queries: their shapes do not tell keys of the image from others."""
    small = {"stage_sizes": (1, 1, 1, 1), "trunk_width": 4, "width": 8, "num_heads": 2, "mlp_dim": 12}
    net = create_model(
        "detr", num_classes=3, image_size=(320, 320), encoder_layers=1, decoder_layers=2, num_queries=100, **small
    )
    images, size = jax.ShapeDtypeStruct((1, 320, 320, 3), np.float32), np.array([[200.0, 320.0]])
    seen = {}

    def watch(name, positions, seeking=False):
        block = block_of(name, positions, seeking=seeking)
        seen.setdefault(name, []).append(block is not None)
        return block

    monkeypatch.setattr(layers_module, "block_of", watch)
    find_sites(net, images, size=size)
    # in the encoder; of the two decoder layers, itself and the memory
    assert seen.pop("query") == [True, False, False, False, False]
    assert seen.pop("key") == seen.pop("value") == [True, False, True, False, True]
    assert seen.pop("class_embed") == [False] and all(seen.pop("input_proj"))
    assert seen.pop("fc1") == [True, False, False] and all(seen.pop("conv2"))


# ---- constants, and what is denoised by default ----------------------------------------------------------------------


class Decoder(nn.Module):
    """Of DETR's kind: two layers, queries that start at zero, a memory of the image; keys and values of all layers alike."""

    site_pattern = ".*"

    @nn.compact
    def __call__(self, x):
        memory = nn.Dense(8, name="mlp_input")(x)
        queries = self.param("queries", nn.initializers.normal(), (7, 8))
        target = jnp.zeros((len(x), 7, 8))
        for number in range(2):
            attention = {name: nn.MultiHeadDotProductAttention(2, name=f"{name}{number}") for name in ("self", "cross")}
            moved = target + queries[None]
            target = nn.LayerNorm()(target + attention["self"](moved, moved, target))
            target = nn.LayerNorm()(target + attention["cross"](target + queries[None], memory, memory))
        return nn.Dense(3, name="classes")(target)


def test_layers_that_no_image_reaches_are_no_sites_and_are_said():
    layers = find_layers(Decoder(), X[:1])
    constant = {layer.name for layer in layers if layer.refusal == NO_IMAGES}
    assert constant == {"cross0/query", *(f"self0/{name}" for name in ("query", "key", "value", "out"))}
    sites = select_sites(layers, otherwise=pattern_of(Decoder()))  # otherwise it would be those of MLPs
    assert {layer.name for site in sites for layer in site.layers} == {layer.name for layer in layers} - constant
    (memory,) = (site for site in sites if site.name == "cross0/key")
    assert [layer.name for layer in memory.layers] == [f"cross{n}/{name}" for n in (0, 1) for name in ("key", "value")]
    (line,) = form_lines(sites, 2304, layers=layers)
    assert (
        line
        == "No image reaches self0/query, self0/key, self0/value, self0/out, cross0/query: nothing to denoise there."
    )
    assert [site.name for site in select_sites(layers, "classes", otherwise=".*")] == ["classes"]


def test_what_is_read_in_later_calls_decides_too():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            a, b, c = (nn.Dense(5, name=name) for name in "abc")
            return a(x) + a(jnp.tanh(x)) + b(x) + c(x) + c(jnp.tanh(x))

    sites = find_sites(Net(), X)
    assert [[layer.name for layer in site.layers] for site in sites] == [["a"], ["b"], ["c"]]
    assert form_lines(sites, 2304) == [
        "Called several times, with one denoiser, for which all their feature vectors weigh alike: a (2×), c (2×)."
    ]
    with pytest.raises(ConfigError, match='Unknown weights "call" of the calls of a layer'):
        find_sites(Net(), X, call_weights="call")
