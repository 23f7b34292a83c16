"""Jobs, one file per command: train, evaluate, dry_run, fuse, sweep; their checks and findings."""
