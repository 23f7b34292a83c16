"""What the inputs reach, through every kind of nested program."""

import jax
import jax.numpy as jnp
import pytest

from drep_jax.core.jaxpr import independent, mark


def carry(w, x):
    """Three rounds: the first carry gets x in round one, the second gets the first's in round two."""

    def body(state, _):
        first, second, third = state
        seen = mark("first", first), mark("second", second), mark("third", third)
        return (seen[0] + x, seen[0], seen[2] + w), None

    return jax.lax.scan(body, (w, w, w), None, length=3)[0]


def branch(w, x):
    return jax.lax.cond(w > 0, lambda w, x: mark("both", w + x), lambda w, x: mark("one", w), w, x)


def loop(w, x):
    return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (mark("fixed", s[0]) + 1, s[1] + x), (w, x))


def derivative(w, x):
    inner = jax.custom_jvp(lambda a: mark("inner", a) ** 2)
    inner.defjvp(lambda p, t: (p[0] ** 2, 2 * p[0] * t[0]))
    return inner(w) + jax.grad(lambda a: jnp.sin(a) * mark("by_x", a * x))(w)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda w, x: mark("a", w * 2) + mark("b", x + w), {"a"}),
        (lambda w, x: mark("twice", w) + mark("twice", x), set()),
        (lambda w, x: mark("a", jnp.arange(3.0)).sum() + x, {"a"}),
        (lambda w, x: jax.jit(lambda p, q: (mark("a", p), mark("b", q)))(w, x), {"a"}),
        (lambda w, x: mark("after", jax.jit(lambda p, q: (q, p))(w, x)[1]), {"after"}),
        (lambda w, x: jax.checkpoint(lambda p, q: mark("a", p) + mark("b", q))(w, x), {"a"}),
        (lambda w, x: jax.vmap(lambda p: mark("a", p) + mark("b", p * x))(jnp.stack([w, w])), {"a"}),
        (carry, {"third"}),
        (derivative, {"inner"}),
        # Not followed: whatever stands inside a branch or a while loop that an input enters counts as dependent.
        (branch, set()),
        (loop, set()),
    ],
    ids=["plain", "twice", "constant", "jit", "jit result", "remat", "vmap", "scan", "jvp", "cond", "while"],
)
def test_only_what_no_input_reaches_is_independent(function, expected):
    value = jax.ShapeDtypeStruct((), jnp.float32)
    assert independent(function, value, value) == expected
