"""Name tables of a user's own, files that need none, and both directions in Python."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from drep_jax import weights
from drep_jax.errors import CheckpointError, ConfigError
from drep_jax.weights import Format, Rule, files

SIZE = (6, 6)
TABLE = """
from drep_jax.weights import Format, Rule
FORMAT = Format(name="net", rules=(Rule("conv", "stem.0"), Rule("bn", "stem.1"), Rule("head", "fc")))
"""


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(True, name="bn")(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.fixture
def variables():
    shapes = jax.eval_shape(Net().init, jax.random.key(0), np.zeros((1, *SIZE, 3), np.float32))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "names.py"
    path.write_text(TABLE)
    return str(path)


def same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_there_and_back_in_every_kind_of_file(suffix, variables, table, tmp_path):
    stored = {
        "stem.0.weight": variables["params"]["conv"]["kernel"].transpose(3, 2, 0, 1),
        "stem.0.bias": variables["params"]["conv"]["bias"],
        "stem.1.weight": variables["params"]["bn"]["scale"],
        "stem.1.bias": variables["params"]["bn"]["bias"],
        "stem.1.running_mean": variables["batch_stats"]["bn"]["mean"],
        "stem.1.running_var": variables["batch_stats"]["bn"]["var"],
        "fc.weight": variables["params"]["head"]["kernel"].T,
        "fc.bias": variables["params"]["head"]["bias"],
    }
    path = str(tmp_path / f"net{suffix}")
    files.create(path, stored, {})
    checkpoint = weights.read(path, Net(), SIZE, names=table)
    same(checkpoint.variables, variables)
    changed = {
        **variables,
        "params": {**variables["params"], "head": jax.tree.map(lambda a: a + 1, variables["params"]["head"])},
    }
    made = weights.write(str(tmp_path / f"new{suffix}"), changed, checkpoint, fusion={"by": "a test"})
    written = files.read(made)
    assert list(written.tensors) == list(files.read(path).tensors) and written.fused == {"by": "a test"}
    same(
        {n: t for n, t in written.tensors.items() if n[:2] != "fc"}, {n: t for n, t in stored.items() if n[:2] != "fc"}
    )
    np.testing.assert_array_equal(written.tensors["fc.weight"], stored["fc.weight"] + 1)
    with pytest.raises(CheckpointError, match="already fused"):
        weights.read(made, Net(), SIZE, names=table)
    same(weights.read(made, Net(), SIZE, names=table, allow_fused=True).variables, changed)


@pytest.mark.parametrize("name", ["flax", "pytorch"])
@pytest.mark.parametrize("separator", ["/", "."])
def test_a_file_with_the_modules_own_names_needs_no_table(name, separator, variables, tmp_path):
    arrays = {path: np.asarray(leaf) for path, leaf in weights.names_of(variables).items()}
    if name == "pytorch":
        path = weights.write_new(Net(), variables, "pytorch", str(tmp_path / "net"), {})
        assert set(files.read(path).tensors) >= {"conv.weight", "bn.running_var", "head.bias"}
    else:
        path = str(tmp_path / "net.npz")
        np.savez(path, **{n.removeprefix("params/").replace("/", separator): a for n, a in arrays.items()})
    checkpoint = weights.read(path, Net(), SIZE)
    assert checkpoint.format.name == name
    same(checkpoint.variables, variables)


def test_what_is_left_over_and_missing_is_listed(variables, table, tmp_path):
    path = str(tmp_path / "net.npz")
    np.savez(path, **{"stem.0.weight": np.zeros((4, 3, 3, 3), np.float32), "stem.9.weight": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError) as error:
        weights.read(path, Net(), SIZE, names=table)
    for text in ("format net", "fc.weight (for params/head/kernel)", "unexpected", "stem.9.weight"):
        assert text in str(error.value)
    with pytest.raises(CheckpointError, match="init_names") as error:
        weights.read(path, Net(), SIZE)
    assert "params/conv/bias" in str(error.value) and "stem.9.weight" in str(error.value)


def test_a_rule_is_a_template_or_a_function_and_the_first_that_matches_counts(variables, tmp_path):
    rules = (
        Rule("(conv|bn)", lambda match: f"layers.{['conv', 'bn'].index(match[1])}"),
        Rule("head/kernel", "w", layout=weights.SAME),
        Rule(r"(\w+)/(\w+)", r"\1_\2"),
    )
    fmt = Format("mine", rules=rules, suffix=".npz")
    path = weights.write(str(tmp_path / "net.npz"), variables, fmt, Net())
    assert set(np.load(path)) >= {"layers.0.weight", "layers.1.running_mean", "w", "head_bias"}
    same(weights.read(path, Net(), SIZE, names=fmt).variables, variables)
    with pytest.raises(CheckpointError, match="needs the module"):
        weights.write(path, variables, fmt)
    with pytest.raises(CheckpointError, match=r'end with "\.npz"'):
        weights.write(str(tmp_path / "net.pth"), variables, fmt, Net())


BAD = {
    "": "defines neither",
    TABLE + "FORMATS = [FORMAT]": "defines both",
    "FORMAT = {'conv': 'stem.0'}": "is a dict",
    "FORMATS = []": "must be a list",
    "from drep_jax.weights import Format\nFORMAT = Format('net')": "at least one",
    "from drep_jax.weights import Format, Rule\nFORMAT = Format('net', rules=(Rule('(', 'x'),))": "no regular expression",
    "import nothing_of_that_name": "nothing_of_that_name",
    "FORMAT = 1 / 0": "ZeroDivisionError",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_table_is_refused_with_the_reason(text, tmp_path):
    path = tmp_path / "names.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=BAD[text]):
        weights.read_table(str(path))


def test_of_several_formats_the_marks_decide(variables, tmp_path):
    rules = (Rule("conv", "a"), Rule("bn", "b"), Rule("head", "c"))
    one = Format("one", rules=rules, marks=(r"a\.weight",), suffix=".npz")
    two = Format("two", rules=(Rule("conv", "d"), *rules[1:]), marks=(r"d\.weight",), suffix=".npz")
    path = weights.write(str(tmp_path / "net.npz"), variables, two, Net())
    assert weights.read(path, Net(), SIZE, names=[one, two]).format.name == "two"
    with pytest.raises(ConfigError, match='no format "three"'):
        weights.read(path, Net(), SIZE, names=[one, two], format_name="three")
