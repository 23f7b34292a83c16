"""The certificate of the merge: the plain ViT against the autoencoder's encoder at t, measured on the *change*.

The change is what the time step makes of the encoder: base is the same network with modulations
that do nothing (scale and shift 0, gate 1).

    error = ‖merged − conditioned‖ / ‖conditioned − base‖
    bound = 32·ε·(‖base‖ + ‖conditioned‖) / ‖conditioned − base‖

These are the quantities of `drep_jax.core.certificate`, so a merge that forgets a gate or a shift
fails where a tolerance on the output would pass it. Each block is compared by itself on the tokens
of the conditioned encoder, and the whole network on images; in float64 and as stored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from drep_jax.core.certificate import NO_CHANGE, wide_leaf
from drep_jax.core.deployed import undo_rounding
from drep_jax.core.figure import Figure, figure
from drep_jax.core.precision import epsilon, type_name, widened
from drep_jax.models.autoencoder import ConditionedBlock, DenoisingAutoencoder, patches_of
from drep_jax.models.transformer import EncoderBlock, layer_norm
from drep_jax.models.vit import ViT
from drep_jax.pretraining.merge import merge, neutral
from drep_jax.pretraining.objective import Objective
from drep_jax.typing import Tree


@dataclasses.dataclass(frozen=True)
class MergeCertificate:
    """The result of `certify_merge`.

    Attributes:
      t: the time step that was merged.
      end_to_end: precision ("float64", then the type of the stored weights) ↦ figure of the pooled
        features.
      blocks: precision ↦ {block: figure}, each on the conditioned encoder's tokens.
      structure: "same_tree" and "same_dtypes" as the ViT's own parameters.
    """

    t: int
    end_to_end: Mapping[str, Figure]
    blocks: Mapping[str, Mapping[str, Figure]]
    structure: Mapping[str, bool]

    @property
    def passed(self) -> bool:
        """Whether the ViT equals the encoder at t in every precision, and has the ViT's structure."""
        exact = [self.end_to_end["float64"], *self.blocks["float64"].values()]
        figures = [*self.end_to_end.values(), *(one for rows in self.blocks.values() for one in rows.values())]
        return (
            all(one.passed for one in figures)
            and all(one.decisive or one.change <= NO_CHANGE for one in exact)
            and all(self.structure.values())
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the certificate as JSON values."""
        results = {
            name: {**end.to_json(), "blocks": {block: one.to_json() for block, one in self.blocks[name].items()}}
            for name, end in self.end_to_end.items()
        }
        return {"passed": self.passed, "t": self.t, "results": results, "structure": dict(self.structure)}

    def __str__(self) -> str:
        lines = [f"Merge of time step {self.t}: {'PASSED' if self.passed else 'FAILED'}"]
        for name, end in self.end_to_end.items():
            rows = self.blocks[name]
            worst = max(rows, key=lambda block: rows[block].error / rows[block].bound)
            lines.append(
                f"  {name:8s} end to end: error {end.error:.1e} of the change, bound {end.bound:.1e}; "
                f"worst block {worst}: {rows[worst].error:.1e}, bound {rows[worst].bound:.1e}"
            )
        marks = ", ".join(f"{name.replace('_', ' ')}: {'yes' if ok else 'NO'}" for name, ok in self.structure.items())
        change = self.end_to_end["float64"].change
        return "\n".join([*lines, f"  the time step changes the features by {100 * change:.3g} %;  {marks}"])


def pooled(vit: ViT, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
    """Returns the features of the encoder's tokens: their mean, with a norm without parameters where the ViT has one."""
    norm: Any = layer_norm("norm", vit.norm_eps, None, tokens.dtype)
    identity: Any = {"params": {"scale": jnp.ones(vit.width, tokens.dtype), "bias": jnp.zeros(vit.width, tokens.dtype)}}
    if not vit.final_norm:
        return tokens.mean(axis=1)
    if vit.pool == "mean":
        return norm.apply(identity, tokens.mean(axis=1))
    return norm.apply(identity, tokens).mean(axis=1)


def encoder_features(
    net: DenoisingAutoencoder,
    params: Tree,
    objective: Objective,
    vit: ViT,
    images: Any,
    t: int,
    *,
    project: bool = True,
) -> Float[Array, "batch width"]:
    """Returns the pooled features of clean images from the autoencoder itself, told t."""
    patches = encoder_input(objective, vit, images, t, project)
    tokens: Any = net.apply({"params": params}, patches, jnp.full(len(images), t, patches.dtype), method="encode")
    return pooled(vit, tokens)


def encoder_input(objective: Objective, vit: ViT, images: Any, t: int, project: bool) -> Any:
    """Returns what the encoder is given of clean images; see `drep_jax.pretraining.merge.merge`."""
    patches = patches_of(images, objective.pca.patch)
    whole = objective.inputs == "image" and objective.noise == "latent" and not project
    return patches if whole else objective.clean_input(patches, t)


def certify_merge(
    net: DenoisingAutoencoder,
    params: Tree,
    objective: Objective,
    vit: ViT,
    abstract: Tree,
    images: Float[Array, "batch height width channels"],
    t: int,
    *,
    project: bool = True,
    merged: Tree | None = None,
) -> MergeCertificate:
    """Compares the merged ViT with the encoder at time step t, in float64 and as stored.

    Args:
      net, params: the autoencoder.
      objective: that it was trained for.
      vit: the plain ViT, without a head.
      abstract: shapes of its parameters.
      images: normalized; use real ones.
      t, project: see `drep_jax.pretraining.merge.merge`.
      merged: the parameters to deploy, without a head; merged here by default. In float64 they are
        compared without the rounding to their type, so that a wrong leaf shows in any type.
    """
    exact = merge(params, objective, vit, abstract, t, project=project, round_back=False)
    stored = merge(params, objective, vit, abstract, t, project=project)
    deployed = stored if merged is None else merged
    base = merge(params, objective, vit, abstract, t, project=project, given=_nothing(params), round_back=False)
    measured = undo_rounding(*({"params": tree} for tree in (exact, stored, deployed, stored)))["params"]
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        free = net.clone(dtype=None, param_dtype=jnp.float64)
        wide = jax.tree_util.tree_map(wide_leaf, (params, measured, base, images))
        with widened():
            wide_vit = vit.clone(dtype=None, param_dtype=jnp.float64)
            results = {"float64": _measure(free, objective, wide_vit, wide, t, project)}
    name = type_name(jax.tree_util.tree_leaves(deployed))
    if name != "float64":
        base = jax.tree_util.tree_map(lambda leaf, like: leaf.astype(like.dtype), base, stored)
        results[name] = _measure(net, objective, vit, (params, deployed, base, images), t, project)
    trees: list[Any] = [jax.tree_util.tree_structure(tree) for tree in (deployed, abstract)]
    shapes = trees[0] == trees[1]
    types = [np.asarray(leaf).dtype for leaf in jax.tree_util.tree_leaves(deployed)]
    return MergeCertificate(
        t=t,
        end_to_end={name: end for name, (end, _) in results.items()},
        blocks={name: rows for name, (_, rows) in results.items()},
        structure={
            "same_tree": shapes,
            "same_dtypes": shapes and types == [leaf.dtype for leaf in jax.tree_util.tree_leaves(abstract)],
        },
    )


def _nothing(params: Tree) -> list[dict[str, np.ndarray]] | None:
    return neutral(params) if "time" in params else None


def _measure(
    net: DenoisingAutoencoder,
    objective: Objective,
    vit: ViT,
    trees: tuple[Tree, Tree, Tree, Any],
    t: int,
    project: bool,
) -> tuple[Figure, dict[str, Figure]]:
    """Returns the figure of the pooled features and those of the blocks, in the numbers' own type.

    Args:
      net, objective, vit: the networks.
      trees: parameters of the autoencoder, of the merged and of the neutral ViT, and the images.
      t, project: see `certify_merge`.
    """
    options: dict[str, Any] = {"num_heads": vit.num_heads, "mlp_dim": vit.mlp_dim, "qkv_bias": vit.qkv_bias}
    options |= {"activation": vit.activation, "norm_eps": vit.norm_eps, "dtype": vit.dtype}
    names = [f"encoderblock_{number}" for number in range(vit.depth)]

    def block_of(tree: Tree, number: int) -> Tree:
        if not vit.scan:
            return tree[names[number]]
        return jax.tree_util.tree_map(lambda leaf: leaf[number], tree["encoder"])

    def run(params: Tree, merged: Tree, base: Tree, images: Any) -> Any:
        patches = encoder_input(objective, vit, images, t, project)
        condition = None
        if net.time_width:
            condition = net.apply({"params": params}, jnp.full(len(images), t, patches.dtype), method="condition")
        tokens: Any = net.apply({"params": params}, patches, method="embed")
        rows = []
        for number, name in enumerate(names):
            block = ConditionedBlock(**options, param_dtype=net.param_dtype)
            after = block.apply({"params": params[name]}, tokens, condition)
            plain = EncoderBlock(**options)
            ours, nothing = (plain.apply({"params": block_of(tree, number)}, tokens) for tree in (merged, base))
            rows.append(_squares(nothing, after, ours))
            tokens = after
        features = (vit.apply({"params": tree}, images) for tree in (base, merged))
        nothing, ours = features
        return _squares(nothing, pooled(vit, tokens), ours), rows

    with jax.default_matmul_precision("highest"):
        end, rows = jax.device_get(jax.jit(run)(*trees))
    unit = epsilon([np.asarray(leaf).dtype for leaf in jax.tree_util.tree_leaves(trees[1])])
    # Errors of the blocks add up.
    return figure(end, unit, 1.0 + vit.depth), {n: figure(r, unit) for n, r in zip(names, rows, strict=True)}


def _squares(base: Any, explicit: Any, merged: Any) -> Any:
    return jnp.stack([jnp.sum(jnp.square(each)) for each in (base, explicit, explicit - base, merged - explicit)])
