"""Tasks: what a label means. A task module offers `loss(outputs, batch)` and `scores(outputs, labels)`, by convention."""
