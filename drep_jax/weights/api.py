"""From a `.pth` or `.safetensors` file to the variables of a Linen module, and back to a file of the same kind."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from drep_jax.errors import CheckpointError
from drep_jax.typing import Tree
from drep_jax.weights.foreign import Foreign, load_foreign
from drep_jax.weights.translation import Format
from drep_jax.weights.writing import write_back, write_new


def read(
    path: str,
    module: nn.Module,
    image_size: tuple[int, int],
    *,
    names: str | Format | Sequence[Format] = "",
    channels: int = 3,
    **options: Any,
) -> Foreign:
    """Reads a checkpoint of PyTorch or JAX into the variables of a Linen module.

    >>> import os, tempfile
    >>> import numpy as np
    >>> from drep_jax.weights import Format, Rule, read, write
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.Dense(2, name="head")(x.mean((1, 2)))
    >>> directory = tempfile.TemporaryDirectory()
    >>> stored = {"fc.weight": np.ones((2, 3), np.float32), "fc.bias": np.zeros(2, np.float32)}
    >>> path = os.path.join(directory.name, "net.npz")
    >>> np.savez(path, **stored)
    >>> checkpoint = read(path, Net(), (8, 8), names=Format("net", rules=(Rule("head", "fc"),)))
    >>> checkpoint.variables["params"]["head"]["kernel"].shape
    (3, 2)
    >>> doubled = jax.tree.map(lambda leaf: 2 * leaf, checkpoint.variables)
    >>> path = write(os.path.join(directory.name, "doubled.npz"), doubled, checkpoint)
    >>> float(np.load(path)["fc.weight"].sum())
    12.0
    >>> directory.cleanup()

    Args:
      path: a `.pth` (zip or legacy), `.safetensors` or `.npz` file.
      module: called as `module(images)`.
      image_size: (height, width) in pixels that its variables are made for.
      names: a name table: a format, several, or the path of a Python file that defines them
        (docs/own_model.md); "" for the built-in formats, and for files with the module's own names.
      channels: of the images.
      **options: further ones of `load_foreign`, such as `state` and `allow`.

    Returns:
      The checkpoint: `variables`, how it was read as sentences in `notes`, and what `write` needs.

    Raises:
      CheckpointError: if the file is damaged, already fused, or does not fit; all names are listed.
      ConfigError: for a name table that cannot be used.
      NonFiniteError: for NaN or Inf.
    """
    images = jnp.zeros((1, *image_size, channels))
    keys = {name: jax.random.key(0) for name in ("params", "dropout")}
    like = nn.unbox(jax.eval_shape(module.init, keys, images))
    options = {"fresh": lambda: nn.unbox(jax.jit(module.init)(keys, images)), **options}
    return load_foreign(path, module, like, names=names, **options)


def write(
    path: str,
    variables: Tree,
    like: Foreign | Format,
    module: nn.Module | None = None,
    *,
    fusion: Mapping[str, Any] | None = None,
) -> str:
    """Writes variables as a file of the kind, names and types of a checkpoint, or as a new file of a format.

    With a checkpoint whatever else was in its file stays as it was, and tensors whose numbers did
    not change stay the same to the bit.

    Args:
      path: of the new file; nothing is there under that name until it is complete.
      variables: of the module.
      like: a checkpoint as `read` gave it, or a format; then `module` is needed.
      module: whose variables they are.
      fusion: what was fused into them; files with it are refused as a backbone to learn on.

    Returns:
      The path.

    Raises:
      CheckpointError: if changed leaves have no place in the file, or it cannot be written.
    """
    if isinstance(like, Foreign):
        write_back(like, path, like.variables, variables, fusion or {})
        return path
    if module is None:
        raise CheckpointError(
            f"A new file of format {like.name} needs the module: write(path, variables, format, module)."
        )
    stem, suffix = os.path.splitext(path)
    if suffix != like.suffix:
        raise CheckpointError(f'{path}: files of format {like.name} end with "{like.suffix}".')
    return write_new(module, variables, like, stem, fusion or {})
