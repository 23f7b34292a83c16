"""What `train.py` and `fuse.py` share: flags, help, errors as messages."""
