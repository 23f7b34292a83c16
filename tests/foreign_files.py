"""Files of other projects for tests: random weights under their names, written, read into variables of sevens, refused."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from drep_jax import weights
from drep_jax.errors import CheckpointError
from drep_jax.weights.native import names_of
from drep_jax.weights.translation import find_pieces, put_back


def theirs(fmt, module, like):
    """(random variables of the shapes of `like`, the foreign tensors that hold them)."""
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), like)
    arrays = names_of(variables)
    pieces = find_pieces(fmt, module, {name: a.shape for name, a in arrays.items()})
    return variables, put_back(pieces, arrays)


def save(path, tensors):
    """A safetensors file; its path as text."""
    safetensors.numpy.save_file({n: np.asarray(t, order="C") for n, t in tensors.items()}, str(path))
    return str(path)


def load(path, module, like, **options):
    """What a file holds; what it lacks is 7."""
    fresh = jax.tree.map(lambda leaf: np.full(leaf.shape, 7, leaf.dtype), like)
    return weights.load_foreign(path, module, like, fresh=lambda: fresh, **options)


def refused(path, module, like, *parts, **options):
    """Reading fails with a message that has these parts."""
    with pytest.raises(CheckpointError) as caught:
        load(path, module, like, **options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
