"""Resizing of position embeddings: PyTorch's numbers and SciPy's, grids that are said and not guessed, messages."""

import numpy as np
import pytest
import scipy.ndimage

from drep_jax.errors import CheckpointError
from drep_jax.weights import positions
from drep_jax.weights.formats.dinov2 import DINOV2
from drep_jax.weights.formats.timm_vit import TIMM_VIT
from drep_jax.weights.formats.transreid_ssl import TRANSREID_SSL
from drep_jax.weights.positions import Interpolation, Positions, resize
from tests.weights.vit_cases import foreign_weights, load, save, tiny

# torch.nn.functional.interpolate (2.13.0, float64) of cos(1.7·i), i < old, to the new size.
TORCH = {
    "bicubic_weights": {
        (7, 4): [0.648455328, -0.891464676, 0.93745103, -0.770807156],
        (4, 7): [1.111999969, 0.666885964, -0.025550319, -0.779723259, -0.928562336, -0.131778156, 0.511401667],
        (9, 2): [-0.958467084, -0.376539361],
    },
    "bicubic_offset_weights": {
        (7, 4): [0.670460791, -0.936778806, 0.959803938, -0.799388839],
        (4, 7): [1.112937456, 0.679242355, 0.002810075, -0.751304839, -0.950661735, -0.206513782, 0.492705345],
        (9, 2): [-0.899553838, -0.782374247],
    },
    "bicubic_antialias_weights": {
        (7, 4): [0.450846559, -0.482472778, 0.52526082, -0.660526837],
        (4, 7): [1.08954776, 0.691022634, -0.052004564, -0.70242262, -0.931670937, -0.060210064, 0.48465468],
        (9, 2): [0.040923757, 0.089420362],
    },
    "bilinear_weights": {
        (7, 4): [0.576683315, -0.798701201, 0.807970022, -0.672170496],
        (4, 7): [1.0, 0.596841252, -0.048212745, -0.547821343, -0.870742769, -0.102299377, 0.377977743],
        (9, 2): [-0.757309768, -0.339181665],
    },
}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("sizes", [(7, 4), (4, 7), (9, 2)])
def test_weights_are_those_of_torch(name, sizes):
    matrix = getattr(positions, name)(*sizes)
    assert matrix.shape == sizes[::-1]
    np.testing.assert_allclose(matrix @ np.cos(1.7 * np.arange(sizes[0])), TORCH[name][sizes], atol=1e-8)


@pytest.mark.parametrize("sizes", [(7, 4), (4, 7), (14, 37), (5, 1), (3, 3)])
def test_linear_weights_are_those_of_scipy(sizes):
    values = np.cos(1.7 * np.arange(sizes[0]))
    expected = scipy.ndimage.zoom(values, sizes[1] / sizes[0], order=1, mode="nearest")
    np.testing.assert_allclose(positions.linear_corner_weights(*sizes) @ values, expected, atol=1e-12)


@pytest.mark.parametrize("name", [*TORCH, "linear_corner_weights"])
@pytest.mark.parametrize("sizes", [(14, 9), (9, 14), (37, 16), (8, 8)])
def test_constants_stay_and_the_same_size_changes_nothing(name, sizes):
    matrix = getattr(positions, name)(*sizes)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
    if sizes[0] == sizes[1] and "offset" not in name:
        np.testing.assert_allclose(matrix, np.eye(sizes[0]), atol=1e-12)


def test_rows_are_resized_by_height_and_columns_by_width_and_the_prefix_is_kept():
    """Positions whose value is row + 100·column come out as the resized rows + 100·the resized columns."""
    spread = Interpolation("test", positions.bilinear_weights)
    row, column = np.mgrid[:4, :6]
    patches = (row + 100 * column).reshape(1, 24, 1)
    given = np.concatenate([[[[-7.0]]], patches], axis=1).astype(np.float16)
    got = resize(Positions("p", 1, (8, 3), spread), given, (4, 6))
    assert got.shape == (1, 25, 1) and got.dtype == np.float32 and got[0, 0, 0] == -7
    rows, columns = positions.bilinear_weights(4, 8) @ np.arange(4), positions.bilinear_weights(6, 3) @ np.arange(6)
    expected = rows[:, None] + 100 * columns[None]
    np.testing.assert_allclose(got[0, 1:, 0].reshape(8, 3), expected, rtol=1e-6)


# --- reading files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """A file of timm's for 4 x 4 patches, and its positions."""
    tensors = foreign_weights(TIMM_VIT, tiny(size=(32, 32)), (32, 32))
    return save(tmp_path_factory.mktemp("square") / "net.safetensors", tensors), tensors["pos_embed"]


def test_positions_that_fit_are_taken_as_they_are(square):
    path, stored = square
    assert np.array_equal(load(path, tiny(size=(32, 32)), (32, 32)).variables["params"]["pos_embedding"], stored)


def test_another_grid_needs_the_files_grid_and_says_how(square):
    path, _ = square
    with pytest.raises(CheckpointError) as error:
        load(path, tiny())
    for text in (
        "mis-shaped",
        "(1, 17, 12) in the file, (1, 7, 12) in the model",
        "2×3",
        "--config.backbone.init_grid",
        "--config.model.position_class_token",
    ):
        assert text in str(error.value)
    for wrong in ((4, 5), (16,)):
        with pytest.raises(CheckpointError, match="of the file's 17 positions this model takes 16 for patches"):
            load(path, tiny(), grid=wrong)


def test_a_given_grid_resizes_with_the_interpolation_of_the_format(square):
    path, stored = square
    found = load(path, tiny(), grid=(4, 4))
    got = found.variables["params"]["pos_embedding"]
    rows, columns = positions.bicubic_antialias_weights(4, 2), positions.bicubic_antialias_weights(4, 3)
    expected = np.einsum("ih,jw,hwd->ijd", rows, columns, stored[0, 1:].reshape(4, 4, 12)).reshape(6, 12)
    np.testing.assert_allclose(got[0, 1:], expected, atol=1e-6)
    assert np.array_equal(got[:, :1], stored[:, :1])
    assert "pos_embed resized from 4×4 to 2×3 patches (bicubic, antialiased)" in found.notes


def test_a_given_grid_of_equal_number_is_resized_too(square):
    path, stored = square
    found = load(path, tiny(size=(16, 64)), (16, 64), grid=(4, 4))
    assert any("from 4×4 to 2×8" in note for note in found.notes)
    assert not np.array_equal(found.variables["params"]["pos_embedding"], stored)


def test_a_grid_where_there_are_no_positions_is_refused(tmp_path):
    module = tiny(pool="gap", class_token=False, positions="sincos2d")
    path = save(tmp_path / "net.safetensors", foreign_weights(TIMM_VIT, module))
    with pytest.raises(CheckpointError, match="no position embeddings of format timm to resize"):
        load(path, module, grid=(2, 3), format_name="timm")


@pytest.mark.parametrize(("registers", "name"), [(0, "DINOv2's offset"), (4, "bicubic, antialiased")])
def test_dinov2_is_37_by_37_and_has_two_interpolations(registers, name, tmp_path):
    size, options = (518, 518), {"patch_size": 14, "layer_scale": True, "registers": registers, "depth": 1}
    tensors = foreign_weights(DINOV2, tiny(0, size, **options), size) | {"mask_token": np.zeros((1, 12), np.float32)}
    found = load(save(tmp_path / "net.safetensors", tensors), tiny(0, (28, 70), **options), (28, 70))
    assert any("37×37 to 2×5" in note and name in note for note in found.notes)


def test_transreid_ssl_is_16_by_8_and_bilinear(tmp_path):
    size = (256, 128)
    tensors = foreign_weights(TRANSREID_SSL, tiny(0, size, patch_size=16, depth=1), size)
    tensors |= {"head.mlp.0.weight": np.zeros((3, 12), np.float32)}
    module = tiny(0, size, patch_size=16, patch_stride=12, depth=1)
    found = load(save(tmp_path / "net.safetensors", tensors), module, size)
    assert any("16×8 to 21×10 patches (bilinear)" in note for note in found.notes)
