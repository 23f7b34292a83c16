"""SwinV2 against timm with every parameter at random: features, logits, round trips, and fused weights run by timm."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from drep_jax import find_sites, fuse_exact
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.schedule import Schedule
from drep_jax.models import create_model
from drep_jax.weights.formats.timm_swinv2 import TIMM_SWINV2
from drep_jax.weights.translation import account, find_pieces, put_back
from tests.swin_cases import CASES, GOLDEN, SIZE, TIMM_COMMON, images, swin_weights

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -r requirements-parity.txt")
timm = pytest.importorskip("timm", reason="needs timm: pip install -r requirements-parity.txt")
swin_transformer_v2 = pytest.importorskip("timm.models.swin_transformer_v2")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # what PyTorch warns of is not ours to mend

TOLERANCE = 1e-4
NAMES = {"t": "tiny", "s": "small", "b": "base"}
CONFIGURATIONS = [(size, *case) for size in NAMES for case in ((8, (256, 256)), (16, (256, 256)), (8, (128, 256)))]


def shapes_of(net):
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def run(net, tensors, batch):
    """(features, logits) of a PyTorch network."""
    net.load_state_dict({name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()})
    with torch.inference_mode():
        maps = net.forward_features(torch.from_numpy(batch).permute(0, 3, 1, 2))
        return net.forward_head(maps, pre_logits=True).numpy(), net.forward_head(maps).numpy()


def read(module, tensors):
    """The variables of our module, read from timm's tensors, and the places of these."""
    like = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, *module.image_size, 3), np.float32))
    shapes = {path: leaf.shape for path, leaf in flatten_dict(like, sep="/").items()}
    pieces = find_pieces(TIMM_SWINV2, module, shapes)
    found = account(pieces, shapes, tensors, TIMM_SWINV2.ignored)
    assert not (found.missing or found.shaped)
    assert module.num_classes == 0 or not found.unexpected
    return unflatten_dict(found.arrays, sep="/"), pieces, found.arrays


def error(got, expected):
    assert np.ptp(expected) > 0.1
    return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids=lambda c: f"{c[0]}-w{c[1]}-{c[2][0]}x{c[2][1]}")
def pair(request):
    size, window, image_size = request.param
    net = timm.create_model(f"swinv2_{NAMES[size]}_window{window}_256", img_size=image_size, window_size=window).eval()
    return net, swin_weights(shapes_of(net)), f"swinv2_{size}_w{window}", image_size


def test_features_and_logits(pair):
    net, tensors, name, image_size = pair
    for num_classes in (0, 1000):
        module = create_model(name, num_classes=num_classes, image_size=image_size)
        variables, _, _ = read(module, tensors)
        forward = jax.jit(module.apply)
        for count in (1, 3):
            batch = np.random.default_rng(count).normal(size=(count, *image_size, 3)).astype(np.float32)
            found = error(forward(variables, batch), run(net, tensors, batch)[num_classes > 0])
            print(f"{name} {image_size} batch {count} classes {num_classes}: max|Δ| / max|output| = {found:.1e}")
            assert found < TOLERANCE


def test_import_then_export_is_the_same_to_the_bit(pair):
    net, tensors, name, image_size = pair
    _, pieces, arrays = read(create_model(name, num_classes=1000, image_size=image_size), tensors)
    back = put_back(pieces, arrays)
    assert back.keys() == shapes_of(net).keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor, strict=True, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_fused_weights_run_in_timm(name):
    options, theirs = CASES[name]
    net = swin_transformer_v2.SwinTransformerV2(num_classes=5, **TIMM_COMMON, **theirs).eval()
    tensors = swin_weights(shapes_of(net))
    module = create_model(
        "swinv2",
        num_classes=5,
        image_size=SIZE,
        **{"patch_size": 2, "width": 8, "depths": (2, 2), "num_heads": (2, 4), **options},
    )
    variables, pieces, _ = read(module, tensors)
    sites = find_sites(module, images(), pattern=".*")
    rng = np.random.default_rng(0)
    denoise = jax.tree.map(lambda leaf: rng.normal(scale=0.05, size=leaf.shape), init_denoise(sites))
    schedule = Schedule(beta_end=0.2)
    params = fuse_exact({"backbone": variables["params"], "denoise": denoise}, sites, schedule)
    fused = {"params": jax.tree.map(np.float32, params)}
    back = put_back(pieces, {path: np.asarray(leaf) for path, leaf in flatten_dict(fused, sep="/").items()})

    before, after = run(net, tensors, images())[1], run(net, back, images())[1]
    np.testing.assert_allclose(before, GOLDEN[name], atol=TOLERANCE)
    assert error(jax.jit(module.apply)(fused, images()), after) < TOLERANCE
    assert np.abs(after - before).max() > 0.01 * np.abs(before).max()
