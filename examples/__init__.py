"""Short scripts that use drep_jax, each run by tests/examples."""
