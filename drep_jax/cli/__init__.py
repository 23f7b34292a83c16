"""Shared by `train.py` and `fuse.py`: flags, help, and errors as messages."""
