"""Random modules for property tests, and a straightforward NumPy version of a denoised layer as the oracle."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.core.denoisers import init_denoise

PADDINGS = ("SAME", "VALID", "CIRCULAR", "REFLECT", ((1, 2), (0, 1)), ((2, 2), (2, 2)))


@dataclasses.dataclass(frozen=True)
class Conv:
    """One 2-D convolution; `groups` 0 means depthwise."""

    outputs: int = 4
    size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: object = "SAME"
    groups: int = 1
    kernel_dilation: int = 1
    input_dilation: int = 1
    bias: bool = True

    def module(self, channels: int, name: str) -> nn.Conv:
        groups = self.groups or channels
        return nn.Conv(
            features=self.outputs * groups,
            kernel_size=self.size,
            strides=self.strides,
            padding=self.padding,
            feature_group_count=groups,
            kernel_dilation=self.kernel_dilation,
            input_dilation=self.input_dilation,
            use_bias=self.bias,
            name=name,
        )


@dataclasses.dataclass(frozen=True)
class Dense:
    outputs: int = 5
    bias: bool = True


@dataclasses.dataclass(frozen=True)
class Scan:
    """A residual block of two Dense layers, stacked by nn.scan."""

    length: int = 3
    hidden: int = 7
    bias: bool = True
    remat: bool = False


@dataclasses.dataclass(frozen=True)
class General:
    """A DenseGeneral that reads both axes of each token's (rows, channels)."""

    outputs: tuple[int, ...] = (2, 3)
    bias: bool = True


@dataclasses.dataclass(frozen=True)
class Twice:
    """One square Dense layer that is called twice."""

    bias: bool = True


class Block(nn.Module):
    hidden: int
    bias: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(self.hidden, use_bias=self.bias, name="fc1")(x)
        return x + nn.Dense(x.shape[-1], name="fc2")(jnp.tanh(y)), None


class Inner(nn.Module):
    """The smallest body of a scan."""

    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(x.shape[-1], name="d")(x), None


class Net(nn.Module):
    """Convolutions on an image, then Dense and scanned blocks on its pixels, then a head on their mean."""

    convs: tuple = ()
    tail: tuple = ()
    attention: bool = False

    @nn.compact
    def __call__(self, x):
        for i, conv in enumerate(self.convs):
            x = jnp.tanh(conv.module(x.shape[-1], f"conv{i}")(x))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for i, part in enumerate(self.tail):
            if isinstance(part, Dense):
                x = jnp.tanh(nn.Dense(part.outputs, use_bias=part.bias, name=f"dense{i}")(x))
            elif isinstance(part, General):
                pairs = jnp.stack([x, jnp.cos(x)], axis=-2)  # (batch, tokens, 2, channels)
                layer = nn.DenseGeneral(part.outputs, axis=(-2, -1), use_bias=part.bias, name=f"general{i}")
                x = jnp.tanh(layer(pairs)).reshape(*x.shape[:2], -1)
            elif isinstance(part, Twice):
                layer = nn.Dense(x.shape[-1], use_bias=part.bias, name=f"twice{i}")
                x = layer(jnp.tanh(layer(x)))
            else:
                block = nn.remat(Block) if part.remat else Block
                axes = {"params": 0, "denoise": 0}
                scan = nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=part.length)
                x, _ = scan(part.hidden, part.bias, name=f"scan{i}")(x, None)
        if self.attention:
            x = x + nn.MultiHeadDotProductAttention(1, name="attention")(x, x)
        return nn.Dense(3, name="head")(x.mean(1))


convs = st.builds(
    Conv,
    outputs=st.integers(1, 3),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.sampled_from(PADDINGS),
    groups=st.sampled_from((1, 1, 0)),
    kernel_dilation=st.sampled_from((1, 1, 2)),
    input_dilation=st.sampled_from((1, 1, 2)),
    bias=st.booleans(),
).map(lambda c: dataclasses.replace(c, input_dilation=1) if isinstance(c.padding, str) else c)  # JAX has no other
tails = st.one_of(
    st.builds(Dense, outputs=st.integers(1, 7), bias=st.booleans()),
    st.builds(General, outputs=st.sampled_from(((3,), (2, 3), (1, 5))), bias=st.booleans()),
    st.builds(Twice, bias=st.booleans()),
    st.builds(Scan, length=st.integers(2, 3), hidden=st.integers(1, 5), bias=st.booleans(), remat=st.booleans()),
)


@st.composite
def nets(draw):
    """A random network and a batch for it; at least 7×7 pixels so that no window is larger than what it reads."""
    net = Net(
        tuple(draw(st.lists(convs, min_size=0, max_size=1))),
        tuple(draw(st.lists(tails, max_size=2))),
        draw(st.booleans()),
    )
    x = normal(draw(st.integers(0, 99)), (2, 8, 7, draw(st.integers(1, 4))))
    return net, x


def normal(seed, shape, dtype=np.float32):
    """Drawn by NumPy and put, not converted: every new shape would cost JAX a compilation."""
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def randomize(tree, seed=0, size=0.3):
    """Adds noise to every leaf, so that biases and denoisers are not trivially zero."""
    random = np.random.default_rng(1000 + seed)

    def add(leaf):
        leaf = np.asarray(leaf)
        return jax.device_put((leaf + size * random.normal(size=leaf.shape)).astype(leaf.dtype))

    return jax.tree_util.tree_map(add, tree)


def setup(net, x, sites, seed=0):
    """Returns random variables of `net` and random denoisers, with biases where they are allowed."""
    inputs = x if isinstance(x, tuple) else (x,)
    variables = zeros(jax.eval_shape(net.init, jax.random.key(0), *inputs))
    return randomize(variables, seed, 0.5), randomize(zeros(jax.eval_shape(lambda: init_denoise(sites))), seed + 1, 0.2)


@functools.partial(jax.jit, static_argnums=0)
def outputs(module, variables, *inputs):
    """What `module` computes, in one program instead of one for each operation."""
    return module.apply(variables, *inputs)


def zeros(shapes):
    return jax.tree_util.tree_map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def float64(tree):
    return jax.tree_util.tree_map(lambda leaf: np.asarray(leaf, np.float64), tree)


# ---- oracle -----------------------------------------------------------------------------------------------------------


def denoise_vector(v, kernel, bias, triples, z=None):
    for j, (scale, gain, sigma) in enumerate(triples):
        v = scale * v - gain * (kernel.T @ v + (0 if bias is None else bias)) + (0 if z is None else sigma * z[j])
    return v


def pad_sides(conv: Conv, height: int, width: int):
    """Low and high padding of each side, and NumPy's mode."""
    dilated = [(n - 1) * conv.input_dilation + 1 for n in (height, width)]
    reach = [(k - 1) * conv.kernel_dilation + 1 for k in conv.size]
    if conv.padding == "VALID":
        return [(0, 0), (0, 0)], "constant"
    if conv.padding in ("CIRCULAR", "REFLECT"):
        return [((r - 1) // 2, r // 2) for r in reach], {"CIRCULAR": "wrap", "REFLECT": "reflect"}[conv.padding]
    if conv.padding == "SAME":
        sides = []
        for n, r, s in zip(dilated, reach, conv.strides, strict=True):
            total = max((-(-n // s) - 1) * s + r - n, 0)
            sides.append((total // 2, total - total // 2))
        return sides, "constant"
    return list(conv.padding), "constant"


def conv_oracle(conv: Conv, x, kernel, bias, denoise=None):
    """Convolution by loops over windows; `denoise(window of a group (C, kh, kw), group)` is applied to each window."""
    batch, height, width, channels = x.shape
    groups = conv.groups or channels
    sides, mode = pad_sides(conv, height, width)
    if mode != "constant":
        x = np.pad(x, [(0, 0), *sides, (0, 0)], mode=mode)
        sides = [(0, 0), (0, 0)]
    if conv.input_dilation > 1:
        wide = np.zeros((batch, *((n - 1) * conv.input_dilation + 1 for n in x.shape[1:3]), channels))
        wide[:, :: conv.input_dilation, :: conv.input_dilation] = x
        x = wide
    x = np.pad(x, [(0, 0), *sides, (0, 0)])
    (kh, kw), d = conv.size, conv.kernel_dilation
    rows = range(0, x.shape[1] - (kh - 1) * d, conv.strides[0])
    cols = range(0, x.shape[2] - (kw - 1) * d, conv.strides[1])
    out = np.zeros((batch, len(rows), len(cols), kernel.shape[-1]))
    inputs, outputs = channels // groups, kernel.shape[-1] // groups
    for b, (i, r), (j, c), g in itertools.product(range(batch), enumerate(rows), enumerate(cols), range(groups)):
        window = x[b, r : r + (kh - 1) * d + 1 : d, c : c + (kw - 1) * d + 1 : d, g * inputs : (g + 1) * inputs]
        window = window.transpose(2, 0, 1)
        if denoise is not None:
            window = denoise(window, g)
        weights = kernel[:, :, :, g * outputs : (g + 1) * outputs]
        out[b, i, j, g * outputs : (g + 1) * outputs] = np.einsum("chw,hwco->o", window, weights)
    return out if bias is None else out + bias
