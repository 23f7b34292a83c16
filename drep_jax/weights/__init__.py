"""Weights of a plain backbone as files: our own (`native`), and foreign ones (`foreign`) of many `formats`."""

from drep_jax.weights.api import read, write
from drep_jax.weights.foreign import Foreign, load_foreign
from drep_jax.weights.formats.table import read_table
from drep_jax.weights.native import digest, is_native, load, names_of, save_orbax, save_safetensors
from drep_jax.weights.translation import CONV, DENSE, POINTWISE, SAME, Format, Layout, Rule, reshaped
from drep_jax.weights.writing import (
    check_can_write_back,
    fused_name,
    remarks_on,
    stored_tree,
    write_back,
    write_new,
)

__all__ = [
    "CONV",
    "DENSE",
    "POINTWISE",
    "SAME",
    "Foreign",
    "Format",
    "Layout",
    "Rule",
    "check_can_write_back",
    "digest",
    "fused_name",
    "is_native",
    "load",
    "load_foreign",
    "names_of",
    "read",
    "read_table",
    "remarks_on",
    "reshaped",
    "save_orbax",
    "save_safetensors",
    "stored_tree",
    "write",
    "write_back",
    "write_new",
]
