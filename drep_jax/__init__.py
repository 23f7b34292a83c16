"""DenoiseRep for JAX/Flax: learn a linear denoiser for every embedding layer, fuse it into the layer's weights."""

from drep_jax.core.algorithm1 import algorithm1_losses
from drep_jax.core.certificate import Certificate, certify
from drep_jax.core.denoisers import Denoisers, init_denoise
from drep_jax.core.explicit import explicit_apply
from drep_jax.core.fusion import fuse, fuse_exact, fuse_variables, fuse_variables_exact
from drep_jax.core.layers import find_layers
from drep_jax.core.measured import Measured, measure
from drep_jax.core.module import DenoiseRep
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import Site, find_sites, select_sites
from drep_jax.errors import DrepError
from drep_jax.rows import clean_stream, valid_pixels, valid_rows

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "DenoiseRep",
    "Denoisers",
    "DrepError",
    "Measured",
    "Schedule",
    "Site",
    "algorithm1_losses",
    "certify",
    "clean_stream",
    "explicit_apply",
    "find_layers",
    "find_sites",
    "fuse",
    "fuse_exact",
    "fuse_variables",
    "fuse_variables_exact",
    "init_denoise",
    "measure",
    "select_sites",
    "valid_pixels",
    "valid_rows",
]
