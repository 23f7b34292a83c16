"""One run and its directory: configuration, setup, stages, files and lock."""
