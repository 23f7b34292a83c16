"""TransReID: outputs of the authors' code, side information, jigsaw branch, sites, training mode, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError
from flax.traverse_util import flatten_dict, unflatten_dict

from drep_jax import find_sites, fuse_exact
from drep_jax.core.explicit import explicit_apply
from drep_jax.core.layers import find_layers
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import assign_times, select_sites
from drep_jax.errors import ConfigError
from drep_jax.models import create_model
from drep_jax.models.transreid import PARTS, jigsaw_order
from drep_jax.weights.formats.transreid import TRANSREID_NET
from drep_jax.weights.translation import account, find_pieces, put_back
from tests.named_weights import named_weights

SIZE = (16, 12)
SIZES = {"patch": 4, "width": 8, "depth": 2, "heads": 2, "ratio": 2.0}
COMMON = {"patch_size": 4, "width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 16, "drop_path": 0.0}
JIGSAW = {"jigsaw": True, "side_info": 6, "patch_stride": 3}  # 5×3 patches, so that the shuffle takes one twice
ICS = {"image_size": (16, 8), "stem": "ics"}
# name: (the authors' options, cameras, views, their sizes, our options)
GOLDEN_CASES = {
    "jigsaw": (
        {"size": SIZE, "JPM": True, "STRIDE_SIZE": 3, "SIE_CAMERA": True, "SIE_VIEW": True},
        2,
        3,
        SIZES,
        JIGSAW,
    ),
    "ics": ({"size": (16, 8), "STEM_CONV": True, "STRIDE_SIZE": 4}, 0, 0, SIZES, ICS),
}
# Of the authors' code; `python -m tests.parity.transreid_reference` prints them.
# fmt: off
GOLDEN = {
    "jigsaw": {
        "feature": [
            [-0.03279, -0.47013, 0.32704, -0.2454, -0.08239, -0.0039, 0.05997, 0.28785, -0.06129, 0.04469,
             -0.03738, 0.09955, -0.05727, 0.00478, 0.04451, 0.07764, -0.12107, 0.05204, -0.0614, 0.1323, -0.03965,
             0.01522, 0.06104, 0.02298, -0.0568, 0.04, -0.03798, 0.08347, -0.05581, 0.01783, 0.06045, 0.06942,
             -0.04729, 0.04387, -0.03756, 0.0679, -0.05024, -0.00344, 0.06144, 0.08031],
            [0.09329, 0.14955, 0.49367, -0.28154, -0.09815, -0.05765, -0.05723, 0.22972, -0.10353, 0.07133,
             -0.06213, 0.0443, -0.0418, 0.02409, -0.07616, -0.01786, -0.11345, 0.07137, -0.06177, 0.06089,
             -0.04136, 0.02466, -0.06645, -0.00957, -0.11157, 0.07205, -0.06163, 0.0569, -0.04141, 0.01739,
             -0.06659, -0.01167, -0.11541, 0.07208, -0.0616, 0.06486, -0.04198, 0.01381, -0.05788, -0.00867],
            [-0.01207, 0.0902, 0.53294, -0.27886, -0.10838, -0.08572, -0.23302, 0.24587, -0.10475, 0.06557,
             -0.06332, 0.05328, -0.03085, 0.01745, -0.08808, -0.02853, -0.11085, 0.06695, -0.06186, 0.0669,
             -0.02825, 0.00782, -0.09297, -0.01887, -0.1102, 0.0663, -0.06299, 0.06452, -0.03098, 0.01153,
             -0.08402, -0.02414, -0.10862, 0.06847, -0.06155, 0.07233, -0.02979, -4e-05, -0.09594, -0.01453],
        ],
        "logits": [
            [[-0.00115, -0.22117, 0.21258], [-0.06252, 0.16832, -0.15239], [0.06367, 0.05285, -0.06019]],
            [[-0.15639, -0.06512, 0.19949], [0.05785, -0.01516, -0.10001], [0.09855, 0.08029, -0.09948]],
            [[-0.22311, -0.24683, -0.28001], [-0.02207, 0.15737, 0.24231], [0.24518, 0.08947, 0.03771]],
            [[0.06957, 0.02711, -0.19019], [-0.02652, -0.01143, 0.0794], [-0.04304, -0.01569, 0.11079]],
            [[0.39501, 0.11375, 0.2551], [-0.17393, -0.02313, -0.22592], [-0.22109, -0.09062, -0.02918]],
        ],
    },
    "ics": {
        "feature": [
            [0.61533, -1.22432, 2.04443, -1.34835, 0.21233, -0.69096, 0.39666, -0.27694],
            [0.58854, -1.24379, 2.04407, -1.32959, 0.22506, -0.69617, 0.40283, -0.26775],
            [0.63921, -1.19587, 2.0468, -1.36859, 0.19659, -0.68889, 0.38997, -0.28525],
        ],
        "logits": [
            [[-0.09545, -0.09627, -0.01431], [0.21872, 0.1732, 0.06452], [-0.12327, -0.07693, -0.05021]],
        ],
    },
}
# fmt: on


def tiny(num_classes=3, **options):
    return create_model("transreid", num_classes=num_classes, **{"image_size": SIZE, **COMMON, **options})


def channels(module):
    return 4 if module.side_info else 3


def golden_images(name):
    return images(tiny(**GOLDEN_CASES[name][-1]))


def images(module, count=3, seed=7):
    """Pictures, each with a plane that holds its index where the module takes one."""
    rng = np.random.default_rng(seed)
    pictures = rng.normal(size=(count, *module.image_size, 3)).astype(np.float32)
    if not module.side_info:
        return pictures
    index = (5 * np.arange(count) + 4) % module.side_info
    return with_index(pictures, index)


def with_index(pictures, index):
    plane = np.broadcast_to(np.asarray(index, np.float32)[:, None, None, None], (*pictures.shape[:3], 1))
    return np.concatenate([pictures, plane], axis=-1)


def draw(module):
    """Variables drawn by the authors' names, so that their code can draw the same."""
    x = jax.ShapeDtypeStruct((1, *module.image_size, channels(module)), jnp.float32)
    shapes = flatten_dict(jax.eval_shape(module.init, jax.random.key(0), x), sep="/")
    shapes = {path: leaf.shape for path, leaf in shapes.items()}
    pieces = find_pieces(TRANSREID_NET, module, shapes)
    theirs = put_back(pieces, {path: np.zeros(shape, np.float32) for path, shape in shapes.items()})
    drawn = named_weights({name: array.shape for name, array in theirs.items()}, spread="fan_in")
    found = account(pieces, shapes, drawn, ())
    assert not (found.missing or found.unexpected or found.shaped)
    return unflatten_dict(found.arrays, sep="/")


@functools.cache
def jigsaw():
    """A module with jigsaw branch and side information, its variables, images and their feature."""
    module = tiny(**JIGSAW)
    variables, x = draw(module), images(module)
    run = jax.jit(module.apply)
    return module, variables, x, run, np.asarray(run(variables, x))


@functools.cache
def outputs(module, train):
    mutable = ["batch_stats"] if train else False
    return jax.jit(lambda v, x, **rngs: module.apply(v, x, train=train, method="outputs", mutable=mutable, **rngs))


def changed(variables, path, function):
    flat = flatten_dict(variables, sep="/")
    return unflatten_dict({**flat, path: function(flat[path])}, sep="/")


# --- the authors' code -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_outputs_are_those_of_the_authors_code(name):
    module = tiny(**GOLDEN_CASES[name][-1])
    variables, x = draw(module), golden_images(name)
    feature = jigsaw()[-1] if name == "jigsaw" else jax.jit(module.apply)(variables, x)
    np.testing.assert_allclose(feature, GOLDEN[name]["feature"], atol=2e-5)
    found, updates = outputs(module, train=True)(variables, x)
    np.testing.assert_allclose(np.stack(found["logits"]), GOLDEN[name]["logits"], atol=5e-5)
    for path, leaf in flatten_dict(updates["batch_stats"], sep="/").items():
        assert np.abs(leaf - flatten_dict(variables["batch_stats"], sep="/")[path]).max() > 1e-4, path


# --- features --------------------------------------------------------------------------------------------------------


def test_the_feature_is_that_of_outputs_with_the_local_ones_divided_by_four():
    module, variables, x, _, feature = jigsaw()
    parts = outputs(module, train=False)(variables, x)
    assert [f.shape for f in parts["features"]] == [(3, 8)] * 5 and [s.shape for s in parts["logits"]] == [(3, 3)] * 5
    whole, *local = parts["features"]
    np.testing.assert_allclose(feature, np.concatenate([whole, *(f / 4 for f in local)], 1), atol=1e-6)

    after = np.asarray(jax.jit(module.clone(feature="after").apply)(variables, x))
    for i, part in enumerate(parts["features"]):
        name = f"neck_{i}" if i else "neck"
        stats, scale = variables["batch_stats"][name]["bottleneck"], variables["params"][name]["bottleneck"]["scale"]
        normed = (np.asarray(part) - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * scale
        np.testing.assert_allclose(after[:, 8 * i : 8 * i + 8], normed / (4 if i else 1), atol=1e-5)
        logits = normed @ variables["params"][name]["classifier"]["kernel"]
        np.testing.assert_allclose(parts["logits"][i], logits, atol=1e-5)


def test_without_classes_there_are_no_classifiers_and_no_logits():
    _, variables, x, _, _ = jigsaw()
    params = flatten_dict(variables["params"], sep="/")
    bare = tiny(0, **JIGSAW)
    fewer = flatten_dict(jax.eval_shape(bare.init, jax.random.key(0), x)["params"], sep="/")
    assert params.keys() - fewer.keys() == {f"neck{i}/classifier/kernel" for i in ("", "_1", "_2", "_3", "_4")}
    shapes = jax.eval_shape(lambda v: bare.apply(v, x, method="outputs"), variables)
    assert shapes["logits"] == () and len(shapes["features"]) == 5


# --- side information ------------------------------------------------------------------------------------------------


def test_the_plane_acts_by_its_embedding_only():
    _, variables, x, run, feature = jigsaw()
    other = with_index(x[..., :3], [0, 1, 5])
    assert np.abs(run(variables, other) - feature).max(1).min() > 1e-3
    same = changed(variables, "params/sie", lambda table: np.broadcast_to(table[:1], table.shape))
    np.testing.assert_array_equal(run(same, other), run(same, x))

    none = changed(variables, "params/sie", np.zeros_like)
    plain = tiny(**{**JIGSAW, "side_info": 0})
    params = {name: leaf for name, leaf in variables["params"].items() if name != "sie"}
    expected = jax.jit(plain.apply)({**variables, "params": params}, x[..., :3])
    np.testing.assert_allclose(run(none, x), expected, atol=1e-6)


def test_the_embedding_is_added_to_every_token_times_the_coefficient():
    _, variables, x, _, feature = jigsaw()
    table = variables["params"]["sie"]
    one = 4  # the first image's
    moved = changed(variables, "params/pos_embedding", lambda p: p + 3.0 * table[one])
    plain = tiny(**{**JIGSAW, "side_info": 0})
    moved["params"] = {name: leaf for name, leaf in moved["params"].items() if name != "sie"}
    np.testing.assert_allclose(jax.jit(plain.apply)(moved, x[:1, ..., :3]), feature[:1], atol=2e-6)


def test_an_index_without_embedding_makes_that_feature_nan():
    _, variables, x, run, feature = jigsaw()
    wrong = np.asarray(run(variables, with_index(x[..., :3], [6, 3, -2])))
    assert np.isnan(wrong[[0, 2]]).all()
    np.testing.assert_array_equal(wrong[1], feature[1])


# --- jigsaw branch ---------------------------------------------------------------------------------------------------


def naive_order(patches, shift, groups):
    """The shuffle on a list of tokens, one at a time."""
    tokens = list(range(patches + 1))
    row = [tokens[i] for i in range(shift, patches + 1)] + [tokens[i] for i in range(1, shift)]
    if len(row) % groups:
        row.append(row[len(row) - 2])
    each = len(row) // groups
    return [row[g * each + i] for i in range(each) for g in range(groups)]


@pytest.mark.parametrize(("patches", "shift", "groups"), [(8, 3, 2), (15, 5, 2), (210, 5, 2), (12, 1, 3), (11, 8, 3)])
def test_the_order_of_the_jigsaw_branch(patches, shift, groups):
    order = jigsaw_order(patches, shift, groups)
    assert order.tolist() == naive_order(patches, shift, groups)
    assert set(order) == set(range(1, patches + 1))


def test_the_order_by_hand():
    # 7 patches: 3 4 5 6 7 | 1 2, then 1 (the last but one) once more, cut into 3 4 5 6 and 7 1 2 1.
    assert jigsaw_order(7, 3, 2).tolist() == [3, 7, 4, 1, 5, 2, 6, 1]
    assert jigsaw_order(6, 1, 1).tolist() == [1, 2, 3, 4, 5, 6]


def test_each_local_feature_reads_its_group_only():
    module, variables, x, _, _ = jigsaw()
    tokens = jax.random.normal(jax.random.key(1), (2, 16, 8))
    groups = module._groups(tokens)
    order = naive_order(15, 5, 2)
    assert groups.shape == (2 * PARTS, 1 + 3, 8)
    for image in range(2):
        for part in range(PARTS):
            expected = tokens[image, jnp.array([0, *order[3 * part : 3 * part + 3]])]
            np.testing.assert_array_equal(groups[PARTS * image + part], expected)

    # The global branch and the local one have blocks of their own.
    before = outputs(module, train=False)(variables, x)["features"]
    for name, moves in (("global", [True] + [False] * 4), ("local", [False] + [True] * 4)):
        other = changed(variables, f"params/{name}_block/mlp/fc2/kernel", lambda kernel: -2 * kernel)
        after = outputs(module, train=False)(other, x)["features"]
        assert [bool(np.abs(a - b).max() > 1e-3) for a, b in zip(after, before, strict=True)] == moves


# --- sites -----------------------------------------------------------------------------------------------------------


def test_classifiers_are_no_sites_and_the_local_block_is_one_layer_each():
    module, variables, x, _, _ = jigsaw()
    names = [layer.name for layer in find_layers(module, x)]
    assert names[0] == "embedding" and len(names) == 1 + 6 * 3 == len(set(names))
    assert not any("neck" in name for name in names) and "neck/classifier/kernel" in flatten_dict(
        variables["params"], sep="/"
    )
    assert [site.name for site in find_sites(module, x)] == [
        f"{block}/mlp/fc{i}" for block in ("encoderblock_0", "global_block", "local_block") for i in (1, 2)
    ]


@pytest.mark.parametrize("options", [JIGSAW, ICS], ids=["jigsaw", "ics"])
def test_fused_is_explicit(options):
    with jax.enable_x64(True):
        module = tiny(**{**options, "dtype": "float64", "param_dtype": "float64"})
        variables, x = jax.tree_util.tree_map(np.float64, draw(module)), np.float64(images(module))
        sites = assign_times(select_sites(find_layers(module, x), ".*"), timesteps=1000, time_scale=10.0)
        rng, flat = np.random.default_rng(0), {}
        for site in sites:
            flat[(*site.path, "kernel")] = rng.normal(0, 0.3, site.denoiser_shape) / np.sqrt(site.width)
            if site.bias:
                flat[(*site.path, "bias")] = rng.normal(0, 0.3, site.denoiser_shape[:-1])
        denoise, schedule = unflatten_dict(flat), Schedule(beta_end=0.02)
        fused = fuse_exact({"backbone": variables["params"], "denoise": denoise}, sites, schedule)
        run = jax.jit(module.apply)
        before, after = run(variables, x), run({**variables, "params": fused}, x)
        explicit = jax.jit(lambda x: explicit_apply(module, variables, denoise, sites, schedule, x))(x)
        assert np.abs(after - before).max() > 1e-3
        np.testing.assert_allclose(after, explicit, atol=1e-10)


# --- training --------------------------------------------------------------------------------------------------------


def test_remat_changes_no_output():
    module, variables, x, _, feature = jigsaw()
    remat = module.clone(remat=True)
    np.testing.assert_allclose(jax.jit(remat.apply)(variables, x), feature, atol=1e-6)
    blocks = [str(jax.make_jaxpr(net.apply)(variables, x)).count("remat") for net in (module, remat)]
    assert blocks[0] == 0 and blocks[1] >= 3


@pytest.mark.slow
def test_remat_changes_no_gradient_and_gradients_reach_every_parameter():
    module, variables, x, _, _ = jigsaw()

    def loss(params, module):
        found, _ = module.apply(
            {**variables, "params": params}, x, train=True, method="outputs", mutable=["batch_stats"]
        )
        return sum(jnp.sum(jnp.sin(part)) for part in found["features"] + found["logits"])

    gradients, again = (
        flatten_dict(jax.jit(jax.grad(functools.partial(loss, module=net)))(variables["params"]), sep="/")
        for net in (module, module.clone(remat=True))
    )
    for path, gradient in gradients.items():
        np.testing.assert_allclose(again[path], gradient, atol=1e-4)
        # A bias of the keys adds the same to all scores of a query, which the softmax ignores.
        assert np.isfinite(gradient).all() and (np.abs(gradient).max() > 0 or path.endswith("key/bias")), path


def test_drop_path_acts_in_training_only_and_on_each_group_by_itself():
    module, variables, x, _, feature = jigsaw()
    dropping = module.clone(drop_path=0.9)
    np.testing.assert_array_equal(jax.jit(dropping.apply)(variables, x), feature)
    with pytest.raises(InvalidRngError):
        dropping.apply(variables, x, train=True, mutable=["batch_stats"])
    run = outputs(dropping, train=True)
    one, again, other = (run(variables, x, rngs={"dropout": jax.random.key(k)})[0]["features"] for k in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    # With both branches left out a local feature is the norm of the class token, so that such groups agree.
    agree = np.array([[np.array_equal(a[i], b[i]) for a in one[1:] for b in one[1:]] for i in range(3)])
    assert agree.any() and not agree.all() and not np.array_equal(one[0], other[0])


def test_bfloat16_computes_features_in_float32_that_are_close():
    module, variables, x, _, feature = jigsaw()
    narrow = module.clone(dtype=jnp.bfloat16)
    got = jax.jit(narrow.apply)(variables, x)
    assert (
        got.dtype == jnp.float32
        and jax.eval_shape(narrow.clone(feature="after").apply, variables, x).dtype == got.dtype
    )
    assert 0 < np.abs(got - feature).max() < 0.1 * np.abs(feature).max()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stem": "isc"}, 'Unknown stem "isc". Did you mean "ics"'),
        ({"feature": "behind"}, 'Unknown feature "behind"'),
        ({"side_info": -1}, "side_info must be a number of embeddings, 0 for none, got -1"),
        ({"stem": "ics", "patch_stride": 3}, "cannot overlap; got patch_size 4, patch_stride 3"),
        ({"stem": "ics", "patch_size": 3, "image_size": (12, 12)}, "must have an even size"),
        ({"jigsaw": True, "image_size": (4, 12)}, "deals patches into 4 groups, and this model has 1×3"),
        ({"jigsaw": True, "jigsaw_shift": 13}, "one of the 12 patches, counted from 1; got 13"),
        ({"jigsaw": True, "jigsaw_shift": 0}, "one of the 12 patches"),
        ({"jigsaw": True, "jigsaw_groups": 5}, r"divide the 12 patches \(4×3\), or one more; got 5"),
        ({"image_size": (16, 13)}, "Image width 13 is not divisible by the patch width 4"),
        ({"num_heads": 3}, "width 8 is not divisible by num_heads 3"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
    ],
)
def test_options_that_cannot_work_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        tiny(**options)


@pytest.mark.parametrize(
    ("options", "shape", "text"),
    [
        ({}, (1, 16, 16, 3), r"shape \(batch, 16, 12, 3\), got \(1, 16, 16, 3\).*image_size"),
        ({}, (1, 16, 12, 4), "without side_info there is no plane for an index"),
        ({"side_info": 6}, (1, 16, 12, 3), r"\(batch, 16, 12, 4\), got \(1, 16, 12, 3\); with side_info=6 the fourth"),
        ({}, (16, 12, 3), r"got \(16, 12, 3\)"),
    ],
)
def test_images_that_do_not_match_are_refused(options, shape, text):
    with pytest.raises(ConfigError, match=text):
        jax.eval_shape(tiny(**options).init, jax.random.key(0), jnp.zeros(shape))
