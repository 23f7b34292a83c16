"""Time and memory of exact retrieval metrics at the sizes of Market-1501 and MSMT17.

    PYTHONPATH=. python benchmarks/reid_eval.py                      # both sizes
    PYTHONPATH=. python benchmarks/reid_eval.py --sizes market --rounds 5 --rerank

"usual" is the NumPy loop of re-identification code: the whole distance matrix, argsort of all its
rows, then for each query the cumulated hits of its ranked row. Where its arrays would not fit into
free memory, it handles 500 queries at a time, which is the same work a query. Every measurement is
a process of its own, the sides in turn; memory is the peak above what the process held before
(features, imports). "ours, first" includes compilation.
"""

import argparse
import json
import statistics
import time

import numpy as np

from benchmarks.common import Parser, printed_by

SIZES = {"market": (3368, 15913, 750, 6), "msmt17": (11659, 82161, 3060, 15), "tiny": (20, 60, 8, 2)}
"""Queries, gallery images, identities and cameras; Market's gallery includes 2,798 distractors."""
PUBLISHED = ("market", "msmt17")
WIDTH = 384
MEMORY_FRACTION = 0.7
"""Of free memory that the usual loop may take."""


def features(size):
    queries, gallery, identities, cameras = SIZES[size]
    rng = np.random.default_rng(0)
    ids = rng.integers(0, identities, queries), rng.integers(0, identities, gallery)
    if size == "market":
        ids[1][:2798] = -1
    centers = 0.5 * rng.standard_normal((identities + 1, WIDTH), dtype=np.float32)
    both = []
    for labels in ids:
        images = rng.standard_normal((len(labels), WIDTH), dtype=np.float32)
        for start in range(0, len(labels), 1000):
            images[start : start + 1000] += centers[labels[start : start + 1000]]
        both.append(images)
    return *both, *ids, *(rng.integers(0, cameras, len(labels)) for labels in ids)


def distances(query, gallery):
    squares = (query**2).sum(1)[:, None] + (gallery**2).sum(1)[None, :]
    squares -= 2 * (query @ gallery.T)
    return squares


def usual(matrix, q_ids, g_ids, q_cameras, g_cameras):
    order = np.argsort(matrix, axis=1)
    hits = (g_ids[order] == q_ids[:, None]).astype(np.int32)
    precisions = []
    for i in range(len(matrix)):
        matches = hits[i][~((g_ids[order[i]] == q_ids[i]) & (g_cameras[order[i]] == q_cameras[i]))]
        if matches.any():
            sums = matches.cumsum()
            precision = sums / np.arange(1, len(matches) + 1)
            precisions.append((precision * matches).sum() / matches.sum())
    return precisions


def free_bytes():
    with open("/proc/meminfo") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def peak_bytes(field):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def run_usual(data):
    query, gallery, q_ids, g_ids, q_cameras, g_cameras = data
    row = len(gallery) * (4 + 4 + 8 + 8 + 4)  # distances and their parts, order, gathered identities, hits
    rows = len(query) if row * len(query) < MEMORY_FRACTION * free_bytes() else 500
    spent, precisions = {"distances": 0.0, "loop": 0.0}, []
    for start in range(0, len(query), rows):
        part = slice(start, start + rows)
        begin = time.perf_counter()
        matrix = distances(query[part], gallery)
        middle = time.perf_counter()
        precisions += usual(matrix, q_ids[part], g_ids, q_cameras[part], g_cameras)
        spent["distances"] += middle - begin
        spent["loop"] += time.perf_counter() - middle
    return {**spent, "total": sum(spent.values()), "rows": rows, "map": float(np.mean(precisions))}


def run_ours(data, rerank=False):
    from drep_jax.metrics.retrieval import ranking
    from drep_jax.metrics.retrieval.rerank import reranked

    query, gallery, q_ids, g_ids, q_cameras, g_cameras = data
    options = {"query_ids": q_ids, "gallery_ids": g_ids, "query_cameras": q_cameras, "gallery_cameras": g_cameras}
    begin = time.perf_counter()
    if rerank:
        result = ranking.rank_blocks(reranked(query, gallery), ranking.rules(**options))
    else:
        result = ranking.rank(query, gallery, **options)
    return {"total": time.perf_counter() - begin, "map": float(ranking.scores(result)["mAP"].mean())}


def measure(side, size):
    data = features(size)
    if side != "usual":
        import jax.numpy as jnp

        jnp.zeros(3).block_until_ready()
    with open("/proc/self/clear_refs", "w") as handle:
        handle.write("5")  # the peak starts from here
    before = peak_bytes("VmRSS")
    if side == "usual":
        result = run_usual(data)
    elif side == "rerank":
        result = run_ours(data, rerank=True)
    else:
        first = run_ours(data)["total"]
        result = run_ours(data) | {"first": first}
    print(json.dumps(result | {"extra": peak_bytes("VmHWM") - before}))


def child(side, size, tiny):
    return json.loads(printed_by(main, __file__, ["--measure", side, size], tiny).splitlines()[-1])


def main(command=None):
    parser = Parser(__doc__, sizes=["tiny"], rounds=1, rerank=True)
    parser.add_argument("--sizes", nargs="+", default=list(PUBLISHED), choices=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rerank", action="store_true", help="re-ranking too (minutes at the size of MSMT17)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(command)
    if args.measure:
        measure(*args.measure)
        return
    print("| size | what | median s | peak extra GiB | mAP |\n|---|---|---|---|---|")
    for size in args.sizes:
        results = {"ours": [], "usual": []}
        for index in range(args.rounds):
            for side in sorted(results, reverse=bool(index % 2)):
                results[side].append(child(side, size, args.tiny))
        rows = [("ours, with distances", "ours", "total"), ("ours, first call", "ours", "first")]
        rows += [("usual, loop alone", "usual", "loop"), ("usual, with distances", "usual", "total")]
        if args.rerank:
            results["rerank"] = [child("rerank", size, args.tiny)]
            rows.append(("ours, re-ranked, once", "rerank", "total"))
        queries, gallery, *_ = SIZES[size]
        for name, side, key in rows:
            at_once = results[side][0].get("rows", queries)
            note = f", {at_once} queries at a time" if at_once < queries else ""
            seconds, extra, score = (statistics.median(one[k] for one in results[side]) for k in (key, "extra", "map"))
            print(f"| {queries:,} × {gallery:,} | {name}{note} | {seconds:.2f} | {extra / 2**30:.2f} | {score:.6f} |")
        ratios = [
            our_run["total"] / usual_run["loop"]
            for our_run, usual_run in zip(results["ours"], results["usual"], strict=True)
        ]
        print(
            f"\nours with distances / usual loop alone: {statistics.median(ratios):.2f} (rounds: {ratios})\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
