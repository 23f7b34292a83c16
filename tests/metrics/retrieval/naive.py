"""Retrieval metrics by plain loops over sorted lists, which the fast ones are compared with."""

import math


def squared(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return 1 - dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def ranked(distances, qid, gids, qcam=None, gcams=None, own=None):
    """[(distance, right, index)], nearest first, wrong before right at one distance; `own` is the query's own picture."""
    listed = []
    for index, (distance, gid) in enumerate(zip(distances, gids, strict=True)):
        if qcam is not None and gid == qid and gcams[index] == qcam:
            continue
        if own is not None and index == own:
            continue
        listed.append((distance, gid == qid, index))
    return sorted(listed)


def metrics(listed):
    """Average precision, inverse negative penalty, first right place from 0 and number of right ones; None without any."""
    hits, precisions, places = 0, [], []
    for place, (_, right, _) in enumerate(listed):
        if right:
            hits += 1
            precisions.append(hits / (place + 1))
            places.append(place)
    if not hits:
        return None
    return sum(precisions) / hits, hits / (places[-1] + 1), places[0], hits


def evaluate(rows, qids, gids, qcams=None, gcams=None):
    """The metrics of every query by its row of distances."""
    return [
        metrics(ranked(row, qids[i], gids, None if qcams is None else qcams[i], gcams)) for i, row in enumerate(rows)
    ]
