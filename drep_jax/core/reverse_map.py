"""The reverse steps of a site as one affine map: k steps x̂ = A_j x + c_j compose (Eq. 5, Eq. 7).

One step is x̂ = A x + c with A = s·I − g·W_D and c = σ·z − g·b_D. Behind k steps, the largest t
first, a layer y = W x̂ + b is

    W' = W A_k⋯A_1            b' = b + W Σ_j A_k⋯A_{j+1} c_j

Going from the last step to the first needs no product of two d×d matrices. With the layer's Flax
kernel K = Wᵀ and D(x) = x·K_D + b_D,

    b ← b + Kᵀ c_j            K ← s_j·K − g_j·K_D·K            for j = k … 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from drep_jax.core.linear_denoiser import dtype_of, times_kernel
from drep_jax.core.schedule import Schedule, reverse_steps
from drep_jax.core.sites import Site
from drep_jax.errors import FusionError
from drep_jax.trees import get_in
from drep_jax.typing import AnyArray, Path, Tree


def site_steps(
    sites: Sequence[Site], schedule: Schedule, rule: str, steps: int | None = None
) -> dict[Path, Float[np.ndarray, "... 3"]]:
    """Returns the triples of each site's k reverse steps down from its own t.

    Args:
      sites: with time steps.
      schedule: the one the denoisers were learned on.
      rule: see `drep_jax.core.schedule.reverse_step`.
      steps: k; at most the number the sites were given, since a denoiser is tied to its t.

    Returns:
      {site path: ([stack], k, 3)}, float64.

    Raises:
      FusionError: for sites without time steps, or more steps than they were given.
      ConfigError: for an unknown rule or a t outside the schedule.
    """
    table = {}
    for site in sites:
        if not site.times:
            raise FusionError(f"{site.name} has no time step yet: call `assign_times` on the selected sites.")
        k = site.steps if steps is None else steps
        if k > site.steps:
            raise FusionError(
                f"{k} steps a site would need denoisers learned at other time steps (t falls by {k} from site to site; "
                f"these were learned with {site.steps}). Learn them again with steps={k}."
            )
        triples = np.stack([reverse_steps(schedule, t, k, rule) for t in site.times])
        table[site.path] = triples[0] if site.stack is None else triples
    return table


def carry_through_steps(
    site: Site,
    kernel: Float[AnyArray, "groups d columns"],
    denoiser: Mapping[str, Any],
    triples: Float[AnyArray, "k 3"],
) -> tuple[Float[AnyArray, "groups d columns"], Float[AnyArray, "groups columns"]]:
    """Carries a layer's kernel K through the steps, last one first.

    Args:
      site: gives the groups and the width d.
      kernel: K.
      denoiser: of one layer, without the axis of a stack.
      triples: (scale, gain, sigma) of each step, first step first.

    Returns:
      K', and what the steps add to the bias.
    """

    def kernel_times(vector: Any) -> Any:  # Kᵀ v for each group
        vector = vector.reshape(site.groups, site.width)
        return jnp.einsum("gdc,gd->gc", kernel, vector, precision=jax.lax.Precision.HIGHEST)

    constant = jnp.zeros((kernel.shape[0], kernel.shape[2]), kernel.dtype)
    for j in reversed(range(triples.shape[0])):
        scale, gain, sigma = triples[j]
        if "bias" in denoiser:
            constant = constant - gain * kernel_times(denoiser["bias"])
        if "z" in denoiser:
            constant = constant + sigma * kernel_times(denoiser["z"][j])
        kernel = scale * kernel - gain * times_kernel(denoiser, site.groups, kernel)
    return kernel, constant


def compose_steps(
    denoise: Tree, sites: Sequence[Site], schedule: Schedule, rule: str, steps: int | None
) -> dict[Path, dict[str, Any]]:
    """Returns each site's k steps as one map x̂ = x + x·matrix + constant.

    matrix = (A_k⋯A_1 − I)ᵀ and constant = Σ_j A_k⋯A_{j+1} c_j.

    Args:
      denoise: the `denoise` subtree.
      sites, schedule, rule, steps: see `site_steps`.

    Returns:
      {site path: {"matrix", "constant"}}, shaped as the denoiser's kernel and bias; no "constant"
      where a site may have none.
    """
    table = site_steps(sites, schedule, rule, steps)
    maps = {}
    for site in sites:

        def compose(denoiser: Any, triples: Any, site: Site = site) -> Any:
            shape = site.denoiser_shape[0 if site.stack is None else 1 :]
            eye = jnp.eye(site.width, dtype=dtype_of(denoiser))[None]
            matrix, constant = carry_through_steps(site, jnp.repeat(eye, site.groups, axis=0), denoiser, triples)
            leaves = {"matrix": (matrix - eye).reshape(shape)}
            return {**leaves, "constant": constant.reshape(shape[:-1])} if site.bias else leaves

        denoiser = dict(get_in(denoise, site.path))
        triples = jnp.asarray(table[site.path], dtype_of(denoiser))
        maps[site.path] = (compose if site.stack is None else jax.vmap(compose))(denoiser, triples)
    return maps
