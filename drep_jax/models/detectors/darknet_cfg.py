"""Networks as darknet's `.cfg` files describe them: sections in the order of execution, resolved to layers.

Layers are numbered as in darknet, from 0 for the first section after [net]. Relative numbers of
[route] and [shortcut] count back from the layer itself. What changes the outputs is read or
refused; settings of training are passed over.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

from drep_jax.errors import ConfigError, did_you_mean

IMAGE = -1
"""Stands for the network's input among the sources of a layer."""

KINDS = ("convolutional", "maxpool", "upsample", "route", "shortcut", "dropout", "yolo")
ALIASES = {"conv": "convolutional", "max": "maxpool"}
ACTIVATIONS = ("linear", "leaky", "relu", "relu6", "mish", "swish", "logistic")
REFUSED = {
    "convolutional": (
        "binary",
        "xnor",
        "antialiasing",
        "share_index",
        "assisted_excitation",
        "deform",
        "sway",
        "rotate",
    ),
    "maxpool": ("maxpool_depth", "antialiasing"),
    "shortcut": ("weights_type",),
    "route": ("stream",),
    "upsample": (),
    "yolo": ("new_coords", "counters_per_class_only"),
    "dropout": ("dropblock",),
}
"""Settings that would make another network, if they are not 0."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Head:
    """A [yolo] section.

    Attributes:
      anchors: (width, height) of those that it uses, in pixels of the network's input.
      classes: number of classes.
      scale_xy: darknet's `scale_x_y`.
    """

    anchors: tuple[tuple[float, float], ...]
    classes: int
    scale_xy: float = 1.0


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
      number: darknet's.
      kind: one of `KINDS`.
      sources: numbers of the layers that it reads; `IMAGE` for the network's input.
      channels_in, channels: of what it reads, one after the other, and of what it gives.
      norm: whether a convolution is followed by a batch norm.
      size, strides, padding, dilation, groups: of the windows of a convolution or pool; padding in
        all, before and after; a route takes part `part` of `groups`.
      part: of a route's channels.
      scale: of an upsampling, or the factor of its values.
      activation: of a convolution or shortcut.
      head: of a [yolo] layer.
    """

    number: int
    kind: str
    sources: tuple[int, ...]
    channels_in: int
    channels: int
    norm: bool = False
    size: int = 1
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1
    groups: int = 1
    part: int = 0
    scale: float = 1.0
    activation: str = "linear"
    head: Head | None = None


@dataclasses.dataclass(frozen=True)
class Network:
    """A `.cfg` file.

    Attributes:
      height, width, channels: of the images that it is made for.
      layers: in the order of execution.
    """

    height: int
    width: int
    channels: int
    layers: tuple[Layer, ...]

    @property
    def heads(self) -> tuple[Head, ...]:
        """The [yolo] layers, in their order."""
        return tuple(layer.head for layer in self.layers if layer.head is not None)


class _Section:
    """The settings of one section, with errors that name its line."""

    def __init__(self, where: str, kind: str, line: int) -> None:
        self.kind, self.place = kind, f"{where}, line {line}, [{kind}]"
        self.values: dict[str, str] = {}

    def refuse(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.place}: {reason}")

    def get(self, name: str, default: T, read: Callable[[str], T]) -> T:
        if name not in self.values:
            return default
        try:
            return read(self.values[name])
        except ValueError as error:
            raise self.refuse(f"{name}={self.values[name]} is not a number.") from error

    def whole(self, name: str, default: int, least: int = 0) -> int:
        value = self.get(name, default, int)
        if value < least:
            raise self.refuse(f"{name}={value}; expected at least {least}.")
        return value

    def numbers(self, name: str, kind: Callable[[str], T]) -> list[T]:
        return self.get(name, [], lambda text: [kind(part) for part in text.split(",") if part.strip()])


def read_cfg(path: str) -> Network:
    """Returns the network of a `.cfg` file.

    Raises:
      ConfigError: if it cannot be read, or describes a network that is not known here.
    """
    try:
        with open(os.path.expanduser(path), encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"Cannot read darknet's configuration {path}: {error.strerror or error}.") from error
    return parse_cfg(text, path)


@functools.lru_cache(maxsize=16)
def parse_cfg(text: str, where: str = "the cfg") -> Network:
    """Returns the network that a `.cfg` describes.

    >>> net = parse_cfg("[net]\\nwidth=32\\nheight=32\\nchannels=3\\n[convolutional]\\nfilters=8\\nsize=3\\npad=1\\nstride=2")
    >>> net.layers[0].padding, net.layers[0].channels
    ((1, 1), 8)

    Args:
      text: of the file.
      where: its name, for messages.

    Raises:
      ConfigError: naming the line and what is not known, or does not fit.
    """
    sections = _sections(text, where)
    if not sections or sections[0].kind not in ("net", "network"):
        raise ConfigError(f"{where} does not begin with [net]: it is no configuration of darknet.")
    net = sections[0]
    channels = net.whole("channels", 3, 1)
    layers: list[Layer] = []
    for section in sections[1:]:
        kind = ALIASES.get(section.kind, section.kind)
        if kind not in MAKERS:
            raise section.refuse(f"this layer is not known here.{did_you_mean(kind, KINDS)}")
        for name in REFUSED[kind]:
            if section.values.get(name, "0") not in ("0", "none"):
                raise section.refuse(f"{name}={section.values[name]} makes a layer that is not known here.")
        number = len(layers)
        widths = {IMAGE: channels, **{layer.number: layer.channels for layer in layers}}
        layers.append(MAKERS[kind](section, number, widths))
    if not layers:
        raise ConfigError(f"{where} has no layers.")
    return Network(net.whole("height", 416, 1), net.whole("width", 416, 1), channels, tuple(layers))


def _sections(text: str, where: str) -> list[_Section]:
    sections: list[_Section] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].split(";")[0].strip()
        if line.startswith("["):
            sections.append(_Section(where, line.strip("[] ").lower(), number))
        elif line:
            name, equals, value = line.partition("=")
            if not equals or not sections:
                raise ConfigError(f"{where}, line {number}: expected [section] or name=value, got {line[:60]!r}.")
            sections[-1].values[name.strip()] = value.strip()
    return sections


def _activation(section: _Section) -> str:
    name = section.values.get("activation", "logistic" if section.kind.startswith("conv") else "linear")
    if name not in ACTIVATIONS:
        raise section.refuse(f'the activation "{name}" is not known here.{did_you_mean(name, ACTIVATIONS)}')
    return name


def _convolutional(section: _Section, number: int, widths: Mapping[int, int]) -> Layer:
    size, groups, channels = section.whole("size", 1, 1), section.whole("groups", 1, 1), section.whole("filters", 1, 1)
    stride = section.whole("stride", 1, 1)
    strides = (section.whole("stride_y", stride, 1), section.whole("stride_x", stride, 1))
    padding = size // 2 if section.whole("pad", 0) else section.whole("padding", 0)
    channels_in = widths[number - 1]
    if channels_in % groups or channels % groups:
        raise section.refuse(f"groups={groups} divides {channels_in} channels in and {channels} out unevenly.")
    return Layer(
        number,
        "convolutional",
        (number - 1,),
        channels_in,
        channels,
        norm=bool(section.whole("batch_normalize", 0)),
        size=size,
        strides=strides,
        padding=(padding, padding),
        dilation=section.whole("dilation", 1, 1),
        groups=groups,
        activation=_activation(section),
    )


def _maxpool(section: _Section, number: int, widths: Mapping[int, int]) -> Layer:
    stride = section.whole("stride", 1, 1)
    strides = (section.whole("stride_y", stride, 1), section.whole("stride_x", stride, 1))
    size = section.whole("size", stride, 1)
    padding = section.whole("padding", size - 1)
    width = widths[number - 1]
    return Layer(
        number,
        "maxpool",
        (number - 1,),
        width,
        width,
        size=size,
        strides=strides,
        padding=(padding // 2, padding - padding // 2),
    )


def _upsample(section: _Section, number: int, widths: Mapping[int, int]) -> Layer:
    stride, width = section.whole("stride", 2, 1), widths[number - 1]
    scale = section.get("scale", 1.0, float)
    return Layer(number, "upsample", (number - 1,), width, width, strides=(stride, stride), scale=scale)


def _sources(section: _Section, name: str, number: int) -> tuple[int, ...]:
    """Returns the layers that a section names; negative ones count back from it."""
    listed = section.numbers(name, int)
    sources = tuple(number + value if value < 0 else value for value in listed)
    if not sources or not all(0 <= source < number for source in sources):
        raise section.refuse(
            f"{name}={section.values.get(name, '')} does not name layers before it, which are 0 to {number - 1}."
        )
    return sources


def _route(section: _Section, number: int, widths: Mapping[int, int]) -> Layer:
    sources = _sources(section, "layers", number)
    groups, part = section.whole("groups", 1, 1), section.whole("group_id", 0)
    if part >= groups or any(widths[source] % groups for source in sources):
        raise section.refuse(f"there is no part {part} of {groups} equal ones of the channels.")
    total = sum(widths[source] for source in sources)
    return Layer(number, "route", sources, total, total // groups, groups=groups, part=part)


def _shortcut(section: _Section, number: int, widths: Mapping[int, int]) -> Layer:
    sources = (number - 1, *_sources(section, "from", number))
    width = widths[number - 1]
    if any(widths[source] != width for source in sources):
        raise section.refuse(f"it adds maps of {', '.join(str(widths[source]) for source in sources)} channels.")
    return Layer(number, "shortcut", sources, width, width, activation=_activation(section))


def _dropout(section: _Section, number: int, widths: Mapping[int, int]) -> Layer:
    del section
    return Layer(number, "dropout", (number - 1,), widths[number - 1], widths[number - 1])


def _yolo(section: _Section, number: int, widths: Mapping[int, int]) -> Layer:
    sizes = section.numbers("anchors", float)
    pairs = list(zip(sizes[::2], sizes[1::2], strict=False))
    mask = section.numbers("mask", int) or list(range(len(pairs)))
    if not pairs or len(sizes) % 2 or not all(0 <= place < len(pairs) for place in mask):
        raise section.refuse(f"mask={mask} does not choose among its {len(pairs)} anchors.")
    classes, width = section.whole("classes", 20, 1), widths[number - 1]
    if width != len(mask) * (5 + classes):
        raise section.refuse(
            f"it reads {width} channels; {len(mask)} anchors of {classes} classes need {len(mask) * (5 + classes)}."
        )
    head = Head(tuple(pairs[place] for place in mask), classes, section.get("scale_x_y", 1.0, float))
    return Layer(number, "yolo", (number - 1,), width, width, head=head)


MAKERS: Mapping[str, Callable[[_Section, int, Mapping[int, int]], Layer]] = {
    "convolutional": _convolutional,
    "maxpool": _maxpool,
    "upsample": _upsample,
    "route": _route,
    "shortcut": _shortcut,
    "dropout": _dropout,
    "yolo": _yolo,
}
