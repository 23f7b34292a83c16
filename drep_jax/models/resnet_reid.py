"""ResNets for re-identification: last stride 1, global average pooling and BNNeck; with one branch or two.

One branch is the baseline of Luo et al. 2019 ("Bag of tricks",
github.com/michuanhaohao/reid-strong-baseline), the common baseline for vehicles as well. Two are
the viewpoint-aware metric learning of Chu et al. 2019 (VANet), of which there is a description
only: below a shared trunk one branch makes the feature for pairs seen from the same view, the other
that for pairs seen from different views, and the distance of a pair is taken in the space that its
views ask for. Taken from it: shared layers, two branches, two spaces. Chosen here: ResNet, whose
last stage each branch has for itself, with a BNNeck each. Not here: the classifier that estimates
the views (they come with the data), and the losses within and across the spaces.

The published trunks differ in their stems, and so does what their weights compute: "torchvision" is
7x7 convolution, batch norm, ReLU, 3x3 max-pool; "strong_baseline" has no ReLU; "fast_reid" pools
windows that begin at the first pixel, without padding before it.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError
from drep_jax.models.backbone import BatchNormBackbone, check_batch, check_classes, check_known
from drep_jax.models.neck import FEATURES, BNNeck
from drep_jax.models.resnet import BLOCKS, Images, Layer, block_maker, makers, stage, strides

STEMS = ("torchvision", "strong_baseline", "fast_reid")
BRANCHES = ("same", "different")
"""Names of two branches, in the order of their features: for pairs of the same view, for pairs of different views."""

Vectors = Float[Array, "batch width"]


class ResNetReID(BatchNormBackbone, kw_only=True):
    """Residual network that returns the feature that is ranked; takes images of any size.

    Attributes:
      stage_sizes: blocks in each stage.
      block: "basic" or "bottleneck".
      num_classes: identities of the training images; 0 for no classifier.
      branches: 1, or 2: [feature for the same view | feature for different views], each of the full width.
      feature: what is ranked, "before" or "after" the batch norm of BNNeck.
      stem: "torchvision", "strong_baseline" or "fast_reid", see above.
      width: channels of the stem and of the first stage.
      last_stride: of the last stage, 1 or 2.
      dtype: see `Backbone`. The necks are float32 at least.
    """

    stage_sizes: Sequence[int]
    block: str
    num_classes: int
    branches: int = 1
    feature: str = "after"
    stem: str = "torchvision"
    width: int = 64
    last_stride: int = 1

    def check(self) -> None:
        """Raises ConfigError for attributes that cannot work together."""
        _check(self)

    def __call__(self, x: Images, train: bool = False) -> Float[Array, "batch outputs"]:
        """Returns the feature that is ranked, that of the branches side by side; float32 at least.

        Args:
          x: normalized images.
          train: whether BatchNorm uses, and updates with, the statistics of this batch (make
            `batch_stats` mutable).

        Raises:
          ConfigError: when `x` is not a batch of images of three channels.
        """
        before, after, _ = self._run(x, train, classify=False)
        return jnp.concatenate(before if self.feature == "before" else after, axis=1)

    def outputs(self, x: Images, train: bool = False) -> dict[str, tuple[Vectors, ...]]:
        """Returns what the losses read: "features" before the necks and "logits", one of each a branch.

        Args:
          x: normalized images.
          train: as for `__call__`.
        """
        before, _, logits = self._run(x, train, classify=True)
        return {"features": before, "logits": logits}

    @nn.compact
    def _run(
        self, x: Images, train: bool, classify: bool
    ) -> tuple[tuple[Vectors, ...], tuple[Vectors, ...], tuple[Vectors, ...]]:
        """Returns the features before and after the necks, and the logits (none where there is no classifier)."""
        check_batch(x, "A ResNet for re-identification", 3)
        conv, norm = makers(train, self.axis_name, self.dtype, self.param_dtype)
        make = block_maker(self.block, conv, norm, "projection", self.remat)
        x = self._stem(x, conv, norm)
        plan = list(zip(self.stage_sizes, strides(self.stage_sizes, self.last_stride), strict=True))
        last = len(plan) - 1
        for i, (size, stride) in enumerate(plan[:last]):
            x = stage(x, f"layer{i + 1}", size, self.width * 2**i, stride, make)
        before, after, logits = [], [], []
        for branch in BRANCHES if self.branches == 2 else ("",):
            prefix, suffix = (f"{branch}_", f"_{branch}") if branch else ("", "")
            maps = stage(x, f"{prefix}layer{last + 1}", plan[last][0], self.width * 2**last, plan[last][1], make)
            pooled = maps.astype(jnp.promote_types(maps.dtype, jnp.float32)).mean(axis=(1, 2))
            neck = BNNeck(self.num_classes, self.axis_name, None, self.param_dtype, name=f"neck{suffix}")
            normed, scores = neck(pooled, train, classify)
            before.append(pooled)
            after.append(normed)
            logits += [] if scores is None else [scores]
        return tuple(before), tuple(after), tuple(logits)

    def _stem(self, x: Images, conv: Layer, norm: Layer) -> Images:
        """Returns maps of a quarter of the images' height and width."""
        x = norm(name="bn1")(conv(self.width, kernel=7, stride=2, name="conv1")(x))
        x = x if self.stem == "strong_baseline" else nn.relu(x)
        # PyTorch's ceil_mode: a window more where pixels are left over, but only behind them.
        pad = [(0, 1 - size % 2) if self.stem == "fast_reid" else (1, 1) for size in x.shape[1:3]]
        return nn.max_pool(x, (3, 3), (2, 2), padding=pad)


def _check(net: ResNetReID) -> None:
    """Raises ConfigError for attributes that cannot work."""
    sizes = net.stage_sizes
    if not isinstance(sizes, Sequence) or not sizes or not all(isinstance(s, int) and s > 0 for s in sizes):
        raise ConfigError(f"stage_sizes must be the number of blocks of each stage, got {sizes!r}.")
    check_known(net, block=BLOCKS, stem=STEMS, feature=FEATURES)
    for name in ("branches", "last_stride"):
        if getattr(net, name) not in (1, 2):
            raise ConfigError(f"{name} must be 1 or 2, got {getattr(net, name)!r}.")
    if not isinstance(net.width, int) or net.width < 1:
        raise ConfigError(f"width must be a number of channels, at least 1, got {net.width!r}.")
    check_classes(net)
