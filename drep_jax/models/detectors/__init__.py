"""Parts of networks that find objects: boxes, proposals, pyramids, matching, and the networks built on them.

Boxes are x0, y0, x1, y1 in pixels of the network's input, pixel j alone being the span [j, j + 1].
Numbers of boxes are static: what holds fewer carries a mask of the valid ones.
"""
