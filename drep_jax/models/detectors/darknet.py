"""Networks of darknet, built from their `.cfg` (https://github.com/AlexeyAB/darknet).

Layers are called `conv_N` and `bn_N` after darknet's numbers. BatchNorm: eps 1e-5 inside the root,
running statistics. Padding is explicit and symmetric, in pools with −∞. Depthwise and pointwise
convolutions take the fast forms for CPUs. [dropout] does nothing here, in training as well.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError
from drep_jax.models.backbone import BatchNormBackbone, check_batch
from drep_jax.models.depthwise import depthwise_conv
from drep_jax.models.detectors.base import Targets
from drep_jax.models.detectors.darknet_cfg import IMAGE, Layer, Network, parse_cfg, read_cfg
from drep_jax.models.detectors.fpn import upsample_nearest
from drep_jax.models.detectors.padding import shape_of
from drep_jax.models.detectors.proposals import Objects
from drep_jax.models.detectors.yolo import RULES, find_objects
from drep_jax.models.detectors.yolo_losses import yolo_distance, yolo_losses
from drep_jax.models.pointwise import pointwise_conv
from drep_jax.rows import valid_pixels

Maps = Float[Array, "batch height width channels"]

ACTIVATE: dict[str, Callable[[Array], Array]] = {
    "linear": lambda x: x,
    "leaky": functools.partial(nn.leaky_relu, negative_slope=0.1),
    "relu": nn.relu,
    "relu6": nn.relu6,
    "mish": jax.nn.mish,
    "swish": nn.swish,
    "logistic": nn.sigmoid,
}


class Darknet(BatchNormBackbone, kw_only=True):
    """The network of a `.cfg`, up to the inputs of its [yolo] layers; a `Detector` by these.

    Attributes:
      cfg: path of the `.cfg` file, or its text.
      num_classes: of the objects, which the `.cfg` states; 0 takes that number.
      epsilon: of the batch norms. AlexeyAB's darknet: 1e-5.
      rule, score, objectness, iou, candidates, keep: of what is found, see
        `drep_jax.models.detectors.yolo.find_objects`.
      clip: whether boxes are clipped to the image, before they suppress each other.
    """

    cfg: str
    num_classes: int = 0
    epsilon: float = 1e-5
    rule: str = "product"
    score: float = 0.005
    objectness: float = 0.005
    iou: float = 0.45
    candidates: int = 2000
    keep: int = 100
    clip: bool = True

    site_pattern = ".*"

    def check(self) -> None:
        """Raises ConfigError for a `.cfg` that cannot be read or finds no objects, and for another number of classes."""
        heads = self.network.heads
        if not heads:
            raise ConfigError(f"{self.cfg[:100]!r} has no [yolo] layer: it finds no objects.")
        classes = {head.classes for head in heads}
        if len(classes) > 1:
            raise ConfigError(
                f"The [yolo] layers of {self.cfg[:100]!r} have different numbers of classes: {sorted(classes)}."
            )
        (stated,) = classes
        if self.num_classes not in (0, stated):
            raise ConfigError(
                f"The [yolo] layers of {self.cfg[:100]!r} have {stated} classes, and {self.num_classes} are asked for. Set "
                f'"classes" in each [yolo] section, and "filters" of the convolution before it to anchors · (5 + classes).'
            )
        object.__setattr__(self, "num_classes", stated)
        if self.rule not in RULES:
            raise ConfigError(f'Boxes are chosen by "product" or "class"; got "{self.rule}".')
        if min(self.candidates, self.keep) < 1:
            raise ConfigError(f"candidates={self.candidates} and keep={self.keep} must be at least 1.")

    @property
    def network(self) -> Network:
        """The layers."""
        return parse_cfg(self.cfg) if "\n" in self.cfg else read_cfg(self.cfg)

    def objects(
        self, outputs: tuple[Maps, ...], shape: tuple[int, int], size: Float[Array, "batch 2"] | None = None
    ) -> Objects:
        """Returns what is found in each image; see `drep_jax.models.detectors.base.Detector.objects`."""
        if size is None:
            size = jnp.broadcast_to(jnp.asarray(shape, jnp.float32)[None], (outputs[0].shape[0], 2))
        return find_objects(
            outputs,
            self.network.heads,
            shape,
            valid_size=size if self.clip else None,
            rule=self.rule,
            score=self.score,
            objectness=self.objectness,
            iou=self.iou,
            candidates=self.candidates,
            keep=self.keep,
        )

    def losses(
        self,
        outputs: tuple[Maps, ...],
        targets: Targets,
        shape: tuple[int, int],
        size: Float[Array, "batch 2"] | None = None,
    ) -> Mapping[str, Float[Array, ""]]:
        """Returns the parts of YOLOv3's loss; see `drep_jax.models.detectors.yolo_losses`."""
        del size
        return yolo_losses(outputs, self.network.heads, targets, shape)

    def distance(self, outputs: tuple[Maps, ...], clean_outputs: tuple[Maps, ...]) -> Float[Array, ""]:
        """Returns how far outputs are from those for clean images; see `yolo_distance`."""
        return yolo_distance(outputs, clean_outputs, self.network.heads)

    @nn.compact
    def __call__(
        self,
        x: Maps,
        train: bool = False,
        size: Float[Array, "batch 2"] | None = None,
        targets: Targets | None = None,
    ) -> tuple[Maps, ...]:
        """Returns the input of each [yolo] layer, (batch, h, w, anchors · (5 + classes)), float32 at least.

        Args:
          x: RGB / 255, of any size whose halves meet again, such as multiples of 32.
          train: whether BatchNorm uses, and updates with, the statistics of this batch.
          size: of the images without padding. It changes no output, but padding is no feature that
            denoisers learn from.
          targets: of training, which a network of one stage does not look at.

        Raises:
          ConfigError: when `x` is no batch of images.
        """
        del targets
        network = self.network
        check_batch(x, "A network of darknet", network.channels)
        last_reader = {source: layer.number for layer in network.layers for source in layer.sources}
        maps, outputs = {IMAGE: x}, []
        for layer in network.layers:
            read = [maps[source] for source in layer.sources]
            if layer.kind == "yolo":
                outputs.append(read[0].astype(jnp.promote_types(read[0].dtype, jnp.float32)))
            maps = {number: value for number, value in maps.items() if last_reader.get(number, -1) > layer.number}
            with valid_pixels(size if layer.kind == "convolutional" else None, shape_of(x)):
                maps[layer.number] = self._layer(layer, read, train)
        return tuple(outputs)

    def _layer(self, layer: Layer, read: list[Maps], train: bool) -> Maps:
        activate = ACTIVATE[layer.activation]
        match layer.kind:
            case "convolutional":
                return activate(self._convolution(layer, read[0], train))
            case "maxpool":
                window, pads = (layer.size, layer.size), (layer.padding, layer.padding)
                return nn.max_pool(read[0], window, layer.strides, padding=pads)
            case "upsample":
                height, width = (side * factor for side, factor in zip(read[0].shape[1:3], layer.strides, strict=True))
                large = upsample_nearest(read[0], (height, width))
                return large if layer.scale == 1 else large * layer.scale
            case "route":
                parts = [jnp.split(x, layer.groups, axis=-1)[layer.part] if layer.groups > 1 else x for x in read]
                return self._joined(layer, parts)
            case "shortcut":
                self._check_sizes(layer, read)
                return activate(functools.reduce(jnp.add, read))
        return read[0]

    def _convolution(self, layer: Layer, x: Maps, train: bool) -> Maps:
        depthwise = layer.groups > 1 and layer.groups == layer.channels_in == layer.channels
        fast: Any = depthwise_conv if depthwise else pointwise_conv if layer.size == 1 else None
        x = nn.Conv(
            layer.channels,
            (layer.size, layer.size),
            strides=layer.strides,
            padding=(layer.padding, layer.padding),
            kernel_dilation=(layer.dilation, layer.dilation),
            feature_group_count=layer.groups,
            use_bias=not layer.norm,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_in", "uniform"),
            conv_general_dilated=fast,
            name=f"conv_{layer.number}",
            **self.dtypes,
        )(x)
        if not layer.norm:
            return x
        norm = nn.BatchNorm(
            not train,
            epsilon=self.epsilon,
            momentum=0.9,
            axis_name=self.axis_name,
            name=f"bn_{layer.number}",
            **self.dtypes,
        )
        return norm(x)

    def _joined(self, layer: Layer, parts: list[Maps]) -> Maps:
        self._check_sizes(layer, parts)
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)

    def _check_sizes(self, layer: Layer, maps: list[Maps]) -> None:
        sizes = [x.shape[1:3] for x in maps]
        if len(set(sizes)) > 1:
            raise ConfigError(
                f"Layer {layer.number} [{layer.kind}] joins maps of sizes {sizes}. Use images whose sides are multiples of "
                f"32, such as {self.network.height} x {self.network.width}."
            )
