"""Files that hold a whole network and not only its weights: one module a form, each compared with the live network."""
