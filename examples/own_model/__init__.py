"""A network that the registry does not know."""
