"""Which denoisers have another form than the usual one, and why, in words."""

import math
from collections.abc import Iterable, Sequence

from drep_jax.core.layers import NO_IMAGES, Layer
from drep_jax.core.sites import POSITIONS, Site
from drep_jax.typing import Path

SHOWN = 8
"""Names in a line, at most."""


def form_lines(
    sites: Sequence[Site], max_patch_width: int, idle: Sequence[Path] = (), layers: Sequence[Layer] = ()
) -> list[str]:
    """Returns a line on each form of denoisers that the network makes necessary.

    Args:
      sites: of the network.
      max_patch_width: see `drep_jax.core.sites.select_sites`.
      idle: layers that no output depends on, see `drep_jax.core.idle.find_idle`.
      layers: all of the network, of which those that no image reaches are named.

    >>> import flax.linen as nn, jax
    >>> from drep_jax import find_sites
    >>> x = jax.ShapeDtypeStruct((1, 8, 8, 300), "float32")
    >>> form_lines(find_sites(nn.Sequential([nn.Conv(4, (3, 3))]), x), 2304)[0]
    'Pointwise, because a patch is wider than sites.max_width=2304: layers_0 (2,700).'
    """
    wide = {
        site.name: f"{width:,}"
        for site in sites
        if site.kind == "pointwise" and (width := patch_width(site.layers[0])) > max_patch_width
    }
    parts: dict[str, list[int]] = {}
    for site in sites:
        for layer in site.layers:
            if layer.part is not None:
                parts.setdefault(layer.name, []).append(layer.part.end - layer.part.first)
    sums = {name: " + ".join(f"{size:,}" for size in sizes) for name, sizes in parts.items()}
    lines = []
    if wide:
        lines.append(f"Pointwise, because a patch is wider than sites.max_width={max_patch_width}: {_listed(wide)}.")
    if sums:
        lines.append(f"One denoiser for each source of a concatenation: {_listed(sums)}.")
    several = {layer.name: f"{layer.calls}×" for site in sites for layer in site.layers if layer.calls > 1}
    if several:
        alike = "all their feature vectors" if sites[0].call_weights == POSITIONS else "all calls"
        lines.append(f"Called several times, with one denoiser, for which {alike} weigh alike: {_listed(several)}.")
    if constant := {layer.name: "" for layer in layers if layer.refusal == NO_IMAGES}:
        lines.append(f"No image reaches {_listed(constant)}: nothing to denoise there.")
    if idle:
        names = dict.fromkeys(map("/".join, idle), "")
        lines.append(
            f"No output depends on {_listed(names)}: no denoiser there, and fusing leaves the weights as they are."
        )
    return lines


def patch_width(layer: Layer) -> int:
    """Returns the width of a layer's patch denoiser; 0 where it would be no other than the pointwise one."""
    if layer.window is None or layer.window.single:
        return 0
    return math.prod(layer.kernel_shape[:-1])


def _listed(notes: dict[str, str]) -> str:
    def entries() -> Iterable[str]:
        for name, note in list(notes.items())[:SHOWN]:
            yield f"{name} ({note})" if note else name
        if len(notes) > SHOWN:
            yield f"… ({len(notes)} in all)"

    return ", ".join(entries())
