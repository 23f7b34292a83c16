"""A network with its weights as one ONNX file, by the optional package `jax2onnx`.

The converter gets the network's bare equations. When it traces a module itself, it replaces
functions of Flax and jax.numpy by its own, which support neither positional arguments of
`nn.max_pool`, nor its explicit padding, nor `nn.scan` at an unknown batch size. The result is run
in onnxruntime and compared with the network before anything is written.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.extend import core

from drep_jax.core.jaxpr import bind, inline
from drep_jax.errors import CheckpointError, ExportError
from drep_jax.exporting.checked_file import Comparison, Network, coarsest, images_of, traced, write_checked
from drep_jax.exporting.statistics import MixedStatistics

INPUT, OUTPUT = "images", "outputs"


def export_onnx(
    module: nn.Module | MixedStatistics, variables: Any, image_size: tuple[int, int], path: str, *, channels: int = 3
) -> Comparison:
    """Writes `images ↦ module.apply(variables, images)` for any batch size, and checks the file.

    The input is called "images", float32 (batch, height, width, channels). The output is called
    "outputs"; several are called "outputs_0", …, in the order of the tree's leaves.

    Args:
      module: an unbound Linen module that is called with the images alone, or one with mixed
        statistics of its BatchNorms.
      variables: its variables, {"params": …, …}; all of them go into the file.
      image_size: (height, width) in pixels.
      path: of the file.
      channels: of the images.

    Returns:
      The comparison of the file, run by onnxruntime, with the live module.

    Raises:
      ExportError: if the converter is not installed or lacks an operation, if the module needs a
        known batch size, or if the file would be too large or computes something else. An earlier
        file stays.
    """
    for name in ("onnx_ir", "jax2onnx"):  # which warn of every constant
        logging.getLogger(name).setLevel(logging.ERROR)
    jax2onnx = _optional("jax2onnx")
    _optional("onnxruntime")

    def live(images: Any) -> Any:
        return module.apply(variables, images)

    shape = (*image_size, channels)
    closed = traced(module, variables, image_size, channels)
    if (dtype := coarsest(closed)) != "float32":
        raise ExportError(
            f"ONNX files are written for networks that compute in float32. This one computes in {dtype}, for which "
            "onnxruntime lacks operations. Cast the weights to float32 and make the module with dtype=None."
        )
    plain = _rewritten(inline(closed))
    count = len(plain.out_avals)
    names = [OUTPUT] if count == 1 else [f"{OUTPUT}_{i}" for i in range(count)]
    try:
        model = jax2onnx.to_onnx(
            lambda images: tuple(core.jaxpr_as_fun(plain)(images)),
            [images_of((*plain.in_avals[0].shape,))],
            model_name=type(module).__name__,
            input_names=[INPUT],
            output_names=names,
        )
        data = model.SerializeToString()
    except Exception as error:
        raise ExportError(
            f"jax2onnx cannot convert {type(module).__name__}: {(str(error).splitlines() or [''])[0][:300]} "
            "Export it as StableHLO, which supports every operation of JAX."
        ) from error
    return write_checked(path, data, load_onnx, live, closed, shape)


def load_onnx(path: str) -> Network:
    """Reads an ONNX file into onnxruntime on the CPU.

    Returns:
      A function of float32 images (batch, height, width, channels), of any batch size, with NumPy
      outputs.

    Raises:
      CheckpointError: if the file is absent or onnxruntime cannot read it.
      ExportError: if onnxruntime is not installed.
    """
    runtime = _optional("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only; it warns of every constant that it folds
    try:
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CheckpointError(f"onnxruntime cannot read {path}: {error}") from error
    name = session.get_inputs()[0].name

    def run(images: Any) -> Any:
        outputs = session.run(None, {name: np.asarray(images, np.float32)})
        return outputs[0] if len(outputs) == 1 else outputs

    return run


def _optional(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise ExportError(
            f"ONNX needs the package {package} ({error}): pip install --no-deps -r requirements-onnx.txt, best in an "
            "environment of its own (docs/export.md)."
        ) from error


def _rewritten(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Replaces operations that the converter gets wrong at an unknown batch size."""

    def run(*args: Any) -> list[Any]:
        jaxpr = closed.jaxpr
        env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            rewrite = _REWRITES.get(eqn.primitive.name)
            outs = rewrite(eqn, values) if rewrite else bind(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    return jax.make_jaxpr(run)(*closed.in_avals)


def _window_maximum(
    x: Any,
    *,
    window_dimensions: tuple[int, ...],
    window_strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    base_dilation: tuple[int, ...],
    window_dilation: tuple[int, ...],
) -> Any:
    """Returns the maximum over windows of x: that of a strided slice per position in the window."""
    sides = [(low, high, d - 1) for (low, high), d in zip(padding, base_dilation, strict=True)]
    x = _pad(x, np.asarray(-np.inf, x.dtype), padding_config=sides)
    moves = list(zip(window_dimensions, window_strides, window_dilation, strict=True))
    maximum = None
    for place in np.ndindex(*window_dimensions):
        start = [p * d for p, (_, _, d) in zip(place, moves, strict=True)]
        # The last pixel at this position of the window. Axes with window 1 and stride 1 are taken
        # whole: their size may be unknown.
        stop = [
            n if (w, s) == (1, 1) else i + (n - ((w - 1) * d + 1)) // s * s + 1
            for i, n, (w, s, d) in zip(start, x.shape, moves, strict=True)
        ]
        piece = jax.lax.slice(x, start, stop, window_strides)
        maximum = piece if maximum is None else jax.lax.max(maximum, piece)
    return maximum


def _pad(x: Any, value: Any, *, padding_config: Sequence[tuple[int, int, int]]) -> Any:
    """Returns x with constants added to its sides, or cropped.

    Padding between numbers is left to `lax.pad`.
    """
    if any(inner for *_, inner in padding_config):
        return jax.lax.pad_p.bind(x, value, padding_config=tuple(padding_config))
    for axis, (low, high, _) in enumerate(padding_config):
        if low < 0 or high < 0:
            x = jax.lax.slice_in_dim(x, max(-int(low), 0), x.shape[axis] - max(-int(high), 0), axis=axis)
        parts = [
            jax.lax.broadcast_in_dim(value, (*x.shape[:axis], int(side), *x.shape[axis + 1 :]), ())
            for side in (low, high)
            if side > 0
        ]
        if parts:
            before = 1 if low > 0 else 0
            x = jax.lax.concatenate([*parts[:before], x, *parts[before:]], axis)
    return x


def _forward_scan(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Returns the outputs of a scan; a reverse scan becomes a forward scan over reversed inputs."""
    if not eqn.params["reverse"]:
        return bind(eqn, values)
    fixed, carried = eqn.params["num_consts"] + eqn.params["num_carry"], eqn.params["num_carry"]
    inputs = [x if i < fixed else jax.lax.rev(x, (0,)) for i, x in enumerate(values)]
    outs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params({**eqn.params, "reverse": False}))
    return [y if i < carried else jax.lax.rev(y, (0,)) for i, y in enumerate(outs)]


_REWRITES: dict[str, Callable[[Any, Sequence[Any]], list[Any]]] = {
    "reduce_window_max": lambda eqn, values: [_window_maximum(*values, **eqn.params)],
    "pad": lambda eqn, values: [_pad(*values, **eqn.params)],
    "scan": _forward_scan,
}
