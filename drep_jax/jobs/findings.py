"""What a finished run is described by: its sites, what denoisers keep of each, and what the networks cost."""

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from drep_jax.core import closed_form
from drep_jax.core.explicit import explicit_apply
from drep_jax.core.fusion import composed_maps
from drep_jax.evaluation import cost
from drep_jax.learners import Learned
from drep_jax.run.moments import MOMENTS, moments_of
from drep_jax.run.setup import Setting
from drep_jax.trees import get_in
from drep_jax.typing import Config, Tree


def spectra(
    config: Config,
    setting: Setting,
    variables: Tree,
    directory: str,
    params: Tree,
    *,
    trained: bool,
    rule: str,
    steps: int,
) -> dict[str, Any]:
    """Returns the report's `spectra`: how much of each principal axis of a site's features its denoiser keeps.

    Moments of a backbone that was `trained` beside its denoisers are taken anew, and kept apart from the run's.
    """
    path = os.path.join(directory, "trained_moments.npz" if trained else MOMENTS)
    moments = moments_of(config, setting, variables, path)
    maps = composed_maps(params, setting.sites, setting.schedule, rule=rule, steps=steps)
    return {
        site.name: closed_form.spectrum(
            moments[site.path], np.eye(site.width) + np.swapaxes(np.asarray(maps[site.path]["matrix"]), -1, -2)
        )
        for site in setting.sites
    }


def describe_sites(setting: Setting, before: Tree, after: Tree) -> list[dict[str, Any]]:
    """Returns the report's list of sites with the relative change ‖W' − W‖ / ‖W‖ of each (largest over its layers)."""
    rows = []
    for site in setting.sites:
        changes = []
        for layer in site.layers:
            old, new = (np.asarray(get_in(tree, layer.path)["kernel"], np.float64) for tree in (before, after))
            old, new = (leaf.reshape(site.stack or 1, -1) for leaf in (old, new))
            changes.append(np.linalg.norm(new - old, axis=1) / np.linalg.norm(old, axis=1))
        rows.append(
            {
                "path": site.name,
                "layers": [layer.name for layer in site.layers],
                "kind": site.kind,
                "width": site.width,
                "groups": site.groups,
                "bias": site.bias,
                "t": [*site.times],
                "relative_change": [float(value) for value in np.max(changes, axis=0)],
            }
        )
    return rows


def measure_cost(
    config: Config,
    setting: Setting,
    variables: Tree,
    fused: Tree,
    learned: Learned,
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """Measures FLOPs and interleaved latency of baseline, fused and explicit network, and of others, on one batch."""
    batch = config["evaluate"]["latency_batch"]
    images = jax.random.normal(jax.random.key(0), (batch, *setting.images.shape[1:]))
    backbone = setting.backbone
    plain = jax.jit(lambda v, x: backbone.apply(v, x))
    explicit = jax.jit(
        lambda v, d, x: explicit_apply(
            backbone, v, d, setting.sites, setting.schedule, x, rule=learned.rule, steps=learned.steps
        )
    )
    after = jax.device_put({**variables, "params": fused})
    before, denoise = jax.device_put(dict(variables)), jax.device_put(learned.denoise)
    compiled = {name: jax.jit(network) for name, network in others.items()}
    times = cost.interleaved(
        {
            "baseline": lambda: plain(before, images),
            "fused": lambda: plain(after, images),
            "explicit": lambda: explicit(before, denoise, images),
            **{name: functools.partial(network, before, images) for name, network in compiled.items()},
        },
        rounds=config["latency_rounds"],
    )
    flops = {
        "baseline": cost.flops(plain, before, images),
        "fused": cost.flops(plain, after, images),
        "explicit": cost.flops(explicit, before, denoise, images),
        **{name: cost.flops(network, before, images) for name, network in compiled.items()},
    }
    count = {
        name: sum(leaf.size for leaf in jax.tree_util.tree_leaves(tree))
        for name, tree in {"backbone": variables["params"], "denoise": denoise}.items()
    }
    return {
        "flops": flops,
        "flop_ratio": {name: flops[name] / flops["baseline"] for name in flops if name != "baseline"},
        "latency_ms": {name: 1e3 * float(np.median(values)) for name, values in times.items()},
        "latency_ratio": {name: r for name, r in cost.ratios(times, "baseline").items() if name != "baseline"},
        "parameters": count,
        "batch": batch,
    }
