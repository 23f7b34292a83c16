"""BNNeck (Luo et al. 2019, section 3.5): metric losses see the feature, a batch norm without bias and a classifier follow."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

FEATURES = ("before", "after")
"""Where the feature that is ranked is taken: before or after the batch norm."""


class BNNeck(nn.Module):
    """Batch norm (shift held at 0) and a classifier without bias.

    Attributes:
      num_classes: identities of the training images; 0 for no classifier.
      axis_name: mapped axis over which the batch norm shares its statistics; None keeps them per
        device.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    num_classes: int
    axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, feature: Float[Array, "batch width"], train: bool, classify: bool
    ) -> tuple[Float[Array, "batch width"], Float[Array, "batch classes"] | None]:
        """Returns the feature after the batch norm, and the logits if asked for (and if there is a classifier).

        Args:
          feature: that before the batch norm.
          train: whether the batch norm uses, and updates with, the statistics of this batch.
          classify: whether the classifier runs; ranking has no use for it.
        """
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        after = nn.BatchNorm(
            not train,
            epsilon=1e-5,
            momentum=0.9,
            use_bias=False,
            axis_name=self.axis_name,
            use_fast_variance=False,  # E[x²] - E[x]² loses the digits in which the features of images differ
            **dtypes,
            name="bottleneck",
        )(feature)
        if not self.num_classes or not (classify or self.is_initializing()):
            return after, None
        init = nn.initializers.normal(0.001)
        head = nn.Dense(self.num_classes, use_bias=False, kernel_init=init, **dtypes, name="classifier")
        return after, head(after)
