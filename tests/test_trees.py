"""Nested dicts: reading and replacing at a path, and numbers that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from drep_jax.errors import DrepError, NonFiniteError
from drep_jax.trees import check_finite, get_in, set_in

NAMES = st.sampled_from(["a", "b", "c", "kernel"])
TREES = st.recursive(st.integers(), lambda below: st.dictionaries(NAMES, below, max_size=3), max_leaves=12)
DICTS = st.dictionaries(NAMES, TREES, max_size=3)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(tuple)


def paths_of(tree, start=()):
    """All paths of a tree with their nodes, by plain recursion."""
    yield start, tree
    if isinstance(tree, dict):
        for name, below in tree.items():
            yield from paths_of(below, (*start, name))


@given(DICTS, PATHS)
def test_a_node_is_found_at_its_path_and_nowhere_else(tree, path):
    nodes = dict(paths_of(tree))
    for place, node in nodes.items():
        assert get_in(tree, place) is node
    assert get_in(tree, path) == nodes.get(path)


@given(DICTS, PATHS, TREES)
def test_setting_changes_one_place_of_a_copy(tree, path, value):
    before = {place: node for place, node in paths_of(tree) if not isinstance(node, dict)}
    above = [get_in(tree, path[:depth]) for depth in range(1, len(path))]
    assume(all(node is None or isinstance(node, dict) for node in above))  # nothing can be set below a leaf
    changed = set_in(tree, path, value)
    assert get_in(changed, path) is value
    for place, leaf in before.items():
        assert get_in(tree, place) == leaf, "the argument is left alone"
        if place[: len(path)] != path:
            assert get_in(changed, place) == leaf
    added = {place for place, _ in paths_of(changed)} - {place for place, _ in paths_of(tree)}
    assert all(place[: len(path)] == path or path[: len(place)] == place for place in added)


def test_what_is_not_on_the_path_is_shared():
    tree = {"a": {"x": np.ones(3)}, "b": {"y": np.ones(2)}}
    changed = set_in(tree, ("a", "z"), 1)
    assert changed["b"] is tree["b"] and changed["a"]["x"] is tree["a"]["x"] and "z" not in tree["a"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "complex64"])
def test_the_leaf_that_is_not_finite_is_named(bad, dtype):
    leaf = np.zeros((2, 3), np.float32)
    leaf[1, 2] = bad
    leaf = leaf if dtype == "float64" else jnp.asarray(leaf).astype(dtype)
    tree = {"a": {"kernel": jnp.ones(3), "index": np.arange(3)}, "b": {"kernel": leaf}}
    with pytest.raises(NonFiniteError, match=r"^Not saving: b/kernel contains NaN or Inf\.$") as error:
        check_finite(tree, "Not saving")
    assert isinstance(error.value, DrepError)
    check_finite({**tree, "b": {}}, "Not saving")
    with pytest.raises(NonFiniteError, match="value contains"):
        check_finite(leaf, "A number")


def test_concrete_numbers_are_checked_inside_a_trace():
    weights = {"w": jnp.asarray([1.0, jnp.nan])}

    def run(x):
        check_finite(weights, "Refusing")
        return x

    with pytest.raises(NonFiniteError, match="Refusing: w"):
        jax.jit(run)(1.0)
    weights["w"] = jnp.ones(2)
    assert jax.jit(run)(1.0) == 1.0
