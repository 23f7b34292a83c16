"""Label losses: cross-entropy of images and of pixels, triplets (Hermans et al. 2017), centers (Wen et al. 2016).

Triplets are formed across all devices, so the loss does not depend on the number of devices.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from drep_jax.metrics.label_maps import in_blocks, largest
from drep_jax.parallel import devices


def cross_entropy(
    logits: Float[Array, "batch classes"], batch: Mapping[str, Any], smoothing: float = 0.0
) -> Float[Array, ""]:
    """Returns the mean cross-entropy in nats.

    For images mixed with weights s and 1 − s it is s·loss("label") + (1 − s)·loss("label2").

    >>> float(cross_entropy(jnp.zeros((1, 2)), {"label": jnp.array([0])}))  # ln 2
    0.6931471824645996

    Args:
      logits: (batch, classes).
      batch: "label", int (batch,); for mixed images also "label2", int (batch,), and their weights
        s, "share", float (batch,).
      smoothing: fraction of the target spread over all classes.
    """

    def each(labels: Any) -> Any:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
        return optax.softmax_cross_entropy(logits, targets)

    if "share" not in batch:
        return jnp.mean(each(batch["label"]))
    return jnp.mean(batch["share"] * each(batch["label"]) + (1.0 - batch["share"]) * each(batch["label2"]))


def pixel_cross_entropy(
    logits: Float[Array, "batch h w outputs"],
    labels: Int[Array, "batch height width"],
    classes: int,
    smoothing: float = 0.0,
    *,
    of_all: bool = False,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns this device's part of the mean cross-entropy of pixels in nats, and of their accuracy.

        Σ −log p(label) / N, over the labeled pixels

    N is the number of labeled pixels of all devices, or that of all pixels, as mmsegmentation has
    it, where a mostly ignored image counts less. Without any labeled pixel the loss is 0.

    Args:
      logits: enlarged bilinearly to the size of the labels, a block of rows at a time.
      labels: 0 … classes − 1; any other is ignored.
      classes: number of classes; further outputs are never right.
      smoothing: fraction of the target spread over all outputs.
      of_all: whether N counts the ignored pixels, too.
    """
    outputs = logits.shape[-1]
    height, width = labels.shape[1:]

    def block(wide: Any, valid: Any, rows: Any) -> Any:
        rows = rows.astype(jnp.int32)
        known = (rows < classes) & valid[None, :, None]
        log_p = jax.nn.log_softmax(wide.astype(jnp.float32), axis=-1)
        places = jnp.arange(outputs, dtype=jnp.int32).reshape(1, 1, 1, outputs)
        losses = -jnp.sum(jnp.where(rows[..., None] == places, log_p, 0.0), axis=-1)
        losses = (1.0 - smoothing) * losses - smoothing * jnp.mean(log_p, axis=-1)
        right = (largest(jax.lax.stop_gradient(wide)) == rows) & known
        return jnp.sum(jnp.where(known, losses, 0.0)), jnp.sum(right)

    loss, right = (jnp.sum(part) for part in in_blocks(logits, [(height, width)], block, labels, backward=True))
    labeled = jnp.sum(labels < classes).astype(jnp.float32)
    known = devices.total(labeled)
    number = float(labels.size * devices.axis_size()) if of_all else known
    # The step takes the mean over devices.
    share = devices.axis_size()
    return share * loss / jnp.maximum(number, 1.0), share * right / jnp.maximum(known, 1.0)


def triplet_loss(
    features: Float[Array, "batch width"], labels: Int[Array, " batch"], margin: float
) -> Float[Array, ""]:
    """Returns the batch-hard triplet loss (Hermans et al. 2017, Eq. 5).

        mean over anchors a of [max_p d(a, p) − min_n d(a, n) + m]₊

    or, with m = 0, of the soft margin log(1 + exp(max_p d − min_n d)). Distances d are Euclidean.
    An image is not its own positive. Anchors without a positive or a negative are excluded from the
    mean.

    Args:
      features: of this device's images; positives and negatives come from all devices.
      labels: their identities.
      margin: m, in units of the features.
    """
    distances, equal, self_pair = _pairs(features, labels)
    return _hardest([(distances, equal & ~self_pair)], [(distances, ~equal)], margin)


def view_triplet_loss(
    same: Float[Array, "batch width"],
    different: Float[Array, "batch width"],
    labels: Int[Array, " batch"],
    views: Int[Array, " batch"],
    margin: float,
) -> Float[Array, ""]:
    """Returns the batch-hard triplet losses of viewpoint-aware metric learning (Chu et al. 2019).

        L = L_S + L_D + L_cross

    Pairs of the same view are compared in space S, pairs of different views in space D. L_S and L_D
    require positives to be nearer than negatives within a space. L_cross requires positives of
    another view (in D) to be nearer than negatives of the same view (in S), which look more alike.

    Args:
      same, different: features of the two branches, in S and D.
      labels, views: of the images.
      margin: see `triplet_loss`.
    """
    in_s, equal, self_pair = _pairs(same, labels)
    in_d = _pairs(different, labels)[0]
    one_view = views[:, None] == devices.gathered(views)[None]
    positive, negative = equal & ~self_pair, ~equal
    return (
        _hardest([(in_s, positive & one_view)], [(in_s, negative & one_view)], margin)
        + _hardest([(in_d, positive & ~one_view)], [(in_d, negative & ~one_view)], margin)
        + _hardest([(in_d, positive & ~one_view)], [(in_s, negative & one_view)], margin)
    )


def center_loss(
    features: Float[Array, "batch width"], labels: Int[Array, " batch"], centers: Float[Array, "classes width"]
) -> Float[Array, ""]:
    """Returns the mean squared distance to identity centers (Wen et al. 2016, twice Eq. 2)."""
    return jnp.mean(jnp.sum((features - centers[labels]) ** 2, axis=-1))


def cosine_loss(
    features: Float[Array, "batch width"], clean: Float[Array, "batch width"], branches: int = 1
) -> Float[Array, ""]:
    """Returns the mean of 1 − cos between features and the clean features of the same images.

    Args:
      features, clean: of this device's images.
      branches: equal parts of a feature, each with an angle of its own.
    """
    first, second = (each.reshape(len(each), branches, -1) for each in (features, clean))
    return jnp.mean(optax.losses.cosine_distance(first, second, epsilon=1e-12))


def _pairs(
    features: Float[Array, "batch width"], labels: Int[Array, " batch"]
) -> tuple[Float[Array, "batch all"], Bool[Array, "batch all"], Bool[Array, "batch all"]]:
    """Returns distances to the images of all devices, equality of identities, and of images."""
    all_features, identities = devices.gathered(features), devices.gathered(labels)
    squares = jnp.sum(features**2, -1)[:, None] + jnp.sum(all_features**2, -1)[None]
    squares = squares - 2 * jnp.matmul(features, all_features.T, precision=jax.lax.Precision.HIGHEST)
    # The root has no derivative at 0.
    distances = jnp.sqrt(jnp.maximum(squares, 1e-12))
    first = devices.device_index() * len(features)
    itself = (first + jnp.arange(len(features)))[:, None] == jnp.arange(len(all_features))[None]
    return distances, labels[:, None] == identities[None], itself


def _hardest(positives: Sequence[Any], negatives: Sequence[Any], margin: float) -> Float[Array, ""]:
    """Returns this device's part of the mean over the anchors of all devices."""
    far = jnp.max(jnp.concatenate([jnp.where(mask, d, -jnp.inf) for d, mask in positives], axis=1), axis=1)
    near = jnp.min(jnp.concatenate([jnp.where(mask, d, jnp.inf) for d, mask in negatives], axis=1), axis=1)
    complete = jnp.isfinite(far) & jnp.isfinite(near)
    gap = jnp.where(complete, far, 0.0) - jnp.where(complete, near, 0.0)
    each = jax.nn.softplus(gap) if margin == 0 else jax.nn.relu(gap + margin)
    count = devices.total(jnp.sum(complete))
    # The step takes the mean over devices.
    return devices.axis_size() * jnp.sum(jnp.where(complete, each, 0.0)) / jnp.maximum(count, 1)
