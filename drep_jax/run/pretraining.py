"""The pre-training of a run: PCA of its patches, the denoising autoencoder, and its encoder as the run's backbone."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drep_jax import weights
from drep_jax.core.layers import find_layers
from drep_jax.core.sites import select_sites
from drep_jax.data.corruptions.latent import use_pca
from drep_jax.errors import CheckpointError, ConfigError
from drep_jax.files import write_json
from drep_jax.models.autoencoder import DenoisingAutoencoder, patches_of
from drep_jax.models.patch_pca import PatchPCA, check_components, load_pca, patch_pca, pixel_basis, save_pca
from drep_jax.models.transformer import pair
from drep_jax.models.vit import ViT
from drep_jax.parallel import processes
from drep_jax.pretraining.certificate import MergeCertificate, certify_merge
from drep_jax.pretraining.merge import autoencoder_of, check_vit, merge
from drep_jax.pretraining.objective import Objective
from drep_jax.run.backbone import fresh_variables
from drep_jax.run.moments import moments_of
from drep_jax.run.run import Run
from drep_jax.run.setup import Setup
from drep_jax.run.stages import key_of, run_training
from drep_jax.typing import Config, Tree

STAGE = "pretrain"
PCA, MOMENTS, OWNER = "pca.npz", "pca_moments.npz", "pretrain.json"
"""Files in the directory of the run: the PCA, the moments it is of, and which PCA the autoencoder belongs to."""
ENCODER = "pretrained.safetensors"
"""The encoder as the run's backbone, with the probe as its head."""


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """An autoencoder, what it learns, and the ViT that its encoder becomes.

    Attributes:
      net: the autoencoder.
      objective: with the PCA.
      vit: the run's backbone without a head.
      abstract: shapes of the ViT's parameters.
      t: the time step that is merged.
      project: whether the ViT projects patches on the PCA's directions.
    """

    net: DenoisingAutoencoder
    objective: Objective
    vit: ViT
    abstract: Tree
    t: int
    project: bool

    @property
    def pca(self) -> PatchPCA:
        """The basis that the noise is in."""
        return self.objective.pca

    def merged(self, params: Tree, t: int | None = None) -> Tree:
        """Returns the encoder at a time step as variables of the ViT."""
        step = self.t if t is None else t
        return {"params": merge(params, self.objective, self.vit, self.abstract, step, project=self.project)}

    def certificate(self, params: Tree, images: Any) -> MergeCertificate:
        """Returns the certificate of the merge on normalized images."""
        return certify_merge(
            self.net, params, self.objective, self.vit, self.abstract, images, self.t, project=self.project
        )

    def loss(self, params: Tree, images: Any, keys: Any) -> Any:
        """Returns the loss of a batch.

        Args:
          params: of the autoencoder.
          images: normalized.
          keys: (batch,) of time steps and noise.
        """
        patches = patches_of(images, self.pca.patch)
        t = jax.vmap(lambda key: jax.random.randint(key, (), 0, self.objective.timesteps))(keys)
        noisy, noise = self.objective.corrupted(patches, t, jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys))
        prediction: Any = self.net.apply({"params": params}, noisy, t.astype(jnp.float32))
        return self.objective.loss(prediction.astype(jnp.float32), patches, t, noise)


def check_pretraining(config: Config, setup: Setup) -> None:
    """Refuses settings of the pre-training before any work.

    Raises:
      ConfigError: naming the setting.
    """
    options = config[STAGE]
    if not options["steps"]:
        return
    if config["backbone"]["init_from"]:
        raise ConfigError(
            "pretrain.steps and backbone.init_from both give the backbone its weights: set --config.pretrain.steps=0 or leave "
            "init_from out."
        )
    if setup.side:
        raise ConfigError("Pre-training takes images alone, and this backbone is told side information besides.")
    vit = vit_of(setup)
    patch = pair(vit.patch_size)
    check_components(options["components"], patch, patch[0] * patch[1] * 3)
    decoder_depth(options["blocks"], vit.depth)
    if not np.isfinite(options["gate"]):
        raise ConfigError(f"pretrain.gate={options['gate']} must be a finite number.")
    if options["time_width"] < 0:
        raise ConfigError(
            f"pretrain.time_width={options['time_width']} must be 0, for a quarter of the width, or more."
        )
    if options["probe_every"] < 0 or options["probe_images"] < 0:
        raise ConfigError("pretrain.probe_every and pretrain.probe_images must be 0 or more.")
    objective = objective_of(options, blank_pca(options, patch))
    for t in (options["t"], *options["sweep"]):
        objective.check_time(t)


def blank_pca(options: Config, patch: tuple[int, int]) -> PatchPCA:
    """Returns a basis of pixels in place of a PCA, for what needs shapes and settings alone."""
    numbers, count = patch[0] * patch[1] * 3, options["components"]
    return PatchPCA(np.zeros(numbers), np.eye(numbers), np.ones(numbers), np.ones(count), count, patch)


def vit_of(setup: Setup) -> ViT:
    """Returns the backbone without its head.

    Raises:
      ConfigError: if no encoder can become this backbone.
    """
    vit: Any = setup.headless
    check_vit(vit)
    return vit


def decoder_depth(blocks: int, depth: int) -> int:
    """Returns the blocks of the decoder.

    >>> decoder_depth(0, 6), decoder_depth(24, 9)
    (6, 15)

    Args:
      blocks: of encoder and decoder together; 0 for twice the encoder's.
      depth: of the encoder.

    Raises:
      ConfigError: for an odd number, or no block left for the decoder.
    """
    if blocks % 2:
        raise ConfigError(
            f"pretrain.blocks={blocks} is odd: encoder and decoder are one row of blocks cut in the middle, so give an even "
            f"number, such as {2 * depth} for this backbone of {depth} blocks."
        )
    if blocks and blocks <= depth:
        raise ConfigError(
            f"pretrain.blocks={blocks} counts encoder and decoder, and the encoder alone has {depth} (model.depth): give "
            f"{2 * depth}, or 0."
        )
    return (blocks or 2 * depth) - depth


def objective_of(options: Config, pca: PatchPCA) -> Objective:
    """Returns the objective of a section `pretrain`; noise and masks in pixels have a basis of pixels.

    Raises:
      ConfigError: naming the setting.
    """
    names = ("schedule", "max_sigma", "timesteps", "predict", "inputs", "outputs", "noise")
    settings = {name: options[name] for name in (*names, "residual_weight", "whiten_loss", "mask_ratio")}
    basis = pixel_basis(pca) if options["noise"] in ("pixels", "mask") else pca
    return Objective(basis, **settings)


def pca_of(run: Run) -> PatchPCA:
    """Returns the PCA of the run's patches: read from its directory, or made from its moments and saved there.

    Raises:
      CheckpointError: if the file there was made with other settings.
      DataError: for too few patches, or images that do not vary.
    """
    options, setup, path = run.config[STAGE], run.setup, os.path.join(run.directory, PCA)
    vit = vit_of(setup)
    patch = pair(vit.patch_size)
    if processes.from_primary(lambda: os.path.isfile(path)):
        pca, _, _ = load_pca(path)
        if (pca.components, pca.patch) != (options["components"], patch):
            raise CheckpointError(
                f"{path} has {pca.components} components of patches of {pca.patch[0]}×{pca.patch[1]}, and this run "
                f"{options['components']} of {patch[0]}×{patch[1]}. Choose another --workdir, or delete the file."
            )
        return pca
    backbone = vit.clone(scan=False) if vit.scan else vit
    layer = [each for each in find_layers(backbone, setup.images) if each.path == ("embedding",)]
    sites = select_sites(layer, ".*", kind="patch", max_patch_width=2**31)
    variables = dict(jax.jit(backbone.init)(key_of(run.config, "init"), jnp.zeros(setup.images.shape)))
    (moments,) = moments_of(run, variables, os.path.join(run.directory, MOMENTS), sites, backbone).values()
    channels = setup.images.shape[-1]
    order = np.arange(channels * patch[0] * patch[1]).reshape(channels, *patch).transpose(1, 2, 0).reshape(-1)
    mean, covariance = moments.mean.reshape(-1)[order], moments.covariance.reshape((len(order),) * 2)[order][:, order]
    settings = {"components": options["components"], "scale": options["scale"], "center": options["center"]}
    pca = patch_pca(moments.count, mean, covariance, patch=patch, **settings)
    if processes.primary():
        save_pca(path, pca, setup.mean, setup.std)
    processes.barrier("pca")
    return pca


def use_saved_pca(directory: str) -> None:
    """Makes the PCA of a run's directory, if there is one, that of `pca_latent:σ` in this process."""
    path = os.path.join(directory, PCA)
    if processes.from_primary(lambda: os.path.isfile(path)):
        use_pca(path)


def pretraining_of(run: Run, pca: PatchPCA) -> Pretraining:
    """Returns autoencoder, objective and ViT of a run."""
    options, vit = run.config[STAGE], vit_of(run.setup)
    objective = objective_of(options, pca)
    net = autoencoder_of(
        vit,
        objective,
        decoder_depth=decoder_depth(options["blocks"], vit.depth),
        conditioned=options["conditioned"],
        time_width=options["time_width"],
        gate=options["gate"],
    )
    abstract = jax.eval_shape(vit.init, jax.random.key(0), run.setup.images)["params"]
    return Pretraining(net, objective, vit, abstract, options["t"], options["project"])


def fresh_autoencoder(run: Run, pretraining: Pretraining) -> Tree:
    """Returns the autoencoder's parameters initialized from the run's seed."""
    patches = jnp.zeros((1, int(np.prod(pretraining.vit.grid)), pretraining.objective.input_width))
    init = jax.jit(pretraining.net.init)
    return dict(init(key_of(run.config, "pretrain_init"), patches, jnp.zeros(1))["params"])


def train_autoencoder(
    run: Run, pretraining: Pretraining, evaluate: Callable[[Tree], dict[str, float]] | None = None
) -> tuple[Tree, float]:
    """Trains the autoencoder, or resumes; returns its parameters and the seconds.

    Args:
      run: its training images are learned from, without labels.
      pretraining: of the run.
      evaluate: parameters ↦ numbers for the log, every `pretrain.probe_every` steps.

    Raises:
      CheckpointError: if the checkpoints there belong to another PCA.
    """
    _claim(run, pretraining)
    params = {"backbone": fresh_autoencoder(run, pretraining)}
    probing = None if evaluate is None else lambda trained: evaluate(trained["backbone"])
    every = run.config[STAGE]["probe_every"]
    loss_fn = training_loss(run, pretraining)
    state, seconds = run_training(run, STAGE, params, {}, loss_fn, evaluate=probing, evaluate_every=every)
    return state.params["backbone"], seconds


def training_loss(run: Run, pretraining: Pretraining) -> Any:
    """Returns the loss of the stage's steps, computed as `pretrain.compute` and `pretrain.remat` say."""
    options = run.config[STAGE]
    changes: dict[str, Any] = {"remat": options["remat"], "dtype": jnp.dtype(options["compute"])}
    computing = dataclasses.replace(pretraining, net=pretraining.net.clone(**changes))

    def loss_fn(params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(batch["index"])
        return computing.loss(params["backbone"], run.setup.inputs(batch), keys), ({}, others)

    return loss_fn


def _claim(run: Run, pretraining: Pretraining) -> None:
    """Writes down which PCA the autoencoder in this directory belongs to, or checks that it is this one."""
    path, digest = os.path.join(run.directory, OWNER), pretraining.pca.digest()

    def claim() -> str:
        if not os.path.exists(path):
            write_json(path, {"pca": digest})
        with open(path, encoding="utf-8") as file:
            return file.read()

    if digest not in processes.from_primary(claim):
        raise CheckpointError(
            f"The autoencoder in {run.directory} was trained with another PCA than {PCA} there is now, so its weights mean "
            "nothing to it. Put back the file that was there, or start again with another --workdir."
        )


def save_encoder(run: Run, variables: Tree) -> None:
    """Writes the encoder as weights of the run's backbone."""
    if processes.primary():
        weights.save_safetensors(os.path.join(run.directory, ENCODER), variables)
    processes.barrier("encoder")


def saved_encoder(run: Run) -> Tree | None:
    """Returns the pre-trained backbone of a run's directory, or None if there is none."""
    path = os.path.join(run.directory, ENCODER)
    if not run.config[STAGE]["steps"] or not processes.from_primary(lambda: os.path.isfile(path)):
        return None
    return weights.load(path, run.setup.abstract)


def with_encoder(run: Run, encoder: Tree, head: Tree | None) -> Tree:
    """Returns the variables of the run's backbone with a pre-trained encoder.

    Args:
      run: of the backbone.
      encoder: variables of the backbone without a head.
      head: {"kernel", "bias"} of the head; None for a fresh one.
    """
    params = dict(encoder["params"])
    if "head" in run.setup.abstract["params"]:
        params["head"] = fresh_variables(run)["params"]["head"] if head is None else head
    return {**encoder, "params": params}
