"""Files with a network and its weights, checked against the live network; one module per format."""
