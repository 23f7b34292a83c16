"""Files that hold a whole network with its weights: one module per format, each checked against the live network."""
