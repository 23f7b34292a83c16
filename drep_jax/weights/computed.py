"""Weights that a file stores as what they are computed from: pruned pairs, weight and spectral normalization.

    pruned            W = W₀ ∘ M          weight_orig, weight_mask
    weight norm       W = g · V / ‖V‖     weight_g, weight_v, or parametrizations.weight.original0, …1
    spectral norm     W = W₀ / uᵀW₀v      weight_orig, weight_u, weight_v, or parametrizations.weight.original, .0._u, .0._v

They are read as W, and fused weights are written back into the parts where these can express them.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping

import numpy as np

from drep_jax.errors import CheckpointError
from drep_jax.weights.translation import some

Arrays = Mapping[str, np.ndarray]
Parts = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Computation:
    """How PyTorch computes a weight from several tensors.

    Attributes:
      kind: what it is called.
      read: parts by their endings ↦ weight, float64.
      write: (parts, new weight) ↦ parts that give it; None where no parts do.
      endings: of the tensors' names, without the name of the weight, the one of the weight's shape
        first.
      remark: what a user should know before a fused weight is written back.
    """

    kind: str
    endings: tuple[str, ...]
    read: Callable[[Parts], np.ndarray]
    write: Callable[[Parts, np.ndarray], Parts] | None
    remark: str = ""


@dataclasses.dataclass(frozen=True)
class Computed:
    """A weight that a file stores in parts: {ending: name of the tensor}, and the weight itself."""

    how: Computation
    parts: dict[str, str]
    value: np.ndarray

    def written(self, name: str, value: np.ndarray, tensors: Arrays) -> dict[str, np.ndarray]:
        """Returns the file's tensors with which the weight is `value`.

        Raises:
          CheckpointError: if no tensors in these places give it.
        """
        if self.how.write is None:
            raise CheckpointError(refusal(name, self.how))
        old = {ending: tensors[part] for ending, part in self.parts.items()}
        new = self.how.write(old, np.asarray(value, np.float64))
        return {self.parts[ending]: array.astype(old[ending].dtype) for ending, array in new.items()}


def refusal(name: str, how: Computation) -> str:
    """Returns why a fused weight cannot go back into its parts, and the way out."""
    return (
        f"{name} is stored with {how.kind}, which scales whatever it is given, so the fused weights cannot be written back "
        "in the same form. Write a new file with --export=FORMAT (docs/weights.md), or leave the layer out of the sites "
        "with --config.sites.pattern."
    )


def _norm(v: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Returns ‖V‖ over the axes in which g has one number, or over all for a single g."""
    axes = tuple(i for i, size in enumerate(g.shape) if size == 1 and v.shape[i] != 1) if g.ndim == v.ndim else None
    return np.sqrt(np.sum(np.square(v), axis=axes, keepdims=axes is not None))


def _weight_norm(magnitude: str, direction: str) -> tuple[Callable[[Parts], np.ndarray], Callable[..., Parts]]:
    def read(parts: Parts) -> np.ndarray:
        g, v = (parts[part].astype(np.float64) for part in (magnitude, direction))
        with np.errstate(invalid="ignore", divide="ignore"):
            return g * v / _norm(v, g)

    def write(parts: Parts, value: np.ndarray) -> Parts:
        g = _norm(value, parts[magnitude])
        # A direction of zeros has no norm to divide by: what stood there keeps its direction, times 0.
        v = np.where(g == 0, parts[direction].astype(np.float64), value)
        return {magnitude: np.reshape(g, parts[magnitude].shape), direction: v}

    return read, write


def _spectral_norm(weight: str, left: str, right: str) -> Callable[[Parts], np.ndarray]:
    def read(parts: Parts) -> np.ndarray:
        w, u, v = (parts[part].astype(np.float64) for part in (weight, left, right))
        # The matrix has the rows of one axis, the first but for transposed convolutions.
        axis = next((i for i, size in enumerate(w.shape) if (size, w.size // max(size, 1)) == (u.size, v.size)), 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return w / (u @ np.moveaxis(w, axis, 0).reshape(u.size, v.size) @ v)

    return read


def _pruned(parts: Parts) -> np.ndarray:
    return parts["_orig"].astype(np.float64) * parts["_mask"].astype(np.float64)


def _dense(parts: Parts, value: np.ndarray) -> Parts:
    return {"_orig": value, "_mask": np.ones(parts["_mask"].shape)}


COMPUTATIONS = (
    Computation(
        "pruning masks",
        ("_orig", "_mask"),
        _pruned,
        _dense,
        "fusing makes the weights of a site dense, since it mixes a layer's inputs; masks of fused layers are written back as "
        "ones",
    ),
    Computation("weight norm", ("_v", "_g"), *_weight_norm("_g", "_v")),
    Computation("weight norm", (".original1", ".original0"), *_weight_norm(".original0", ".original1")),
    Computation("spectral norm", ("_orig", "_u", "_v"), _spectral_norm("_orig", "_u", "_v"), None),
    Computation("spectral norm", (".original", ".0._u", ".0._v"), _spectral_norm(".original", ".0._u", ".0._v"), None),
)

_ENDING = re.compile(
    r"((?:.*\.)?[^.]*(?:weight|bias)[^.]*?)(_orig|_mask|_g|_v|_u)|(.*?)parametrizations\.(\w+)(\.original\d*|\.\d+\..+)"
)


def find_computed(path: str, tensors: Arrays) -> dict[str, Computed]:
    """Returns the weights that a file stores in parts, by the names that they would have by themselves.

    Args:
      path: of the file, for messages.
      tensors: the file's, by name.

    Raises:
      CheckpointError: for parts that are computed by code which is not in the file, of shapes that
        do not fit each other, or without an end.
    """
    by_weight: dict[str, dict[str, str]] = {}
    for name in tensors:
        if match := _ENDING.fullmatch(name):
            weight = match[1] or f"{match[3]}{match[4]}"
            by_weight.setdefault(weight, {})[match[2] or match[5]] = name
    computed = {}
    for weight, parts in by_weight.items():
        if weight in tensors:
            continue  # stored as well: the parts are somebody else's names, or left over
        how = next((how for how in COMPUTATIONS if parts.keys() == set(how.endings)), None)
        if how is not None:
            computed[weight] = _compute(path, weight, how, parts, tensors)
        elif any(ending == "_orig" or ending.startswith(".") for ending in parts):
            raise CheckpointError(_unknown(path, weight, parts.values()))
    return computed


def _compute(path: str, weight: str, how: Computation, parts: Mapping[str, str], tensors: Arrays) -> Computed:
    arrays = {ending: tensors[name] for ending, name in parts.items()}
    main = arrays[how.endings[0]]
    try:
        value = how.read(arrays)
    except ValueError:
        value = None
    if value is None or value.shape != main.shape:
        shapes = ", ".join(f"{name} {arrays[ending].shape}" for ending, name in parts.items())
        raise CheckpointError(
            f"{path}: {weight} is stored with {how.kind}, and the parts' shapes do not fit: {shapes}."
        )
    return Computed(how, dict(parts), value.astype(main.dtype))


def _unknown(path: str, weight: str, names: Collection[str]) -> str:
    attribute = weight.rpartition(".")[2]
    return (
        f"{path}: {weight} is computed from {some(names)} in a way that is not known here; known: "
        f"{', '.join(dict.fromkeys(how.kind for how in COMPUTATIONS))}. Store the result with PyTorch: "
        f'torch.nn.utils.parametrize.remove_parametrizations(layer, "{attribute}"), or prune.remove, remove_spectral_norm, '
        "then torch.save(model.state_dict(), …)."
    )


def with_computed(tensors: Arrays, computed: Mapping[str, Computed]) -> dict[str, np.ndarray]:
    """Returns a file's tensors with computed weights in place of their parts."""
    parts = {part for weight in computed.values() for part in weight.parts.values()}
    plain = {name: array for name, array in tensors.items() if name not in parts}
    return {**plain, **{name: weight.value for name, weight in computed.items()}}


def notes_on(computed: Mapping[str, Computed]) -> list[str]:
    """Returns sentences that say which weights were computed, and what that means for fusing them."""
    by_kind: dict[str, list[str]] = {}
    remarks = {weight.how.kind: weight.how.remark for weight in computed.values()}
    for name, weight in computed.items():
        by_kind.setdefault(weight.how.kind, []).append(name)
    return [
        f"{len(names)} weights computed from their parts ({kind}): {some(names, 3)}"
        + (f"; {remarks[kind]}" if remarks[kind] else "")
        for kind, names in by_kind.items()
    ]
