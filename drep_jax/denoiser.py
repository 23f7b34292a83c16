"""The denoisers at work: the explicit path (Eq. 5), Algorithm 1's loss (Eq. 11) and the `DenoiseRep` module.

Everything here runs a backbone under `nn.intercept_methods`, so the backbone itself never mentions denoising. What a site
needs (its denoiser, its numbers) travels as extra leaves next to the layer's own parameters, because under `nn.scan` only
those are sliced for each copy.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Float, Int

from drep_jax.denoise_tree import check_params, get_in, init_denoise, set_in, site_steps
from drep_jax.errors import ConfigError, SiteError, did_you_mean
from drep_jax.linear_view import affine, features, input_from_features, kernel_matrix
from drep_jax.low_rank import dtype_of, predict
from drep_jax.schedule import Schedule
from drep_jax.sites import COLLECTION, Layer, Path, Site

Tree = Any
Visit = Callable[[Site, Layer, nn.Module, Any, Any, Callable[[Any], Any]], Any]

EXTRA = "denoise"
"""Name of the leaves that travel beside a layer's kernel and bias while a backbone is visited."""


def visit_sites(
    backbone: nn.Module,
    variables: Tree,
    sites: Sequence[Site],
    extras: Mapping[Path, Tree],
    visit: Visit,
    *args: Any,
    collect: bool = False,
    **kwargs: Any,
) -> Any:
    """Runs `backbone` and hands every selected layer to `visit` instead of calling it.

    Args:
      backbone: an unbound Linen module.
      variables: its variables, {"params": …, …}.
      sites: the sites to visit.
      extras: for each layer path, a tree that the visit gets; leaves of stacked layers have the stack as first axis.
      visit: called as `visit(site, layer, module, extra, x, call)`, where `call(x)` is the layer itself; returns its output.
      *args, **kwargs: for the backbone.
      collect: whether the collection "denoise" may be written; the result is then (outputs, collection).
    """
    table = {layer.path: (site, layer) for site in sites for layer in site.layers}
    params = variables["params"]
    for path, extra in extras.items():
        params = set_in(params, (*path, EXTRA), extra)

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name != "__call__" or module.path not in table:
            return next_fun(*args, **kwargs)
        x = args[0] if args else kwargs["inputs"]
        return visit(*table[module.path], module, module.get_variable("params", EXTRA), x, next_fun)

    with nn.intercept_methods(intercept):
        out = backbone.apply(
            {**variables, "params": params}, *args, mutable=[COLLECTION] if collect else False, **kwargs
        )
    return (out[0], out[1].get(COLLECTION, {})) if collect else out


def sow(module: nn.Module, layer: Layer, name: str, value: Any) -> None:
    """Adds `value` to the collection "denoise" at this layer.

    Raises:
      SiteError: under an `nn.scan` or `nn.vmap` that does not lift the collection; names the line to add.
    """
    if not module.is_mutable_collection(COLLECTION):
        raise SiteError(
            f"{layer.name} runs under nn.scan or nn.vmap, which hides the collection that its statistics are written to. Add "
            f"'{COLLECTION}': 0 to its axes, as in nn.scan(…, variable_axes={{'params': 0, '{COLLECTION}': 0}}, …)."
        )
    module.sow(COLLECTION, name, value, init_fn=lambda: jnp.zeros_like(value), reduce_fn=jnp.add)


# ---------------------------------------------------------------------------------------------------------------------
# Explicit path
# ---------------------------------------------------------------------------------------------------------------------


def denoise_features(denoiser: Tree, triples: Float[Array, "k 3"], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Applies k reverse steps x̂ = s·x − g·D(x) + σ·z to feature vectors (…, [groups], d), largest t first (Eq. 5)."""
    dtype = jnp.promote_types(x.dtype, dtype_of(denoiser))
    x, triples = x.astype(dtype), triples.astype(dtype)
    for j in range(triples.shape[0]):
        scale, gain, sigma = triples[j]
        predicted = predict(denoiser, x)
        x = scale * x - gain * predicted
        if "z" in denoiser:
            z = sigma * denoiser["z"][j]
            x = x + z.reshape((1,) * (x.ndim - z.ndim) + z.shape)
    return x


def call_denoised(site: Site, layer: Layer, module: nn.Module, extra: Tree, x: Any, call: Callable[[Any], Any]) -> Any:
    """Calls a layer on its denoised input; a patch denoiser works on the windows, after padding."""
    vectors = denoise_features(extra["denoiser"], extra["triples"], features(layer, site.kind, x))
    if site.kind != "patch":
        return call(input_from_features(layer, vectors, x))
    weights: Any = (module.get_variable("params", name) for name in ("kernel", "bias"))
    vectors, kernel, bias = module.promote_dtype(vectors, *weights, dtype=module.dtype)
    matrix = kernel_matrix(layer, site.kind, kernel)
    y = affine(vectors, matrix[0] if site.groups == 1 else matrix, precision=module.precision)
    y = y if site.groups == 1 else y.reshape(*y.shape[:-2], -1)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def explicit_extras(
    denoise: Tree, sites: Sequence[Site], schedule: Schedule, rule: str, steps: int | None = None
) -> dict[Path, Tree]:
    """Returns what `call_denoised` needs at every layer: the site's denoiser and its reverse-step triples."""
    table = site_steps(sites, schedule, rule, steps)
    return {
        layer.path: {"denoiser": dict(get_in(denoise, site.path)), "triples": _floating(table[site.path])}
        for site in sites
        for layer in site.layers
    }


def _floating(values: np.ndarray) -> Array:
    return jnp.asarray(values, jax.dtypes.canonicalize_dtype(np.float64))


def explicit_apply(
    backbone: nn.Module,
    variables: Tree,
    denoise: Tree,
    sites: Sequence[Site],
    schedule: Schedule,
    *args: Any,
    rule: str = "ddpm",
    steps: int | None = None,
    **kwargs: Any,
) -> Any:
    """Runs the backbone with every site's input denoised in plain sight: what `fuse` has to reproduce, at extra cost.

    Args:
      backbone: an unbound Linen module.
      variables: the backbone's own, {"params": …, …}.
      denoise: the denoisers, see `drep_jax.denoise_tree`.
      sites, schedule, rule, steps: see `drep_jax.fusion.fuse`.
      *args, **kwargs: for the backbone.
    """
    extras = explicit_extras(denoise, sites, schedule, rule, steps)
    return visit_sites(backbone, variables, sites, extras, call_denoised, *args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1
# ---------------------------------------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[[Any], Any]] = {
    "l2": lambda residual: jnp.mean(jnp.square(residual)),
    "l1": lambda residual: jnp.mean(jnp.abs(residual)),
    "l1+l2": lambda residual: jnp.mean(jnp.abs(residual)) + jnp.mean(jnp.square(residual)),
}


def algorithm1_losses(
    backbone: nn.Module,
    variables: Tree,
    denoise: Tree,
    sites: Sequence[Site],
    schedule: Schedule,
    key: jax.Array,
    index: Int[Array, " batch"],
    *args: Any,
    loss: str = "l2",
    tokens: float = 1.0,
    **kwargs: Any,
) -> dict[str, Array]:
    """Computes every site's denoising loss in one forward pass of the frozen backbone (Algorithm 1, Eq. 11).

    At each site, with its input features F and its own t:  X_t = √ᾱ_t·F + √(1−ᾱ_t)·ε,  loss = mean (ε − D(X_t))² over all
    numbers (l2), mean |ε − D(X_t)| (l1), or their sum. Predicting no noise gives 1 (l2). No gradient flows through the
    backbone. ε depends on (key, example index, site) only, so neither the batch's order nor the number of devices matter.

    Args:
      backbone, variables: the frozen backbone.
      denoise: the denoisers.
      sites, schedule: where, and at which t.
      key: the step's key.
      index: global number of each example, (batch,).
      *args: the batch, first axis (batch,); the rest for the backbone.
      loss: "l2", "l1" or "l1+l2".
      tokens: share of the feature vectors of each example to use, drawn anew by systematic sampling; the loss is an
        expectation over them, so a sample of them gives an unbiased gradient for less work.
      **kwargs: for the backbone.

    Returns:
      {site name: loss}, a scalar each or one number a stacked copy.
    """
    if loss not in LOSSES:
        raise ConfigError(f'Unknown loss "{loss}".{did_you_mean(loss, LOSSES)}')
    if not 0.0 < tokens <= 1.0:
        raise ConfigError(f"tokens is the share of feature vectors to use and lies in (0, 1], got {tokens!r}.")
    key = _threefry(key)
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(index)
    extras, slot = {}, 0
    for site in sites:
        count = site.stack or 1
        bars = np.array([schedule.alpha_bar(t) for t in site.times])
        numbers = {
            "signal": _floating(np.sqrt(bars)),
            "noise": _floating(np.sqrt(1.0 - bars)),
            "slot": jnp.arange(slot, slot + count, dtype=jnp.int32),
        }
        slot += count
        if site.stack is None:
            numbers = {name: value[0] for name, value in numbers.items()}
        extras[site.path] = {"denoiser": dict(get_in(denoise, site.path)), **numbers}

    def visit(site: Site, layer: Layer, module: nn.Module, extra: Tree, x: Any, call: Any) -> Any:
        if layer.path == site.path:  # the other layers of a site read the same tensor
            clean = jax.lax.stop_gradient(features(layer, site.kind, x))
            value = _site_loss(clean, site, extra, key, keys, LOSSES[loss], tokens)
            sow(module, layer, "loss", value)
            sow(module, layer, "calls", jnp.ones_like(value))
        return call(x)

    _, collected = visit_sites(backbone, variables, sites, extras, visit, *args, collect=True, **kwargs)
    losses = {}
    for site in sites:
        leaves = get_in(collected, site.path)
        value = leaves["loss"] / leaves["calls"]
        # What is left after the stack are the calls of one layer that nn.scan repeats or nn.vmap spreads.
        losses[site.name] = value.mean(axis=tuple(range(0 if site.stack is None else 1, value.ndim)))
    return losses


def _site_loss(clean: Any, site: Site, extra: Tree, key: Any, keys: Any, loss: Any, tokens: float) -> Any:
    shape = (site.width,) if site.groups == 1 else (site.groups, site.width)
    batch = keys.shape[0]
    if clean.ndim > len(shape) and clean.shape[0] % batch == 0:
        clean = clean.reshape(batch, -1, *shape)
        keys = jax.vmap(lambda k: jax.random.fold_in(k, extra["slot"]))(keys)
    else:  # features without a batch axis, of a table that is the same for every example
        clean = clean.reshape(1, -1, *shape)
        keys = jax.random.fold_in(key, extra["slot"])[None]
    if tokens < 1.0:
        pick = jax.vmap(lambda k: systematic(jax.random.fold_in(k, 1), clean.shape[1], tokens))(keys)
        clean = jnp.take_along_axis(clean, pick.reshape(*pick.shape, *(1,) * len(shape)), axis=1)
    dtype = jnp.promote_types(clean.dtype, dtype_of(extra["denoiser"]))
    noise = _draw(keys, clean.shape[1:], dtype)
    noisy = extra["signal"].astype(dtype) * clean.astype(dtype) + extra["noise"].astype(dtype) * noise
    return _regression(loss, extra["denoiser"], noisy.reshape(-1, *shape), noise.reshape(-1, *shape))


def _threefry(key: Any) -> Any:
    """Returns a threefry key: other generators ("rbg"), mapped over keys, draw for the batch and not for each key."""
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")


def _draw(keys: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns ε ~ N(0, I) of (keys, *shape), each (threefry) key's part a function of that key alone.

    Two chunks in a loop, because XLA fuses a loop's result into nothing: it would draw the noise again at each use. And
    both words of a threefry block are used, which `jax.random` does not; together they halve the cost of the noise.
    """

    def one(key: Any) -> Any:
        if dtype != jnp.float32:
            return jax.random.normal(key, shape, dtype)
        size = math.prod(shape)
        bits = threefry_2x32(jax.random.key_data(key), jnp.arange(size + size % 2, dtype=jnp.uint32))[:size]
        unit = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1.0  # [0, 1)
        inside = jnp.float32(1.0 - 2.0**-24)
        return jnp.float32(math.sqrt(2.0)) * jax.lax.erf_inv(jnp.maximum(2.0 * unit - inside, -inside)).reshape(shape)

    return jax.lax.map(one, keys, batch_size=-(-keys.shape[0] // 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _regression(loss: Any, denoiser: Tree, noisy: Any, noise: Any) -> Any:
    """Returns loss(ε − D(X_t)); its gradient is taken on the spot, so X_t and ε need not be kept for a backward pass."""
    return loss(noise - predict(denoiser, noisy))


def _regression_forward(loss: Any, denoiser: Tree, noisy: Any, noise: Any) -> Any:
    return jax.value_and_grad(lambda d: loss(noise - predict(d, noisy)))(denoiser)


def _regression_backward(loss: Any, gradient: Tree, weight: Any) -> Any:
    return jax.tree_util.tree_map(lambda leaf: (weight * leaf).astype(leaf.dtype), gradient), None, None


_regression.defvjp(_regression_forward, _regression_backward)


def systematic(key: Any, total: int, share: float) -> Int[Array, " picked"]:
    """Returns the positions of a systematic sample: evenly spread from a random start, each position equally likely."""
    picked = max(1, round(share * total))
    spread = (np.arange(picked) * total) // picked  # in NumPy's int64: the product of two numbers of pixels
    return (jax.random.randint(key, (), 0, total) + jnp.asarray(spread, jnp.int32)) % total


# ---------------------------------------------------------------------------------------------------------------------
# Module
# ---------------------------------------------------------------------------------------------------------------------


class DenoiseRep(nn.Module):
    """A backbone with a denoiser before every selected layer; parameters {"backbone": its own tree, "denoise": …}.

    Calling it takes the explicit path; `denoising_losses` gives Algorithm 1's; `drep_jax.fuse(params, sites, schedule)`
    returns weights with which the plain backbone computes the same. Other collections of the backbone (batch statistics)
    are kept under their own names and are read, not updated.

    Attributes:
      backbone: any Linen module.
      sites: from `find_sites`.
      schedule: the noise schedule.
      rule: reverse-step rule, see `drep_jax.schedule.reverse_step`.
      steps: reverse steps a site; None for the number the sites were given.
    """

    backbone: nn.Module
    sites: tuple[Site, ...]
    schedule: Schedule = Schedule()
    rule: str = "ddpm"
    steps: int | None = None

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the explicit path."""
        backbone, variables, denoise = self._parts(*args, **kwargs)
        return explicit_apply(
            backbone, variables, denoise, self.sites, self.schedule, *args, rule=self.rule, steps=self.steps, **kwargs
        )

    @nn.compact
    def denoising_losses(self, key: jax.Array, index: Any, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Returns `algorithm1_losses` of this module's own parameters."""
        options = {name: kwargs.pop(name) for name in ("loss", "tokens") if name in kwargs}
        backbone, variables, denoise = self._parts(*args, **kwargs)
        return algorithm1_losses(
            backbone, variables, denoise, self.sites, self.schedule, key, index, *args, **options, **kwargs
        )

    def _parts(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, Tree, Tree]:
        if self.is_initializing():
            self.backbone(*args, **kwargs)  # as a plain submodule, so that its variables are made where it expects them
            denoise = self.param("denoise", lambda _: init_denoise(self.sites))
        else:
            denoise = self.get_variable("params", "denoise")
        variables = self.backbone.variables
        given = {"backbone": variables.get("params"), "denoise": denoise}
        check_params({name: tree for name, tree in given.items() if tree is not None}, self.sites)
        return self.backbone.clone(parent=None), variables, denoise
