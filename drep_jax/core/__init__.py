"""The method: from layers and sites to fused weights and their certificate. Imports the ground floor and `parallel` only."""
