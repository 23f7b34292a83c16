"""COCO's own numbers of its 80 categories: 1 to 90, with ten of them unused."""

UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)

COCO_IDS = tuple(number for number in range(1, 91) if number not in UNUSED)
"""Category id of each of the 80 classes, for heads that have an output for each id up to 90."""
