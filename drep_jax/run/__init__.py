"""One run and its directory: its configuration, what it works on, its stages, files and lock."""
