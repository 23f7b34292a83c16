"""Which data set a folder holds, so that messages can name a wrong one, and where it begins."""

import re
from collections.abc import Sequence
from pathlib import Path

from drep_jax.data.reid.listing import image_names
from drep_jax.errors import DataError

MARKET_NAME = re.compile(r"(?P<identity>-1|\d{4})_c(?P<camera>\d+)s\d+_\d+_\d+\.jpg(\.jpg)?")
DUKE_NAME = re.compile(r"(?P<identity>\d{4})_c(?P<camera>\d+)_f\d+\.jpg")
CUHK03_NP_NAME = re.compile(r"(?P<identity>\d{4})_c(?P<camera>\d+)_\d+\.(?:png|jpg)")

MARKET_FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
VERI_FOLDERS = ("image_train", "image_query", "image_test")

# Usual names of the folders that the archives unpack to.
USUAL = (
    "Market-1501-v15.09.15",
    "DukeMTMC-reID",
    "MSMT17_V1",
    "MSMT17_V2",
    "MSMT17",
    "cuhk03",
    "cuhk03-np",
    "VehicleID_V1.0",
    "VehicleID",
    "VeRi",
    "VeRi-776",
)


def recognized(root: Path) -> tuple[str, str] | None:
    """Returns the data set in a folder and the source that reads it; None if it is unknown."""
    names = {path.name for path in root.iterdir()} if root.is_dir() else set()
    if "mask_train_v2" in names or "mask_test_v2" in names:
        return "MSMT17-V2", "msmt17"
    if any(name.startswith("list_") and name.endswith(".txt") for name in names) and {"train", "test"} & names:
        return "MSMT17-V1", "msmt17"
    if "train_test_split" in names:
        return "VehicleID", "vehicleid"
    if set(VERI_FOLDERS) & names:
        return "VeRi-776", "veri"
    if {"cuhk-03.mat", "cuhk03_release", "images_labeled", "images_detected"} & names:
        return "CUHK03", "cuhk03"
    if any((root / kind / "bounding_box_train").is_dir() for kind in ("labeled", "detected")):
        return "CUHK03 of the new protocol", "cuhk03"
    present = [root / name for name in MARKET_FOLDERS if (root / name).is_dir()]
    return _of_market_form(present) if {path.name for path in present} - {"query"} else None


def _of_market_form(folders: Sequence[Path]) -> tuple[str, str]:
    images = [name for folder in folders for name in image_names(folder)[:1]]
    for grammar, title, spec in (
        (MARKET_NAME, "Market-1501", "market1501"),
        (DUKE_NAME, "DukeMTMC-reID", "duke"),
        (CUHK03_NP_NAME, "CUHK03 of the new protocol", "cuhk03"),
    ):
        if images and all(map(grammar.fullmatch, images)):
            return title, spec
    return "a set in the folders of Market-1501 with other names", "reid_folder"


def begin(root: Path, needed: Sequence[str]) -> Path:
    """Returns `root`, or its subfolder of a usual name if only that has all that is needed."""
    inside = [root / name for name in USUAL if all((root / name / part).exists() for part in needed)]
    here = all((root / part).exists() for part in needed)
    return inside[0] if len(inside) == 1 and not here else root


def check_layout(root: Path, needed: Sequence[str], title: str, spec: str) -> None:
    """Raises DataError, naming what the folder holds, unless it has all that is needed."""
    absent = [part for part in needed if not (root / part).exists()]
    if absent:
        raise wrong_folder(root, f"it lacks {', '.join(absent)}", needed, title, spec)


def wrong_folder(root: Path, why: str, needed: Sequence[str], title: str, spec: str) -> DataError:
    """Returns the error for a folder that is not what was expected, naming what it seems to be."""
    if not root.is_dir():
        return DataError(f"There is no directory {root} (looked for {root.absolute()}).")
    expected = f"expected {title}: {', '.join(needed)}"
    known = recognized(root)
    if known is not None and known[1] != spec:
        return DataError(f'This is {known[0]}, {expected}. {root} is read by the source "{known[1]}:{root}".')
    inside = [(name, recognized(root / name)) for name in USUAL if (root / name).is_dir()]
    hint = "".join(f" {root / name} is {what[0]}." for name, what in inside if what)
    return DataError(f"{root} cannot be read: {why}; {expected}.{hint}")
