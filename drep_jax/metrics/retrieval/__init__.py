"""Retrieval metrics: a gallery ranked by feature distance to each query, as in re-identification."""
