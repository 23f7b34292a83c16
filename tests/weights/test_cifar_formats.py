"""Published CIFAR networks in PyTorch's names: layouts checked by running them in NumPy from the foreign arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax import weights
from drep_jax.errors import CheckpointError
from drep_jax.models import create_model

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32) / 4


def resnet_arrays():
    arrays = {"conv1.weight": normal(4, 3, 3, 3), "linear.weight": normal(5, 8), "linear.bias": normal(5)}
    norms = {"bn1": 4}
    for name, inputs, outputs in (("layer1.0", 4, 4), ("layer2.0", 4, 8)):
        arrays[f"{name}.conv1.weight"] = normal(outputs, inputs, 3, 3)
        arrays[f"{name}.conv2.weight"] = normal(outputs, outputs, 3, 3)
        norms |= {f"{name}.bn1": outputs, f"{name}.bn2": outputs}
    for name, width in norms.items():
        arrays |= {f"{name}.weight": 1 + normal(width), f"{name}.bias": normal(width)}
        arrays |= {f"{name}.running_mean": normal(width), f"{name}.running_var": 1 + normal(width) ** 2}
        arrays[f"{name}.num_batches_tracked"] = np.int64(3)
    return arrays


def loaded(path, model, size):
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
    return weights.load_foreign(str(path), model, like).variables


def convolve(x, kernel, stride):
    """PyTorch's 3x3 convolution with padding 1; x is (c, h, w), kernel OIHW."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    height, width = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    out = np.zeros((len(kernel), height, width))
    for i in range(height):
        for j in range(width):
            patch = padded[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
            out[:, i, j] = np.einsum("ocij,cij->o", kernel, patch)
    return out


def test_cifar_resnet_with_padded_shortcut(tmp_path):
    arrays = resnet_arrays()
    np.savez(tmp_path / "net.npz", **arrays)
    model = create_model(
        "resnet",
        num_classes=5,
        image_size=(6, 6),
        stage_sizes=(1, 1),
        block="basic",
        width=4,
        stem="cifar",
        shortcut="pad",
    )
    x = normal(1, 6, 6, 3)
    got = model.apply(loaded(tmp_path / "net.npz", model, (6, 6)), x)[0]

    def norm(y, name):
        parts = ("weight", "bias", "running_mean", "running_var")
        scale, shift, mean, var = (arrays[f"{name}.{part}"][:, None, None] for part in parts)
        return (y - mean) / np.sqrt(var + 1e-5) * scale + shift

    y = np.maximum(norm(convolve(x[0].transpose(2, 0, 1), arrays["conv1.weight"], 1), "bn1"), 0)
    for name, stride in (("layer1.0", 1), ("layer2.0", 2)):
        z = np.maximum(norm(convolve(y, arrays[f"{name}.conv1.weight"], stride), f"{name}.bn1"), 0)
        z = norm(convolve(z, arrays[f"{name}.conv2.weight"], 1), f"{name}.bn2")
        shortcut = y if stride == 1 else np.pad(y[:, ::2, ::2], ((2, 2), (0, 0), (0, 0)))
        y = np.maximum(z + shortcut, 0)
    expected = arrays["linear.weight"] @ y.mean(axis=(1, 2)) + arrays["linear.bias"]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def vit_arrays(width=8, hidden=12, classes=5):
    arrays = {"cls_token": normal(1, 1, width), "pos_embed": normal(1, 5, width)}
    arrays |= {"patch_embed.proj.weight": normal(width, 3, 2, 2), "patch_embed.proj.bias": normal(width)}
    for i in range(2):
        p = f"transformer.layers.{i}."
        arrays |= {
            p + "self_attn.in_proj_weight": normal(3 * width, width),
            p + "self_attn.in_proj_bias": normal(3 * width),
        }
        arrays |= {p + "self_attn.out_proj.weight": normal(width, width), p + "self_attn.out_proj.bias": normal(width)}
        arrays |= {p + "linear1.weight": normal(hidden, width), p + "linear1.bias": normal(hidden)}
        arrays |= {p + "linear2.weight": normal(width, hidden), p + "linear2.bias": normal(width)}
        for n in ("norm1", "norm2"):
            arrays |= {f"{p}{n}.weight": 1 + normal(width), f"{p}{n}.bias": normal(width)}
    arrays |= {"mlp_head.0.weight": 1 + normal(width), "mlp_head.0.bias": normal(width)}
    return arrays | {"mlp_head.1.weight": normal(classes, width), "mlp_head.1.bias": normal(classes)}


def test_post_norm_vit(tmp_path):
    arrays = vit_arrays()
    np.savez(tmp_path / "net.npz", **arrays)
    options = {"patch_size": 2, "width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 12}
    model = create_model(
        "vit", num_classes=5, image_size=(4, 4), post_norm=True, activation="relu", norm_eps=1e-5, **options
    )
    x = normal(1, 4, 4, 3)
    got = model.apply(loaded(tmp_path / "net.npz", model, (4, 4)), x)[0]

    def norm(y, name):
        centered = y - y.mean(-1, keepdims=True)
        return (
            centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * arrays[f"{name}.weight"]
            + arrays[f"{name}.bias"]
        )

    def dense(y, name):
        return y @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]

    blocks = x[0].reshape(2, 2, 2, 2, 3).transpose(0, 2, 4, 1, 3).reshape(4, -1)
    patches = blocks @ arrays["patch_embed.proj.weight"].reshape(8, -1).T + arrays["patch_embed.proj.bias"]
    y = np.concatenate([arrays["cls_token"][0], patches]) + arrays["pos_embed"][0]
    for i in range(2):
        p = f"transformer.layers.{i}."
        q, k, v = np.split(y @ arrays[p + "self_attn.in_proj_weight"].T + arrays[p + "self_attn.in_proj_bias"], 3, -1)
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            scores = np.exp(q[:, h] @ k[:, h].T / 2)
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, h])
        y = norm(y + dense(np.concatenate(heads, -1), p + "self_attn.out_proj"), p + "norm1")
        y = norm(y + dense(np.maximum(dense(y, p + "linear1"), 0), p + "linear2"), p + "norm2")
    np.testing.assert_allclose(got, dense(norm(y[0], "mlp_head.0"), "mlp_head.1"), atol=1e-5)


def test_what_does_not_fit_is_listed(tmp_path):
    arrays = vit_arrays()
    model = create_model(
        "vit", num_classes=5, image_size=(4, 4), patch_size=2, width=8, depth=2, num_heads=2, mlp_dim=12, post_norm=True
    )
    arrays.pop("mlp_head.1.bias")
    arrays["something.else"] = normal(3)
    arrays["pos_embed"] = normal(1, 7, 8)
    np.savez(tmp_path / "net.npz", **arrays)
    with pytest.raises(CheckpointError) as error:
        loaded(tmp_path / "net.npz", model, (4, 4))
    for text in (
        "missing: \n    mlp_head.1.bias (for params/head/bias)",
        "unexpected: \n    something.else",
        "pos_embed is (1, 7, 8) in the file, (1, 5, 8) in the model (params/pos_embedding)",
    ):
        assert text in str(error.value)
    np.savez(tmp_path / "other.npz", w=normal(3))
    with pytest.raises(CheckpointError, match="is in none of the formats known for a ViT"):
        loaded(tmp_path / "other.npz", model, (4, 4))
