"""Small data sets of images with masks, laid out as the public ones are."""

import numpy as np
from PIL import Image

SIZE = (6, 8)


def picture(seed=0, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def stripes(values, size=SIZE):
    """A mask whose columns hold these values in turn."""
    columns = np.array(values)[np.arange(size[1]) * len(values) // size[1]]
    return np.tile(columns, (size[0], 1)).astype(np.uint8)


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image = image.copy()
        image.putpalette([level for value in range(256) for level in (value, 255 - value, 7 * value % 256)])
    image.save(path)


def write(root, files):
    """Writes {path: array, or text}."""
    for name, content in files.items():
        if isinstance(content, str):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content, encoding="utf-8")
        else:
            save(root / name, content, "P" if content.ndim == 2 and "Class" in name else None)
    return root


def ade20k(root, values=(0, 1, 150), count=2):
    files = {}
    for folder, kind in (("training", "train"), ("validation", "val")):
        for number in range(1, count + 1):
            name = f"{folder}/ADE_{kind}_{number:08d}"
            files[f"ADEChallengeData2016/images/{name}.jpg"] = picture(number)
            files[f"ADEChallengeData2016/annotations/{name}.png"] = stripes(values)
    return write(root, files)


def cityscapes(root, kind="labelIds", values=(0, 7, 33)):
    files = {}
    for split in ("train", "val", "test"):
        for number in range(2):
            name = f"{split}/ulm/ulm_{number:06d}_000019"
            files[f"leftImg8bit/{name}_leftImg8bit.png"] = picture(number)
            files[f"gtFine/{name}_gtFine_{kind}.png"] = stripes((0,) if split == "test" else values)
            files[f"gtFine/{name}_gtFine_color.png"] = picture(number)
    return write(root, files)


def voc(root, values=(0, 20, 255)):
    files, lists = {}, {"train": range(2), "val": range(2, 4)}
    for split, numbers in lists.items():
        files[f"VOC2012/ImageSets/Segmentation/{split}.txt"] = "".join(f"2007_{number:06d}\n" for number in numbers)
        for number in numbers:
            files[f"VOC2012/JPEGImages/2007_{number:06d}.jpg"] = picture(number)
            files[f"VOC2012/SegmentationClass/2007_{number:06d}.png"] = stripes(values)
    files["VOC2012/JPEGImages/2007_999999.jpg"] = picture(9)  # an image of another list
    return write(root, files)


def coco_stuff(root, values=(0, 181, 255), ending="", folder="stuffthingmaps"):
    files = {}
    for split in ("train2017", "val2017"):
        for number in range(2):
            files[f"images/{split}/{number:012d}.jpg"] = picture(number)
            files[f"{folder}/{split}/{number:012d}{ending}.png"] = stripes(values)
    return write(root, files)


def camvid(root, values=(0, 10, 11)):
    files = {}
    for split in ("train", "val", "test"):
        for number in range(3):
            name = f"{'0001TP' if number else 'Seq05VD'}_{number:06d}.png"
            files[f"CamVid/{split}/{name}"] = picture(number)
            files[f"CamVid/{split}annot/{name}"] = stripes(values)
        listed = ("0001TP_000002", "Seq05VD_000000")
        files[f"CamVid/{split}.txt"] = "".join(
            f"/SegNet/CamVid/{split}/{name}.png /SegNet/CamVid/{split}annot/{name}.png\n" for name in listed
        )
    return write(root, files)


def own(root, values=(0, 1, 255), classes="road\ncar\n", count=2, masks=None):
    """images and masks; `masks` maps the stem of an image to another mask."""
    files = {"classes.txt": classes} if classes else {}
    for number in range(count):
        files[f"images/im{number}.png"] = picture(number)
        files[f"masks/im{number}.png"] = (masks or {}).get(f"im{number}", stripes(values))
    return write(root, files)


def packed(path, values=(0, 10, 11), count=4, **more):
    arrays = {
        "images": np.stack([picture(number) for number in range(count)]),
        "masks": np.stack([stripes(values)] * count),
        "split": np.array([0, 0, 1, 2])[:count],
        "split_names": np.array(["train", "val", "test"]),
        "class_names": np.array([f"c{number}" for number in range(11)] + ["Unlabelled"]),
        "frame": np.array([f"v{number // 2}_{number}" for number in range(count)]),
    }
    arrays |= more
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path
