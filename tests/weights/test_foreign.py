"""Foreign checkpoints: every tensor accounted for, the same file back, nothing written that does not read back."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from drep_jax import weights
from drep_jax.errors import CheckpointError, ConfigError, NonFiniteError
from drep_jax.weights import files, formats
from drep_jax.weights.translation import Format, Rule, account, find_pieces, put_back, reshaped
from tests.command import same_bits


class Small(nn.Module):
    """One of each: convolution, normalization with statistics, packed projections, a reshaped one, a vector of its own."""

    classes: int = 3

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 2), name="stem")(x)
        x = nn.BatchNorm(not train, name="norm")(x).mean((1, 2))
        x = x + self.param("token", nn.initializers.normal(), (1, 4))
        q, k = nn.Dense(4, name="query")(x), nn.Dense(4, name="key")(x)
        return nn.Dense(self.classes, name="head")(nn.Dense(6, use_bias=False, name="wide")(q * k))


class Other(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(2, name="only")(x.mean((1, 2)))


def small_rules(module):
    return (
        Rule("token", "tokens.first"),
        Rule("query", "attn.qk", part=(0, 2)),
        Rule("key", "attn.qk", part=(1, 2)),
        Rule("wide/kernel", "wide.w", layout=reshaped((4, 6), (4, 2, 3))),
        Rule("(stem|norm|head)", r"\1"),
    )


SMALL = Format("small", Small, (r"attn\.qk\.weight", r"stem\..*"), small_rules, (r".*num_batches_tracked",))
OTHER = Format("other", Other, (r"only\.weight",), lambda module: (Rule("only", "only"),), suffix=".npz")
X = np.random.default_rng(0).normal(size=(2, 5, 6, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", (SMALL, OTHER))


@pytest.fixture(scope="module")
def variables():
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(Small().init, jax.random.key(0), X)
    return jax.tree_util.tree_map(lambda leaf: rng.uniform(0.2, 1, leaf.shape).astype(np.float32), dict(shapes))


def theirs(variables, dtype=np.float32):
    """The foreign tensors by hand, the way PyTorch would hold them."""
    p, s = variables["params"], variables["batch_stats"]
    return {
        "stem.weight": p["stem"]["kernel"].transpose(3, 2, 0, 1).astype(dtype),
        "stem.bias": p["stem"]["bias"].astype(dtype),
        "norm.weight": p["norm"]["scale"].astype(dtype),
        "norm.bias": p["norm"]["bias"].astype(dtype),
        "norm.running_mean": s["norm"]["mean"].astype(dtype),
        "norm.running_var": s["norm"]["var"].astype(dtype),
        "norm.num_batches_tracked": np.int64(7),
        "tokens.first": p["token"].astype(dtype),
        "attn.qk.weight": np.concatenate([p["query"]["kernel"].T, p["key"]["kernel"].T]).astype(dtype),
        "attn.qk.bias": np.concatenate([p["query"]["bias"], p["key"]["bias"]]).astype(dtype),
        "wide.w": p["wide"]["kernel"].reshape(4, 2, 3).astype(dtype),
        "head.weight": p["head"]["kernel"].T.astype(dtype),
        "head.bias": p["head"]["bias"].astype(dtype),
    }


def written(path, tensors):
    files.create(str(path), {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, {})
    return str(path)


def unmarked(path, tensors):
    """A file as others write it, without our mark."""
    import safetensors.numpy

    safetensors.numpy.save_file({n: np.asarray(t, order="C") for n, t in tensors.items()}, str(path))
    return str(path)


def load(path, like, module=None, **options):
    return weights.load_foreign(path, module or Small(), like, **options)


def refused(path, like, *parts, error=CheckpointError, **options):
    with pytest.raises(error) as caught:
        load(path, like, **options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_every_leaf_is_found_where_it_lies(variables, tmp_path):
    found = load(unmarked(tmp_path / "a.safetensors", theirs(variables)), variables)
    assert same_bits(found.variables, variables) and found.format.name == "small"
    assert "format small" in found.notes[0] and "safetensors" in found.notes[0]


def test_a_fused_network_goes_back_into_the_same_file(variables, tmp_path):
    path = unmarked(tmp_path / "a.safetensors", theirs(variables))
    found = load(path, variables)
    after = jax.tree_util.tree_map(np.copy, variables)
    after["params"]["key"]["kernel"] += 0.25
    after["params"]["stem"]["kernel"] *= 2
    after["params"]["wide"]["kernel"] -= 1
    replaced = weights.write_back(found, str(tmp_path / "b.safetensors"), variables, after, {"rule": "ddpm"})
    assert replaced == ("attn.qk.weight", "stem.weight", "wide.w")
    old, new = files.read(path), files.read(str(tmp_path / "b.safetensors"))
    expected = {**theirs(after), "norm.num_batches_tracked": np.asarray(7)}
    assert list(old.tensors) == list(new.tensors)
    for name, tensor in new.tensors.items():
        assert tensor.dtype == old.tensors[name].dtype and np.array_equal(tensor, expected[name]), name
    assert new.fused == {"rule": "ddpm"}
    refused(str(tmp_path / "b.safetensors"), variables, "already fused", "ddpm")
    assert same_bits(load(str(tmp_path / "b.safetensors"), variables, allow_fused=True).variables, after)


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors"])
def test_a_new_file_reads_back_to_the_bit(suffix, variables, tmp_path, monkeypatch):
    import dataclasses

    monkeypatch.setattr(formats, "FORMATS", (dataclasses.replace(SMALL, suffix=suffix, rules=small_rules),))
    path = weights.write_new(Small(), variables, "small", str(tmp_path / "new"), {"rule": "paper"})
    assert path.endswith(suffix)
    assert same_bits(load(path, variables, allow_fused=True).variables, variables)


def test_narrow_types_are_read_and_said_and_kept(variables, tmp_path):
    halves = theirs(variables, ml_dtypes.bfloat16)
    path = unmarked(tmp_path / "half.safetensors", halves)
    found = load(path, variables)
    assert found.rounds and any("bfloat16" in note for note in found.notes)
    assert found.variables["params"]["token"].dtype == np.float32
    after = jax.tree_util.tree_map(lambda leaf: leaf + np.float32(0.123), found.variables)
    stored = weights.stored_tree(found, after)
    assert stored["params"]["head"]["kernel"].dtype == ml_dtypes.bfloat16
    weights.write_back(found, str(tmp_path / "b.safetensors"), found.variables, stored, {})
    again = files.read(str(tmp_path / "b.safetensors")).tensors
    assert again["head.bias"].dtype == ml_dtypes.bfloat16
    assert np.array_equal(again["head.bias"], stored["params"]["head"]["bias"])
    assert not load(unmarked(tmp_path / "f.safetensors", theirs(variables)), variables).rounds


def test_all_that_does_not_fit_is_listed_side_by_side(variables, tmp_path):
    tensors = theirs(variables)
    del tensors["norm.running_var"]
    tensors["extra.weight"] = np.ones(3, np.float32)
    tensors["head.weight"] = np.ones((5, 6), np.float32)
    tensors["attn.qk.bias"] = np.ones(7, np.float32)
    path = unmarked(tmp_path / "a.safetensors", tensors)
    refused(
        path,
        variables,
        "missing: \n    norm.running_var (for batch_stats/norm/var)",
        "unexpected: \n    extra.weight",
        "head.weight is (5, 6) in the file, (3, 6) in the model",
        "attn.qk.bias is (7,) in the file, (8,) in the model",
    )


def test_what_may_differ_can_be_allowed_by_either_name(variables, tmp_path):
    tensors = theirs(variables)
    del tensors["head.bias"]
    tensors["extra.weight"] = np.ones(3, np.float32)
    tensors["head.weight"] = np.ones((5, 6), np.float32)
    path = unmarked(tmp_path / "a.safetensors", tensors)
    allow = (r"params/head/.*", r"extra\..*")
    fresh = jax.tree_util.tree_map(lambda leaf: np.full_like(leaf, 9), variables)
    found = load(path, variables, allow=allow, fresh=lambda: fresh)
    assert same_bits(found.variables["params"]["head"], fresh["params"]["head"])
    assert same_bits(found.variables["params"]["stem"], variables["params"]["stem"])
    text = "\n".join(found.notes)
    assert "left as initialized: params/head/bias; params/head/kernel" in text and "extra.weight" in text
    refused(path, variables, "unexpected: \n    extra.weight", allow=(r"head\..*",), fresh=lambda: fresh)
    after = jax.tree_util.tree_map(lambda leaf: leaf + 1, found.variables)
    with pytest.raises(CheckpointError, match="has no such tensor"):
        weights.write_back(found, str(tmp_path / "b.safetensors"), found.variables, after, {})
    assert not (tmp_path / "b.safetensors").exists()


def test_the_wrong_family_or_format_is_named(variables, tmp_path):
    path = unmarked(tmp_path / "a.safetensors", {"only.weight": np.ones((2, 3), np.float32)})
    refused(path, variables, "formats known for a Small (small)", "holds a Other in the format other")
    path = unmarked(tmp_path / "b.safetensors", {"what.ever": np.ones((2, 3), np.float32)})
    refused(path, variables, "Its first names are: what.ever")
    refused(path, variables, 'no format "smal"', "small", error=ConfigError, format_name="smal")
    refused(path, variables, "missing", "stem.weight", format_name="small")


def test_nan_is_refused(variables, tmp_path):
    tensors = theirs(variables)
    tensors["tokens.first"] = tensors["tokens.first"] * np.nan
    path = unmarked(tmp_path / "a.safetensors", tensors)
    refused(path, variables, "params/token", error=NonFiniteError)


def test_leaves_tied_to_one_tensor_must_agree():
    tied = Format("tied", Other, (), lambda module: (Rule("(a|b)/kernel", "shared"),))
    shapes = {"params/a/kernel": (2, 3), "params/b/kernel": (2, 3)}
    pieces = find_pieces(tied, Other(), shapes)
    a = np.arange(6.0).reshape(2, 3)
    same = {"params/a/kernel": a, "params/b/kernel": a.copy()}
    assert np.array_equal(put_back(pieces, same)["shared"], a.T)
    with pytest.raises(CheckpointError, match=r"params/a/kernel and params/b/kernel are one tensor.*\(shared\)"):
        put_back(pieces, {**same, "params/b/kernel": a + 1})


def test_parts_must_be_complete_in_a_new_file(variables):
    shapes = {"params/query/bias": (4,), "params/key/bias": (4,)}
    pieces = find_pieces(SMALL, Small(), shapes)
    with pytest.raises(CheckpointError, match=r"1 of the 2 parts of attn\.qk\.bias"):
        put_back(pieces, {"params/key/bias": np.ones(4)})
    kept = put_back(pieces, {"params/key/bias": np.ones(4)}, {"attn.qk.bias": np.zeros(8)})
    assert np.array_equal(kept["attn.qk.bias"], [0, 0, 0, 0, 1, 1, 1, 1])


def test_a_parameter_that_the_format_has_no_place_for_is_named():
    with pytest.raises(CheckpointError, match=r'"small" cannot express.*params/gate/kernel'):
        find_pieces(SMALL, Small(), {"params/gate/kernel": (2, 2), "params/token": (1, 4)})


def test_accounting_takes_each_leaf_once():
    shapes = {"params/query/kernel": (4, 4), "params/key/kernel": (4, 4)}
    pieces = find_pieces(SMALL, Small(), shapes)
    packed = np.arange(32.0).reshape(8, 4)
    found = account(pieces, shapes, {"attn.qk.weight": packed, "loose": packed}, ())
    assert np.array_equal(found.arrays["params/query/kernel"], packed[:4].T)
    assert np.array_equal(found.arrays["params/key/kernel"], packed[4:].T)
    assert found.unexpected == ("loose",) and not found.missing and not found.shaped
    jnp.asarray(found.arrays["params/key/kernel"])
