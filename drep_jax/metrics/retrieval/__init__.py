"""Retrieval: queries are compared with a gallery by the distance of their features, as in re-identification."""
