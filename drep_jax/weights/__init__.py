"""Weights of a plain backbone as files: our own (`native`), and foreign ones (`foreign`) of many `formats`."""

from drep_jax.weights.foreign import Foreign, load_foreign, stored_tree, write_back, write_new
from drep_jax.weights.native import digest, is_native, load, names_of, save_orbax, save_safetensors

__all__ = [
    "Foreign",
    "digest",
    "is_native",
    "load",
    "load_foreign",
    "names_of",
    "save_orbax",
    "save_safetensors",
    "stored_tree",
    "write_back",
    "write_new",
]
