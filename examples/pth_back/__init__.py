"""A PyTorch checkpoint in, a fused one with the same names out."""
