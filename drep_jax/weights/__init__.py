"""Weights of a plain backbone as files: our own (`native`), and foreign ones (`foreign`) of many `formats`."""

from drep_jax.weights.api import read, write
from drep_jax.weights.foreign import Foreign, load_foreign, stored_tree, write_back, write_new
from drep_jax.weights.formats.table import read_table
from drep_jax.weights.native import digest, is_native, load, names_of, save_orbax, save_safetensors
from drep_jax.weights.translation import CONV, DENSE, SAME, Format, Layout, Rule, reshaped

__all__ = [
    "CONV",
    "DENSE",
    "SAME",
    "Foreign",
    "Format",
    "Layout",
    "Rule",
    "digest",
    "is_native",
    "load",
    "load_foreign",
    "names_of",
    "read",
    "read_table",
    "reshaped",
    "save_orbax",
    "save_safetensors",
    "stored_tree",
    "write",
    "write_back",
    "write_new",
]
