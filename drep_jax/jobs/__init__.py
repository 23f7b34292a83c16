"""One file a command: train, evaluate, dry run, fuse, sweep; what they check first and what they report."""
