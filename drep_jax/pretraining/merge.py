"""The encoder at a fixed time step as a plain ViT: t is constant, so what adaLN makes of it is, too.

With (shift, scale, gate) of the two branches of a block at t,

    LN's γ = 1 + scale, β = shift;    output projection and fc2: kernel and bias times gate.

The patch embedding takes over what happens to a clean image before the network: its projection on
the PCA's directions or its latents, both linear in the patch. So (ViT)(x) = pool(encoder(input(x), t)),
exactly; `drep_jax.pretraining.certificate` measures it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.errors import CheckpointError, ConfigError
from drep_jax.models.autoencoder import DenoisingAutoencoder, TimeEmbedding
from drep_jax.models.transformer import sincos_positions
from drep_jax.models.vit import ViT
from drep_jax.pretraining.objective import Objective
from drep_jax.trees import get_in
from drep_jax.typing import Tree

BRANCHES = (("norm1", ("attn", "out")), ("norm2", ("mlp", "fc2")))
"""The norm before each branch of a block, and the branch's last layer."""


def check_vit(vit: Any) -> None:
    """Refuses a backbone that no encoder of l-DAE can become.

    Raises:
      ConfigError: naming the setting of the model.
    """
    if not isinstance(vit, ViT):
        raise ConfigError(
            f"Pre-training makes a plain ViT, and the backbone is a {type(vit).__name__}: set --config.model.name=vit, or "
            "another ViT of docs/models.md."
        )
    wanted = {
        "pool": (vit.pool in ("mean", "gap"), '"mean" or "gap", since the encoder has patch tokens only'),
        "class_token": (not vit.class_token, "False"),
        "registers": (not vit.registers, "0"),
        "post_norm": (not vit.post_norm, "False"),
        "layer_scale": (not vit.layer_scale, "False"),
        "pre_logits": (not vit.pre_logits, "False"),
        "patch_stride": (vit.patch_stride is None, "None"),
    }
    for name, (fits, expected) in wanted.items():
        if not fits:
            raise ConfigError(
                f"Pre-training needs --config.model.{name}={expected}; this ViT has {name}={getattr(vit, name)!r}."
            )


def autoencoder_of(
    vit: ViT,
    objective: Objective,
    *,
    decoder_depth: int | None = None,
    conditioned: bool = True,
    time_width: int = 0,
    gate: float = 0.0,
) -> DenoisingAutoencoder:
    """Returns the autoencoder whose encoder has the blocks of a ViT.

    Args:
      vit: the plain ViT that the encoder becomes.
      objective: gives inputs and outputs.
      decoder_depth: blocks of the decoder; None for as many as the encoder.
      conditioned: whether the network is told t.
      time_width: of the time embedding; 0 for a quarter of the width.
      gate: of every branch before the first step.
    """
    check_vit(vit)
    return DenoisingAutoencoder(
        width=vit.width,
        depth=vit.depth,
        decoder_depth=vit.depth if decoder_depth is None else decoder_depth,
        num_heads=vit.num_heads,
        mlp_dim=vit.mlp_dim,
        grid=vit.grid,
        outputs=objective.output_width,
        time_width=(time_width or -(-vit.width // 4)) if conditioned else 0,
        gate=gate,
        qkv_bias=vit.qkv_bias,
        activation=vit.activation,
        norm_eps=vit.norm_eps,
    )


def modulations(params: Tree, t: int) -> list[dict[str, np.ndarray]]:
    """Returns what time step t makes of each encoder block: {"norm1", "norm2"} ↦ (shift, scale, gate), (3, width).

    Args:
      params: of the autoencoder.
      t: the time step.
    """
    kernel = params["time"]["fc1"]["kernel"]
    embedding = TimeEmbedding(kernel.shape[-1], param_dtype=kernel.dtype)
    condition = embedding.apply({"params": params["time"]}, jnp.full(1, t, kernel.dtype))
    made = []
    for number in range(sum(name.startswith("encoderblock_") for name in params)):
        layer = params[f"encoderblock_{number}"]["modulation"]
        numbers = np.asarray(condition)[0] @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        made.append(dict(zip(("norm1", "norm2"), numbers.reshape(2, 3, -1), strict=True)))
    return made


def neutral(params: Tree) -> list[dict[str, np.ndarray]]:
    """Returns modulations that change nothing: shift 0, scale 0, gate 1."""
    width = params["embedding"]["bias"].shape[-1]
    nothing = np.stack([np.zeros(width), np.zeros(width), np.ones(width)])
    return [{"norm1": nothing, "norm2": nothing} for name in params if name.startswith("encoderblock_")]


def merge(
    params: Tree,
    objective: Objective,
    vit: ViT,
    abstract: Tree,
    t: int,
    *,
    project: bool = True,
    given: list[dict[str, np.ndarray]] | None = None,
    round_back: bool = True,
) -> Tree:
    """Returns the encoder at time step t as parameters of a plain ViT; a pure function of trees.

    Computed in float64 and rounded once to the ViT's types. A final norm of the ViT gets γ = 1,
    β = 0, and a head zeros: it is the probe's or the fine-tuning's to fill.

    Args:
      params: of the autoencoder.
      objective: that it was trained for.
      vit: the ViT.
      abstract: shapes of its parameters.
      t: the fixed time step.
      project: whether the ViT projects patches on the PCA's directions, as the pre-training's
        inputs are; if not, an encoder of images sees the whole patch.
      given: modulations in place of those of t, see `neutral`.
      round_back: whether to round to the types of `abstract`; float64 if not.

    Raises:
      ConfigError: for a t outside the schedule, or a ViT of another form.
      CheckpointError: for parameters that were merged before, or of another size or PCA.
    """
    check_vit(vit)
    objective.check_time(t)
    check_unmerged(params, objective, vit)
    wide = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf, np.float64), params)
    conditioned = "time" in params
    if given is None:
        given = _wide_modulations(wide, t) if conditioned else None
    tree: dict[str, Any] = {"embedding": _embedding(wide["embedding"], objective, vit, t, project)}
    for number in range(vit.depth):
        name = f"encoderblock_{number}"
        block = wide[name]
        tree[name] = (
            block if given is None else _merged({k: v for k, v in block.items() if k != "modulation"}, given[number])
        )
    positions = sincos_positions(*vit.grid, vit.width)
    if vit.positions == "learned":
        tree["pos_embedding"] = positions
    if "norm" in abstract:
        tree["norm"] = {"scale": np.ones(vit.width), "bias": np.zeros(vit.width)}
    if "head" in abstract:
        tree["head"] = {name: np.zeros(leaf.shape) for name, leaf in abstract["head"].items()}
    if vit.scan:
        blocks = [tree.pop(f"encoderblock_{number}") for number in range(vit.depth)]
        tree["encoder"] = jax.tree_util.tree_map(lambda *leaves: np.stack(leaves), *blocks)
    return jax.tree_util.tree_map(
        lambda leaf, like: np.asarray(leaf, like.dtype if round_back else np.float64).reshape(like.shape),
        tree,
        abstract,
    )


def _wide_modulations(params: Tree, t: int) -> list[dict[str, np.ndarray]]:
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        return modulations(params, t)


def _merged(block: Tree, given: dict[str, np.ndarray]) -> Tree:
    merged = {name: dict(part) for name, part in block.items()}
    for norm, (branch, last) in BRANCHES:
        shift, scale, gate = given[norm]
        merged[norm] = {"scale": 1.0 + scale, "bias": shift}
        merged[branch][last] = {name: leaf * gate for name, leaf in block[branch][last].items()}
    return merged


def _embedding(layer: Tree, objective: Objective, vit: ViT, t: int, project: bool) -> Tree:
    """Returns the patch embedding of clean images: input(x) K + b as a convolution's kernel and bias."""
    pca, gain = objective.pca, objective.gain(t)
    kernel, bias = layer["kernel"], layer["bias"]
    if objective.inputs == "latent":
        # γ V (x − μ) / s
        kernel = gain * (pca.directions.T / pca.scale) @ kernel
        bias = bias - pca.mean @ kernel
    elif project or objective.noise != "latent":
        # μ + γ VᵀV (x − μ)
        whole, kernel = kernel, gain * pca.directions.T @ (pca.directions @ kernel)
        bias = bias + pca.mean @ (whole - kernel)
    height, width = pca.patch
    return {"kernel": kernel.reshape(height, width, pca.channels, vit.width), "bias": bias}


def shifted(params: Tree, vit: ViT, shift: np.ndarray) -> Tree:
    """Returns a merged ViT whose features are those before minus `shift`, (width,); exact, by a bias.

    A head that standardizes features multiplies their mean by as much as their differences, so that
    large terms cancel in its sums. Centered features have nothing to cancel.
    """
    if vit.final_norm:
        return {**params, "norm": {**params["norm"], "bias": _minus(params["norm"]["bias"], shift)}}
    # The features are the mean of what the last block returns.
    name = "encoder" if vit.scan else f"encoderblock_{vit.depth - 1}"
    block = params[name]
    last = block["mlp"]["fc2"]
    row = np.zeros(last["bias"].shape)
    row.reshape(-1, vit.width)[-1] = shift  # of the last of stacked blocks
    bias = _minus(last["bias"], row)
    return {**params, name: {**block, "mlp": {**block["mlp"], "fc2": {**last, "bias": bias}}}}


def _minus(leaf: Any, shift: np.ndarray) -> np.ndarray:
    return (np.asarray(leaf, np.float64) - shift).astype(np.asarray(leaf).dtype)


def check_unmerged(params: Tree, objective: Objective, vit: ViT) -> None:
    """Refuses parameters that are no autoencoder's, or of another size.

    Raises:
      CheckpointError: saying what they are and what was expected.
    """
    kernel = get_in(params, ("embedding", "kernel"))
    if kernel is not None and np.ndim(kernel) == 4:
        raise CheckpointError(
            "These weights are a plain ViT's: the time step was merged into them before, and cannot be merged twice. Give "
            "those of the autoencoder, in checkpoints/pretrain."
        )
    if kernel is None or "head" not in params or "encoderblock_0" not in params:
        raise CheckpointError(
            "These weights are not those of a denoising autoencoder: embedding, blocks or head are missing."
        )
    expected = (objective.input_width, vit.width)
    depth = sum(name.startswith("encoderblock_") for name in params)
    if tuple(kernel.shape) != expected or depth != vit.depth:
        raise CheckpointError(
            f"The autoencoder takes {kernel.shape[0]} numbers a patch and has {depth} encoder blocks of width "
            f"{kernel.shape[1]}; this PCA and backbone make {expected[0]} numbers, {vit.depth} blocks and width {expected[1]}: "
            "they are of another run."
        )
