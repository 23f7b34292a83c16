"""Networks that are not in the registry: imported by name, adapted to `module(x, train=False)`, refused with a reason."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax import find_sites, fuse_exact, init_denoise
from drep_jax.core.explicit import explicit_apply
from drep_jax.core.schedule import Schedule
from drep_jax.errors import ConfigError
from drep_jax.models import abstract_variables, create_model, depthwise_conv, output_shape, takes_classes
from drep_jax.models.imported import with_train
from tests.command import TINY, call

SOURCE = '''
import flax.linen as nn
from flax import nnx

class Plain(nn.Module):
    """Neither classes nor training mode."""
    width: int = 4
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10, name="head")(nn.relu(nn.Conv(self.width, (3, 3), name="conv")(x)).mean((1, 2)))

class Headed(nn.Module):
    num_classes: int
    image_size: tuple
    width: int = 4
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.width, self.image_size)(x).mean((1, 2))
        return nn.Dense(self.num_classes)(x) if self.num_classes else x

def factory(num_classes, layers=(2, 3)):
    return Headed(num_classes, (2, 2), sum(layers))

made = Plain(width=6)
number = 3

class Two(nn.Module):
    @nn.compact
    def __call__(self, x, y):
        return x

class Nnx(nnx.Module):
    pass

class Fails(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x.reshape(5, 5)

class Refuses(nn.Module):
    width: int = 1
    def __post_init__(self):
        if self.width > 2:
            raise ValueError("too wide")
        super().__post_init__()
'''


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """The module `usernet` in the current directory."""
    (tmp_path / "usernet.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("import os\nraise RuntimeError('broken on purpose')\n")
    (tmp_path / "needs.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("usernet", "broken", "needs"):
        sys.modules.pop(name, None)


def make(name, **options):
    return create_model(name, num_classes=5, image_size=(8, 8), **options)


def test_a_class_a_factory_a_module_and_a_file():
    headed = make("usernet:Headed", width=7)
    assert (headed.num_classes, headed.image_size, headed.width) == (5, (8, 8), 7)
    assert make("usernet:factory", layers=[4, 5]).width == 9
    assert make("usernet:made").width == 6 and make("usernet.py:Plain", width=3).width == 3
    assert make("usernet:Headed") == make("usernet:Headed") and hash(make("usernet:Plain")) == hash(
        make("usernet:Plain")
    )
    assert make("usernet.py:Plain") == make("usernet.py:Plain")
    assert takes_classes("usernet:Headed") and takes_classes("usernet:factory") and not takes_classes("usernet:Plain")
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    plain = make("usernet:Plain")
    assert output_shape(plain, abstract_variables(plain, x), x) == (2, 10)


REFUSED = {
    "nonet:Plain": ["nonet", "current directory", "PYTHONPATH"],
    "usernet:Plane": ["usernet.py", '"Plane"', 'Did you mean "Plain"'],
    "nonet.py:Plain": ["There is no file nonet.py"],
    "usernat.py:Plain": ["There is no file usernat.py", 'Did you mean "usernet.py"'],
    "broken:Net": ["RuntimeError: broken on purpose", "broken.py:2"],
    "needs:Net": ["not_installed_anywhere"],
    "usernet:number": ["of type int"],
    "usernet:Nnx": ["flax.nnx", "flax.linen"],
    "usernet:SOURCE:": ["must be PACKAGE.MODULE:NAME"],
    "usernet:Two": ["also requires y"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_backbone_is_refused_with_the_reason(name):
    with pytest.raises(ConfigError) as error:
        make(name)
    for text in REFUSED[name]:
        assert text in str(error.value), str(error.value)


def test_options_are_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match='has no option "wdth"') as error:
        make("usernet:Plain", wdth=3)
    assert 'Did you mean "width"' in str(error.value) and "It has: width" in str(error.value)
    with pytest.raises(
        ConfigError, match=r"cannot be made with width=3: ValueError: too wide, raised at .*usernet.py:\d+"
    ):
        make("usernet:Refuses", width=3)
    with pytest.raises(ConfigError, match=r"\(1, 8, 8, 3\).*usernet.py:\d+.*image_size"):
        abstract_variables(make("usernet:Fails"), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))


class WithMode(nn.Module):
    """A training mode that is on by default, under any name."""

    @nn.compact
    def __call__(self, x, train=True):
        y = nn.BatchNorm(not train, momentum=0.9, name="bn")(nn.Conv(4, (3, 3), name="conv")(x))
        return y.mean((1, 2))


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic: bool):
        y = nn.BatchNorm(deterministic, momentum=0.9, name="bn")(nn.Conv(4, (3, 3), name="conv")(x))
        return y.mean((1, 2))


class Setup(nn.Module):
    def setup(self):
        self.conv, self.bn = nn.Conv(4, (3, 3)), nn.BatchNorm(momentum=0.9)

    def __call__(self, x, is_training=True):
        return self.bn(self.conv(x), use_running_average=not is_training).mean((1, 2))


@pytest.mark.parametrize(
    ("kind", "evaluating", "training"),
    [
        (WithMode, {"train": False}, {"train": True}),
        (Deterministic, {"deterministic": True}, {"deterministic": False}),
        (Setup, {"is_training": False}, {"is_training": True}),
    ],
)
def test_any_training_mode_becomes_train_with_the_same_tree_and_outputs(kind, evaluating, training):
    x = np.random.default_rng(0).normal(size=(3, 6, 6, 3)).astype(np.float32)
    plain, adapted = kind(), with_train(kind())
    variables = plain.init(jax.random.key(0), x, **evaluating)
    jax.tree.map(np.testing.assert_array_equal, variables, adapted.init(jax.random.key(0), x))
    np.testing.assert_array_equal(plain.apply(variables, x, **evaluating), adapted.apply(variables, x))
    how = {"mutable": ["batch_stats"]}
    expected, updated = plain.apply(variables, x, **training, **how), adapted.apply(variables, x, train=True, **how)
    jax.tree.map(np.testing.assert_array_equal, expected, updated)
    assert np.abs(expected[0] - plain.apply(variables, x, **evaluating)).max() > 0
    assert isinstance(adapted, kind) and with_train(adapted) is adapted
    assert [site.name for site in find_sites(adapted, x)] == ["conv"]


class Separable(nn.Module):
    conv: object = None

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(6, (1, 1), name="expand")(x)
        y = nn.Conv(
            6, (3, 3), padding=((1, 1), (1, 1)), feature_group_count=6, conv_general_dilated=self.conv, name="depthwise"
        )(y)
        return nn.Dense(4, name="head")(nn.relu(y).mean((1, 2)))


def test_the_fast_depthwise_form_computes_the_same_and_is_fused_exactly():
    x = np.random.default_rng(0).normal(size=(2, 7, 5, 3)).astype(np.float32)
    plain, fast = Separable(), Separable(depthwise_conv)
    variables = plain.init(jax.random.key(0), x)
    np.testing.assert_allclose(fast.apply(variables, x), plain.apply(variables, x), rtol=1e-5, atol=1e-6)

    schedule = Schedule()
    sites = find_sites(fast, x)
    depthwise = next(site for site in sites if site.name == "depthwise")
    assert (depthwise.kind, depthwise.width, depthwise.groups) == ("patch", 9, 6)
    rng = np.random.default_rng(1)
    denoise = jax.tree.map(lambda leaf: rng.normal(0, 1, leaf.shape).astype(np.float32), init_denoise(sites))
    fused = fuse_exact({"backbone": variables["params"], "denoise": denoise}, sites, schedule)
    explicit = explicit_apply(fast, variables, denoise, sites, schedule, x)
    got = fast.apply({"params": fused}, x)
    np.testing.assert_allclose(got, explicit, rtol=1e-4, atol=1e-5)
    assert np.abs(got - fast.apply(variables, x)).max() > 1e-4


def test_from_the_command_line(tmp_path):
    where = f"--workdir={tmp_path / 'run'}"
    configuration = f"--config={TINY.removeprefix('--config=').replace('tests/tiny_config.py', 'configs/own_model.py')}"
    quick = (configuration, where, "--config.data.image_size=(8,8)", "--config.backbone.steps=1")
    call("train.py", *quick, "--config.model.name=usernet:Plane").refused('Did you mean "Plain"')
    call("train.py", *quick, "--config.model.name=usernet:Plain", "--config.model.wdth=3").refused('"wdth"', "width")
    call("train.py", *quick, "--config.model.name=usernet:Plain", "--config.modl.width=3").refused("modl", "model")
    call("train.py", *quick, "--config.model.name=usernet:Plain", "--config.model.num_classes=7").refused("10 outputs")
    ended = call(
        "train.py",
        *quick,
        "--config.model.name=usernet:Plain",
        "--config.model.width=3",
        "--config.dry_run=True",
        "--config.dry_run_batch=1",
    )
    assert ended.status == 0, ended.messages
    assert f"{27 * 3 + 3 + 30 + 10} parameters" in ended.output
