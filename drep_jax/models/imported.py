"""Backbones that are not in the registry: any importable Linen module, called as `module(x, train=False)`.

A module that takes no `train`, or whose training mode is on by default or has another name, is made
into a subclass with that signature. Its parameters, their paths and its outputs stay the same.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from drep_jax.errors import ConfigError, DrepError, did_you_mean
from drep_jax.imports import import_attribute, where_raised

SEPARATOR = ":"
"""Stands between module and attribute, as in `mypackage.mymodule:MyModel`; no name of the registry has it."""

MODES: dict[str, Callable[[bool], bool]] = {
    "train": bool,
    "training": bool,
    "is_training": bool,
    "deterministic": lambda train: not train,
    "use_running_average": lambda train: not train,
}
"""Arguments of `__call__` that say whether the module is in training mode, and what they are given."""


def is_imported(name: str) -> bool:
    """Returns whether the name of a model says where to import it from."""
    return SEPARATOR in name


def import_entry(name: str) -> Callable[..., nn.Module]:
    """Returns what makes the module that `PACKAGE.MODULE:NAME` or `FILE.py:NAME` names.

    Args:
      name: its last part is a class, a factory, or a module that is made already.

    Raises:
      ConfigError: if it cannot be imported, or makes no Linen module.
    """
    where, _, attribute = name.rpartition(SEPARATOR)
    if not where or not attribute.isidentifier():
        raise ConfigError(f'Model "{name}" must be PACKAGE.MODULE:NAME or FILE.py:NAME, such as mynet.py:MyNet.')
    entry = import_attribute(where, attribute)
    if isinstance(entry, nn.Module):
        return functools.partial(type(entry), **_fields(entry))
    if isinstance(entry, type) and not issubclass(entry, nn.Module):
        raise ConfigError(_not_linen(name, entry))
    if not callable(entry):
        raise ConfigError(
            f'Model "{name}" is of type {type(entry).__name__}; expected a Linen module or what makes one.'
        )
    return entry


def options_of(entry: Callable[..., Any]) -> tuple[dict[str, bool], bool]:
    """Returns the options of what makes a module, each with whether it is required, and whether any others are taken."""
    parameters = inspect.signature(entry).parameters.values()
    # `parent` and `name` are Flax's own.
    named = [
        p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in ("parent", "name")
    ]
    return {p.name: p.default is p.empty for p in named}, any(p.kind is p.VAR_KEYWORD for p in parameters)


def make(name: str, entry: Callable[..., Any], options: Mapping[str, Any]) -> nn.Module:
    """Returns the module, called as `module(x, train=False)`.

    Raises:
      ConfigError: if its own code refuses the options, or it is no Linen module on images.
    """
    try:
        module = entry(**options)
    except DrepError:
        raise
    except Exception as error:
        raise ConfigError(
            f'Model "{name}" cannot be made with {_listed(options)}: {type(error).__name__}: {error}{where_raised(error)}.'
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(_not_linen(name, type(module)))
    return with_train(module, name)


def with_train(module: nn.Module, name: str = "") -> nn.Module:
    """Returns the module with `__call__(x, train=False)`; itself if it has that signature.

    >>> class Flat(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.Dense(3)(x.mean((1, 2)))
    >>> x = jax.numpy.ones((2, 4, 4, 3))
    >>> variables = Flat().init(jax.random.key(0), x)
    >>> with_train(Flat()).apply(variables, x, train=True).shape
    (2, 3)

    Raises:
      ConfigError: if it needs more than images.
    """
    parameters = list(inspect.signature(type(module).__call__).parameters.values())[2:]
    modes = [p for p in parameters if p.name in MODES]
    others = [
        p.name
        for p in parameters
        if p not in modes and p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if others:
        raise ConfigError(
            f'Model "{name or type(module).__name__}" must be called with images alone, but its __call__ also requires '
            f"{', '.join(others)}."
        )
    if [p.name for p in modes] == ["train"] and modes[0].default is False:
        return module
    return _adapted(type(module), tuple(p.name for p in modes))(**_fields(module))  # type: ignore[arg-type]


@functools.cache
def _adapted(kind: type[nn.Module], modes: tuple[str, ...]) -> type[nn.Module]:
    """Returns the subclass that passes `train` on under the names that `kind` has for it."""

    def __call__(self: Any, x: Any, train: bool = False) -> Any:
        """Calls the network."""
        return kind.__call__(self, x, **{mode: MODES[mode](train) for mode in modes})

    return type(kind.__name__, (kind,), {"__call__": __call__, "__module__": kind.__module__})


def abstract_variables(module: nn.Module, images: jax.ShapeDtypeStruct) -> Any:
    """Returns the shapes of a module's variables.

    Args:
      module: the backbone.
      images: a batch of them.

    Raises:
      ConfigError: if the module cannot be initialized on such images; names their shape and the
        error.
    """
    keys = {name: jax.random.key(0) for name in ("params", "dropout")}
    try:
        return nn.unbox(jax.eval_shape(module.init, keys, images))
    except DrepError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{type(module).__name__} cannot be initialized on images of shape {tuple(images.shape)}: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0]}{where_raised(error)}. "
            "If the size is the reason, set --config.data.image_size."
        ) from error


def output_shape(module: nn.Module, variables: Any, images: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Returns the shape of what a module gives for images.

    Args:
      module: the backbone.
      variables: shapes of its variables.
      images: a batch of them.

    Raises:
      ConfigError: if that is no array with one row for each image.
    """
    output = jax.eval_shape(lambda v, x: module.apply(v, x), variables, images)
    shape = getattr(output, "shape", None)
    if shape is None or len(shape) < 2 or shape[0] != images.shape[0]:
        seen = f"shape {tuple(shape)}" if shape is not None else f"type {type(output).__name__}"
        raise ConfigError(
            f"{type(module).__name__} gives an output of {seen} for images of shape {tuple(images.shape)}; expected one "
            "array whose first axis is the batch."
        )
    return tuple(shape)


def _fields(module: nn.Module) -> dict[str, Any]:
    fields = dataclasses.fields(module)
    return {f.name: getattr(module, f.name) for f in fields if f.init and f.name not in ("parent", "name")}


def _not_linen(name: str, kind: type) -> str:
    origins = {base.__module__.partition(".")[0]: base.__module__ for base in kind.__mro__}
    if "nnx" in "".join(origins.values()):
        return (
            f'Model "{name}" is a module of flax.nnx, whose layers cannot be intercepted; only flax.linen modules can be '
            "denoised. Write the network with flax.linen: the weights can be the same file, read through a name table."
        )
    if "torch" in origins:
        return (
            f'Model "{name}" is a PyTorch module. Write the network with flax.linen, and read its weights through a name '
            "table (docs/own_model.md)."
        )
    return f'Model "{name}" makes a {kind.__module__}.{kind.__qualname__}, which is no flax.linen.Module.'


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no options"


def check_options(name: str, options: Mapping[str, Any], known: Mapping[str, bool], any_other: bool) -> None:
    """Refuses options that what makes a module does not take.

    Raises:
      ConfigError: naming the option, and those that there are.
    """
    for key in options:
        if key not in known and not any_other:
            near = did_you_mean(key, known)
            every = f" It has: {', '.join(sorted(known))}." if "Known" not in near else ""
            raise ConfigError(f'Model "{name}" has no option "{key}".{near or " It has none."}{every if near else ""}')
