"""Which tensors of a checkpoint are the network, and what they are called without wrappers and prefixes."""

import pytest

from drep_jax.errors import CheckpointError
from drep_jax.weights.files.naming import find_state

NET = ("conv.weight", "fc.weight")


def under(*entries, prefix="", names=NET):
    return [(*entries, prefix + name) for name in names]


VIT = [f"encoder.layers.encoder_layer_{i}.mlp.0.weight" for i in range(12)]
VIT += ["class_token", "conv_proj.weight", "encoder.pos_embedding", "heads.head.weight"]

# What is there, which state is asked for, the entries and prefix of what is taken, and what must be said.
CASES = {
    "flat": (under(), None, (), "", []),
    "state_dict": (under("state_dict"), None, ("state_dict",), "", ['state under "state_dict"']),
    "averaged first": (
        under("model") + under("model_ema") + under("optimizer"),
        None,
        ("model_ema",),
        "",
        ['state under "model_ema" (also there: "model")', 'tensors beside it: "optimizer"'],
    ),
    "the plain one by name": (
        under("model") + under("model_ema"),
        "model",
        ("model",),
        "",
        ['state under "model"', 'tensors beside it: "model_ema"'],
    ),
    "wrapped twice": (under("model", "state_dict"), None, ("model", "state_dict"), "", []),
    "wrapped twice, by path": (
        under("a", "b") + under("a", "c"),
        "a/c",
        ("a", "c"),
        "",
        ['state under "a/c"'],
    ),
    "an inner entry by name": (under("a", "b") + under("a", "c"), "c", ("a", "c"), "", []),
    "an entry of another name": (under("my_weights") + under("optimizer"), None, ("my_weights",), "", []),
    "a lone score beside it": ([*under("state_dict"), ("best_acc1",)], None, ("state_dict",), "", []),
    "teacher entry": (under("student") + under("teacher"), None, ("teacher",), "", ['(also there: "student")']),
    "module": (under(prefix="module."), None, (), "module.", ['prefix "module." taken off']),
    "several": (
        under("teacher", prefix="module._orig_mod.backbone."),
        None,
        ("teacher",),
        "module._orig_mod.backbone.",
        ['prefix "module._orig_mod.backbone." taken off'],
    ),
    "prefixes of two states": (
        under(prefix="teacher.backbone.") + under(prefix="student.backbone."),
        None,
        (),
        "teacher.backbone.",
        ['(also there: "student.")'],
    ),
    "a prefix by name": (
        under(prefix="module.encoder_q.") + under(prefix="module.encoder_k."),
        "encoder_q",
        (),
        "module.encoder_q.",
        ['only names that begin with "module.encoder_q." (2 of 4)'],
    ),
    "the student by prefix": (
        under(prefix="teacher.") + under(prefix="student."),
        "student",
        (),
        "student.",
        [],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_network_is_found(case):
    paths, state, entries, prefix, said = CASES[case]
    names, found = find_state("x.pth", paths, state)
    assert names == {name: (*entries, prefix + name) for name in NET}
    for sentence in said:
        assert any(sentence in line for line in found), found
    assert said or not prefix or found


def test_heads_may_stand_beside_a_prefix_and_are_told():
    names, found = find_state("x.pth", [*under(prefix="backbone."), ("head.fc.bias",), ("decode_head.w",)], None)
    assert names == {**{name: (f"backbone.{name}",) for name in NET}, "head.fc.bias": ("head.fc.bias",)} | {
        "decode_head.w": ("decode_head.w",)
    }
    assert 'prefix "backbone." taken off (not there: "head.fc.bias", "decode_head.w")' in found


@pytest.mark.parametrize(
    "names",
    [
        VIT,  # torchvision's own names
        ["model.a", "stem.weight"],
        ["base.fc.weight", "fc.weight"],  # would collide
    ],
)
def test_a_prefix_that_belongs_to_the_network_stays(names):
    assert list(find_state("x.pth", [(name,) for name in names], None)[0]) == names


def test_errors_say_what_is_there():
    both = under("first") + under("second")
    with pytest.raises(CheckpointError, match=r'x.pth holds tensors under "first", "second"; say which'):
        find_state("x.pth", both, None)
    with pytest.raises(CheckpointError, match=r'has no state "secnd". Did you mean "second"?'):
        find_state("x.pth", both, "secnd")
    with pytest.raises(CheckpointError, match=r"x.pth holds no tensors"):
        find_state("x.pth", [], None)
