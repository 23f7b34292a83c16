"""The method: from layers and sites to fused weights and their certificate.

These modules import only `typing`, `errors`, `trees`, `files` and `parallel` of this package.
"""
