"""Feature vectors of a layer: those gathered at some positions are those of all positions, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from drep_jax.core.intercept import visit_sites
from drep_jax.core.layers import find_layers
from drep_jax.core.matrix_form import features, sampled_features
from drep_jax.core.sites import assign_times, select_sites
from tests import trees


def both(net, x, kind, picks_of):
    """Returns all vectors and the sampled ones of every site, [(vectors (batch, n, …), picks, sampled)]."""
    sites = assign_times(select_sites(find_layers(net, x), r"conv\d|dense\d|general\d", kind=kind), timesteps=1000)
    picked = []

    @jax.jit
    def run(variables, x):
        results = []

        def visit(site, layer, module, extra, inputs, call):
            lead = 1 if site.groups == 1 else 2
            vectors = features(layer, site.kind, inputs)
            vectors = vectors.reshape(x.shape[0], -1, *vectors.shape[-lead:])
            picked.append(picks_of(vectors.shape[1]))
            results.append((vectors, sampled_features(layer, site.kind, inputs, jnp.asarray(picked[-1]))))
            return call(inputs)

        visit_sites(net, variables, sites, {site.path: jnp.zeros(()) for site in sites}, visit, x)
        return results

    variables = trees.zeros(jax.eval_shape(net.init, jax.random.key(0), x))
    results = run(trees.randomize(variables), x)
    return [(vectors, picks, sampled) for (vectors, sampled), picks in zip(results, picked, strict=True)]


@settings(max_examples=12, deadline=None)
@given(st.lists(trees.convs, min_size=1, max_size=1), st.sampled_from(("patch", "pointwise")), st.integers(0, 99))
def test_sampled_windows_of_any_convolution(convs, kind, seed):
    rng = np.random.default_rng(seed)
    x = trees.normal(seed, (3, 8, 7, 2))
    ((vectors, picks, sampled),) = both(trees.Net(tuple(convs)), x, kind, lambda n: rng.integers(0, n, (3, 5)))
    rows = np.arange(3)[:, None]
    expected = np.asarray(vectors)[rows, picks]
    assume(np.ptp(expected) > 0)  # not windows that see nothing but padding
    np.testing.assert_array_equal(sampled, expected)


@pytest.mark.parametrize("tail", [(trees.Dense(),), (trees.General((2, 3)),)])
def test_sampled_tokens(tail):
    rng = np.random.default_rng(0)
    ((vectors, picks, sampled),) = both(
        trees.Net(tail=tail), trees.normal(0, (3, 4, 4, 2)), "auto", lambda n: rng.integers(0, n, (3, 5))
    )
    np.testing.assert_array_equal(sampled, np.asarray(vectors)[np.arange(3)[:, None], picks])
