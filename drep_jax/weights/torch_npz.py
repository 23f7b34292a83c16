"""PyTorch state dicts kept as `.npz` (names and layouts of PyTorch): CIFAR ResNets, and ViTs of nn.TransformerEncoder.

A dense weight is (out, in) there and (in, out) here; a convolution's is (out, in, h, w) there and (h, w, in, out) here.
"""

import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from drep_jax.errors import CheckpointError

Arrays = Mapping[str, np.ndarray]

_NORM = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}


def _kernel(weight: np.ndarray) -> np.ndarray:
    return weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0)


def _resnet(arrays: Arrays) -> dict[str, np.ndarray]:
    """layer1.0.conv2.weight ↦ params/layer1_0/conv2/kernel, layer1.0.bn2.running_var ↦ batch_stats/…/var, linear ↦ fc."""
    found = {}
    for name, value in arrays.items():
        *where, leaf = re.sub(r"^(layer\d+)\.(\d+)", r"\1_\2", name).split(".")
        path = "/".join("fc" if part == "linear" else part for part in where)
        if leaf == "num_batches_tracked":
            continue
        if where and where[-1].startswith("bn"):
            collection, new = _NORM.get(leaf, ("params", leaf))
            found[f"{collection}/{path}/{new}"] = value
        else:
            found[f"params/{path}/{'kernel' if leaf == 'weight' else leaf}"] = (
                _kernel(value) if leaf == "weight" else value
            )
    return found


_VIT = {
    "cls_token": "cls",
    "pos_embed": "pos_embedding",
    "patch_embed.proj": "embedding",
    "self_attn.out_proj": "attn/out",
    "linear1": "mlp/fc1",
    "linear2": "mlp/fc2",
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp_head.0": "norm",
    "mlp_head.1": "head",
}


def _vit(arrays: Arrays) -> dict[str, np.ndarray]:
    """transformer.layers.3.linear1.weight ↦ params/encoderblock_3/mlp/fc1/kernel; the packed q, k, v are taken apart."""
    found = {}
    for name, value in arrays.items():
        block, rest = "", name
        if match := re.match(r"transformer\.layers\.(\d+)\.(.+)", name):
            block, rest = f"encoderblock_{match[1]}/", match[2]
        if match := re.fullmatch(r"self_attn\.in_proj_(weight|bias)", rest):
            for part, piece in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                leaf, array = ("kernel", piece.T) if match[1] == "weight" else ("bias", piece)
                found[f"params/{block}attn/{part}/{leaf}"] = array
            continue
        if rest in _VIT:  # a parameter of the network itself
            found[f"params/{_VIT[rest]}"] = value
            continue
        module, _, leaf = rest.rpartition(".")
        path = f"params/{block}{_VIT.get(module, module.replace('.', '/'))}"
        if leaf == "weight" and value.ndim == 1:
            found[f"{path}/scale"] = value
        else:
            found[f"{path}/{'kernel' if leaf == 'weight' else leaf}"] = _kernel(value) if leaf == "weight" else value
    return found


# A format is a name that its files hold, and the translation; another one is a line here.
FORMATS: dict[str, Callable[[Arrays], dict[str, np.ndarray]]] = {
    "transformer.layers.0.self_attn.in_proj_weight": _vit,
    "layer1.0.conv1.weight": _resnet,
}


def read_torch_npz(path: str) -> dict[str, np.ndarray]:
    """Returns {name in this project: array} of a PyTorch state dict in an `.npz` file; no pickle is executed.

    Raises:
      CheckpointError: if the file is damaged, or of no format known here.
    """
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read as an .npz of arrays: {error}.") from error
    for mark, translate in FORMATS.items():
        if mark in arrays:
            return translate(arrays)
    raise CheckpointError(
        f"{path} holds none of the known kinds of weights (a CIFAR ResNet, or a ViT of nn.TransformerEncoder, in PyTorch's "
        f"names); its first names are: {', '.join(sorted(arrays)[:5]) or 'none'}."
    )
