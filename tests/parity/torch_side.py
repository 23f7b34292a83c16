"""PyTorch's half of the comparisons with timm and torchvision: networks with random weights, their files and outputs."""

import jax
import numpy as np
import torch

from drep_jax.core.fusion import fuse_exact
from drep_jax.core.layers import find_layers
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import assign_times, select_sites
from tests.named_weights import named_weights

SCHEDULE = Schedule(timesteps=1000, beta_start=1e-4, beta_end=0.02)


def draw_weights(net):
    """Draws all parameters and running statistics at random; returns them as arrays by name."""
    floats = {name: tensor for name, tensor in net.state_dict().items() if tensor.is_floating_point()}
    drawn = named_weights({name: tuple(tensor.shape) for name, tensor in floats.items()}, spread="fan_in")
    net.load_state_dict({name: torch.from_numpy(array) for name, array in drawn.items()}, strict=False)
    return drawn


def save_network(net, path):
    torch.save({"state_dict": net.state_dict(), "epoch": 7}, path)
    return str(path)


def outputs(net, images):
    """(features that the classifier reads, logits) of a timm or torchvision network."""
    seen = []
    head = net.get_submodule("head" if hasattr(net, "head") else "fc")
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].numpy()))
    with torch.no_grad():
        logits = net.eval()(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))).numpy()
    handle.remove()
    return seen[0], logits


def pictures(batch, size):
    return np.random.default_rng(batch).normal(size=(batch, *size, 3)).astype(np.float32)


def without_head(variables):
    return {**variables, "params": {name: p for name, p in variables["params"].items() if name not in ("head", "fc")}}


def check_outputs(name, module, variables, net, batch, size, bound=1e-4):
    """Compares features and logits; prints and returns the larger max|Δ| / max|output|."""
    images, worst = pictures(batch, size), 0.0
    headless = module.clone(num_classes=0)
    ours = jax.jit(headless.apply)(without_head(variables), images), jax.jit(module.apply)(variables, images)
    for kind, got, expected in zip(("features", "logits"), ours, outputs(net, images), strict=True):
        error = float(np.abs(got - expected).max() / np.abs(expected).max())
        print(f"\n{name} {batch}×{size} {kind}: max|Δ| / max|output| = {error:.1e}", end="")
        assert got.shape == expected.shape and np.ptp(expected, axis=1).min() > 0.1 and error < bound
        worst = max(worst, error)
    return worst


def fused(module, variables, size, pattern, channels=3):
    """The variables with random denoisers fused into the layers of a pattern."""
    layers = find_layers(module, jax.ShapeDtypeStruct((1, *size, channels), np.float32))
    sites = assign_times(select_sites(layers, pattern), timesteps=1000, steps=1, time_scale=10.0)
    rng, tree = np.random.default_rng(3), {}
    for site in sites:
        leaf = {"kernel": rng.normal(0, 0.3, site.denoiser_shape) / np.sqrt(site.denoiser_shape[-1])}
        if site.bias:
            leaf["bias"] = rng.normal(0, 0.3, site.denoiser_shape[:-1])
        at = tree
        for part in site.path[:-1]:
            at = at.setdefault(part, {})
        at[site.path[-1]] = {key: array.astype(np.float32) for key, array in leaf.items()}
    params = fuse_exact({"backbone": variables["params"], "denoise": tree}, sites, SCHEDULE)
    assert jax.tree_util.tree_structure(params) == jax.tree_util.tree_structure(variables["params"])
    return {**variables, "params": params}
