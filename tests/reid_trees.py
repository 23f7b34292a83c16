"""Small trees with the true names and folders of the data sets for re-identification, and what is known of each."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, number: int = 0) -> Path:
    """Saves a tiny image; sizes differ, as those of the real sets do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (6 + number % 3, 4, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def market(root: Path) -> Path:
    """12 training persons, 2 test persons, junk, distractors, Thumbs.db; of person 4 only camera 1 sees anything."""
    base = root / "Market-1501-v15.09.15"
    train = [f"{2 * i + 2:04d}_c{c}s1_000451_0{c}.jpg" for i in range(12) for c in (1, 6)]
    query = ["0001_c1s1_001051_00.jpg", "0001_c2s1_001051_00.jpg", "0003_c1s6_011741_00.jpg", "0005_c1s1_000001_00.jpg"]
    gallery = [
        "-1_c1s1_000401_03.jpg",
        "-1_c3s1_000401_04.jpg",
        "0000_c1s1_000151_01.jpg",
        "0000_c4s1_000151_02.jpg",
        "0001_c1s1_002301_02.jpg",
        "0001_c3s2_002301_02.jpg",
        "0003_c2s3_002301_02.jpg.jpg",
        "0005_c1s2_000002_00.jpg",
    ]
    for folder, names in (("bounding_box_train", train), ("query", query), ("bounding_box_test", gallery)):
        for number, name in enumerate(names):
            picture(base / folder / name, number)
    (base / "bounding_box_test" / "Thumbs.db").write_bytes(b"")
    return base


def duke(root: Path) -> Path:
    base = root / "DukeMTMC-reID"
    for number, name in enumerate(
        f"{i:04d}_c{c}_f00{number:05d}.jpg" for number, i in enumerate((1, 5, 9)) for c in (2, 8)
    ):
        picture(base / "bounding_box_train" / name, number)
    picture(base / "query" / "0002_c1_f0046985.jpg", 1)
    for number, name in enumerate(("0002_c2_f0046985.jpg", "0002_c5_f0046986.jpg", "7139_c2_f0046987.jpg")):
        picture(base / "bounding_box_test" / name, number)
    (base / "LICENSE_DukeMTMC.txt").write_text("")
    return base


def msmt17(root: Path, version: int = 1) -> Path:
    base = root / f"MSMT17_V{version}"
    training, testing = {1: ("train", "test"), 2: ("mask_train_v2", "mask_test_v2")}[version]

    def written(name, folder, rows, first=0):
        lines = []
        for number, (person, camera) in enumerate(rows, first):
            path = f"{person:04d}/{person:04d}_{number:03d}_{camera:02d}_0303morning_0008_{number}.jpg"
            picture(base / folder / path, number)
            lines.append(f"{path} {person}\n")
        (base / name).write_text("".join(lines))

    written("list_train.txt", training, [(person, camera) for person in range(4) for camera in (1, 15)])
    written("list_query.txt", testing, [(0, 1), (1, 14)], first=50)
    written("list_gallery.txt", testing, [(0, 1), (0, 2), (0, 3), (1, 14), (1, 9)])
    line = "0003/0003_099_07_0303noon_0008_0.jpg 3\n"
    picture(base / training / line.split()[0], 9)
    (base / "list_val.txt").write_text(line)
    return base


CUHK03 = {
    "train": ["1_001_1_01.png", "1_001_2_06.png", "5_010_1_02.png", "5_010_2_07.png"],
    "query": ["2_003_1_01.png", "2_003_2_06.png"],
    "gallery": ["2_003_1_02.png", "2_003_2_07.png", "3_001_1_01.png"],
}


def cuhk03(root: Path, form: str = "mat", boxes: str = "labeled") -> Path:
    from scipy.io import savemat

    base = root / "cuhk03"
    names = [name for part in CUHK03.values() for name in part]
    if form == "np":
        for part, folder in zip(CUHK03, ("bounding_box_train", "query", "bounding_box_test"), strict=True):
            for number, name in enumerate(CUHK03[part]):
                pair, person, view, image = name.removesuffix(".png").split("_")
                picture(base / boxes / folder / f"{pair}{person}_c{view}_{int(image)}.png", number)
        return base
    for number, name in enumerate(names):
        picture(base / f"images_{boxes}" / name, number)
    if form == "mat":
        stored = {"filelist": np.array([[np.array([name])] for name in names], object), "labels": np.arange(len(names))}
        for part, wanted in CUHK03.items():
            stored[f"{part}_idx"] = np.array([[names.index(name) + 1] for name in wanted])
        savemat(str(base / f"cuhk03_new_protocol_config_{boxes}.mat"), stored)
    else:
        split = {part: [[f"/home/them/cuhk03/x/{name}", 0, 0] for name in wanted] for part, wanted in CUHK03.items()}
        (base / f"splits_new_{boxes}.json").write_text(json.dumps([split]))
    return base


def vehicleid(root: Path) -> Path:
    base = root / "VehicleID_V1.0"
    rows = {
        "train_list.txt": [(1, 9), (2, 9), (3, 10), (4, 10), (5, 2)],
        "test_list_800.txt": [(6, 7), (7, 7), (8, 30)],
    }
    for file, lines in rows.items():
        (base / "train_test_split").mkdir(parents=True, exist_ok=True)
        (base / "train_test_split" / file).write_text("".join(f"{image:07d} {vehicle}\n" for image, vehicle in lines))
        for image, _ in lines:
            picture(base / "image" / f"{image:07d}.jpg", image)
    return base


def veri(root: Path) -> Path:
    base = root / "VeRi"
    parts = {
        "image_train": [
            "0001_c001_00016450_0.jpg",
            "0001_c020_00016460_0.jpg",
            "0003_c002_00016450_0.jpg",
            "0004_c002_00016450_0.jpg",
        ],
        "image_query": ["0002_c002_00030600_0.jpg"],
        "image_test": ["0002_c002_00030600_0.jpg", "0002_c003_00030620_1.jpg", "0005_c001_00030620_1.jpg"],
    }
    for folder, names in parts.items():
        for number, name in enumerate(names):
            picture(base / folder / name, number)
    for file, folder in (("train_label.xml", "image_train"), ("test_label.xml", "image_test")):
        items = "".join(
            f'<Item imageName="{name}" vehicleID="{name[:4]}" cameraID="{name[5:9]}" colorID="5" typeID="{number}" />\n'
            for number, name in enumerate(parts[folder])
        )
        (base / file).write_text(
            f'<?xml version="1.0" encoding="gb2312"?>\n<TrainingImages Version="1.0">\n<Items number="3">\n{items}'
            "</Items>\n</TrainingImages>\n"
        )
    (base / "name_train.txt").write_text("".join(f"{name}\n" for name in parts["image_train"][:3]))
    (base / "keypoint_test.txt").write_text("VeRi/image_test/0002_c002_00030600_0.jpg -1 -1 20 124 3\n")
    return base
