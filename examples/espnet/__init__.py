"""ESPNet, a published network for street scenes that the registry does not know."""
