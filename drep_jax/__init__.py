"""DenoiseRep for JAX/Flax: learn a linear denoiser for every embedding layer, fuse it into the layer's weights."""

from drep_jax.certificate import Certificate, certify
from drep_jax.denoiser import DenoiseRep, algorithm1_losses, explicit_apply, init_denoise
from drep_jax.errors import DrepError
from drep_jax.fusion import fuse, fuse_exact
from drep_jax.measured import Measured, measure
from drep_jax.schedule import Schedule
from drep_jax.sites import Site, find_layers, find_sites, select_sites

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "DenoiseRep",
    "DrepError",
    "Measured",
    "Schedule",
    "Site",
    "algorithm1_losses",
    "certify",
    "explicit_apply",
    "find_layers",
    "find_sites",
    "fuse",
    "fuse_exact",
    "init_denoise",
    "measure",
    "select_sites",
]
