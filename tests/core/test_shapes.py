"""The shape annotations of the core are checked in these tests: what contradicts them is an error."""

import jaxtyping
import numpy as np
import pytest

from drep_jax.core.closed_form import best_factors
from drep_jax.core.linear_denoiser import predict
from drep_jax.core.matrix_form import affine
from drep_jax.core.moments import Moments
from drep_jax.core.schedule import Schedule
from tests import shapes


@pytest.mark.parametrize(
    "call",
    [
        lambda: affine(np.ones((2, 3)), np.ones((4, 5))),  # 3 inputs against 4
        lambda: affine(np.ones((2, 3)), np.ones((3, 5)), np.ones(4)),  # a bias of another width than the outputs
        lambda: affine(np.ones((2, 3), int), np.ones((3, 5))),  # no floating type
        lambda: predict({"kernel": np.ones((3, 4))}, np.ones((2, 3))),  # a denoiser that changes the width
        lambda: Moments(1, np.zeros(3), np.eye(2)),
        lambda: best_factors(np.ones((2, 3)), 0.1, 0.01, 1),  # no square matrix
        lambda: Schedule(timesteps=10.0),
    ],
    ids=["inputs", "bias", "type", "width", "moments", "square", "dataclass"],
)
def test_a_wrong_shape_or_type_is_an_error(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_whole_numbers_are_floats_and_the_check_can_be_left_out():
    assert best_factors(np.eye(2), 1, 0, 1)["down"].shape == (2, 1)
    with shapes.unchecked():
        assert affine(np.ones((2, 3), int), np.ones((3, 5))).shape == (2, 5)
