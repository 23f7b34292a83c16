"""Retrieval metrics: a gallery ranked by feature distance, as in re-identification."""
