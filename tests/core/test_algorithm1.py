"""Algorithm 1's loss at one site: its noise is N(0, I) and each example's own, its gradient the definition's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from drep_jax.core.algorithm1 import LOSSES, _regression, algorithm1_losses
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.sampling import draw, systematic
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import find_sites


def example_keys(count):
    return jax.vmap(lambda number: jax.random.fold_in(jax.random.key(7), number))(jnp.arange(count))


@pytest.mark.parametrize("shape", [(197, 64), (33, 3, 5)])
def test_noise_is_standard_normal(shape):
    noise = np.asarray(draw(example_keys(8), shape, jnp.float32), np.float64)
    assert noise.shape == (8, *shape)
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    tolerance = 5 / np.sqrt(noise.size)
    moments = [(noise**power).mean() for power in (1, 2, 3, 4)]
    scales = np.sqrt([1, 2, 15, 96])  # standard deviations of the powers
    np.testing.assert_array_less(np.abs(np.array(moments) - [0, 1, 0, 3]), tolerance * scales)
    assert noise.max() > 3 and noise.min() < -3 and np.isfinite(noise).all()


def test_noise_is_white():
    """Neither neighbors nor the two words of one block, half an array apart, nor two examples are correlated."""
    noise = np.asarray(draw(example_keys(4), (128, 64), jnp.float32), np.float64)
    flat = noise.reshape(4, -1)
    half = flat.shape[1] // 2
    pairs = [(flat[:, :-1], flat[:, 1:]), (flat[:, :half], flat[:, half:]), (flat[0], flat[1])]
    pairs += [(flat[:, :half] ** 2 - 1, flat[:, half:] ** 2 - 1)]
    for a, b in pairs:
        assert abs(stats.pearsonr(a.ravel(), b.ravel()).statistic) < 5 / np.sqrt(a.size)
    assert np.unique(flat[0]).size > 0.99 * flat.shape[1]


def test_noise_of_an_example_is_its_own():
    """Whatever else is in the batch, and in whatever order: this is what makes the number of devices change nothing."""
    keys, shape = example_keys(7), (5, 9)  # odd in every way
    whole = draw(keys, shape, jnp.float32)
    for count in (1, 2, 3, 7):
        np.testing.assert_array_equal(draw(keys[:count], shape, jnp.float32), whole[:count])
    np.testing.assert_array_equal(jax.jit(lambda k: draw(k, shape, jnp.float32))(keys[::-1]), whole[::-1])
    assert not np.allclose(whole[0], whole[1])


@pytest.mark.parametrize(
    "impl", ["threefry2x32", "rbg", *(pytest.param(name, marks=pytest.mark.slow) for name in ("unsafe_rbg", "legacy"))]
)
def test_any_generator_keeps_noise_with_its_example(impl):
    """The batch in two halves gives the loss of the whole, whichever generator the step's key is of."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(x)

    x = jax.random.normal(jax.random.key(0), (6, 5, 4))
    variables, sites = Net().init(jax.random.key(0), x), find_sites(Net(), x, pattern=".*")
    key = jax.random.PRNGKey(3) if impl == "legacy" else jax.random.key(3, impl=impl)

    def loss(rows, tokens, key=key):
        index, denoise = jnp.arange(6)[rows], init_denoise(sites)
        table = algorithm1_losses(
            Net(), variables, denoise, sites, Schedule(), key, index, x[rows], loss="l1", tokens=tokens
        )
        return float(table["head"])

    for tokens in (1.0, 0.4):
        parts = [loss(slice(0, 2), tokens), loss(slice(2, 4), tokens), loss(slice(4, 6), tokens)]
        assert np.mean(parts) == pytest.approx(loss(slice(0, 6), tokens), rel=1e-6)
        assert loss(slice(5, None, -1), tokens) == pytest.approx(np.mean(parts), rel=1e-6)
    other = jax.random.PRNGKey(4) if impl == "legacy" else jax.random.key(4, impl=impl)
    assert loss(slice(0, 6), 1.0, other) != loss(slice(0, 6), 1.0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_noise_in_every_type(dtype):
    with jax.enable_x64(True):
        noise = draw(example_keys(2), (40, 50), dtype)
        assert noise.dtype == dtype
        np.testing.assert_allclose(np.asarray(noise, np.float64).std(), 1.0, atol=0.06)


def test_l2_loss_and_gradient_against_numpy():
    """loss = mean r², r = ε − X W − b:  ∂W = −2 Xᵀ r / size,  ∂b = −2 Σ r / size, in float64, times what is passed back."""
    rng = np.random.default_rng(0)
    noisy, noise, kernel, bias = (rng.standard_normal(s) for s in ((37, 6), (37, 6), (6, 6), (6,)))
    residual = noise - noisy @ kernel - bias
    with jax.enable_x64(True):
        denoiser = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
        objective = lambda d: 3.0 * _regression(LOSSES["l2"], d, noisy, noise)  # noqa: E731
        value, slope = jax.value_and_grad(objective)(denoiser)
        assert float(objective(denoiser)) == pytest.approx(float(value), rel=1e-14)
    np.testing.assert_allclose(value, 3 * np.mean(residual**2), rtol=1e-13)
    np.testing.assert_allclose(slope["kernel"], -6 * noisy.T @ residual / residual.size, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(slope["bias"], -6 * residual.sum(0) / residual.size, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("groups", [1, 3])
def test_gradient_by_central_differences(loss, groups):
    rng = np.random.default_rng(1)
    lead = () if groups == 1 else (groups,)
    noisy, noise, kernel, way = (
        rng.standard_normal(s) for s in ((29, *lead, 4), (29, *lead, 4), (*lead, 4, 4), (*lead, 4, 4))
    )

    def value(w):
        residual = noise - (noisy @ w if groups == 1 else np.einsum("ngd,gde->nge", noisy, w))
        return {"l1": np.abs(residual).mean(), "l2": np.square(residual).mean()}

    def plain(w):
        parts = value(w)
        return sum(parts[name] for name in loss.split("+"))

    with jax.enable_x64(True):
        objective = lambda w: _regression(LOSSES[loss], {"kernel": w}, noisy, noise)  # noqa: E731
        np.testing.assert_allclose(objective(jnp.asarray(kernel)), plain(kernel), rtol=1e-12)
        slope = np.asarray(jax.grad(objective)(jnp.asarray(kernel)))
    step = 1e-7
    numeric = (plain(kernel + step * way) - plain(kernel - step * way)) / (2 * step)
    np.testing.assert_allclose((slope * way).sum(), numeric, rtol=1e-5)


@pytest.mark.parametrize(("total", "share"), [(197, 0.25), (10, 0.3), (5, 0.01), (17, 0.9)])
def test_systematic_sample_is_even(total, share):
    """No position twice, evenly spread, and each position equally likely: that makes the sampled loss unbiased."""
    keys = example_keys(4000)
    picks = np.asarray(jax.vmap(lambda key: systematic(key, total, share))(keys))
    picked = max(1, round(share * total))
    assert picks.shape == (4000, picked)
    assert picks.min() >= 0 and picks.max() < total
    ordered = np.sort(picks, axis=1)
    assert (np.diff(ordered, axis=1) > 0).all()
    gaps = np.diff(np.concatenate([ordered, ordered[:, :1] + total], axis=1), axis=1)
    assert gaps.max() - gaps.min() <= 1
    counts = np.bincount(picks.ravel(), minlength=total)
    expected = 4000 * picked / total
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected) + 1
