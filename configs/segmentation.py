"""Semantic segmentation as in the paper's table: data sets, backbones, training modes.

    python train.py --config=configs/segmentation.py:ade20k:segformer_b0 \\
        --config.data.source=ade20k:DIR --config.backbone.init_from=segformer_b0.pth
    python train.py --config=configs/segmentation.py:ade20k:fcn_r50:label_augmented \\
        --config.data.source=ade20k:DIR --config.backbone.init_from=fcn_r50.pth
    python train.py --config=configs/segmentation.py:folder:fcn_resnet50:alternating \\
        --config.data.source=seg_folder:DIR …

The first word is the data set, the second the backbone, and the optional third the training mode.
Weights are the public files (docs/weights.md). The paper's rows on ADE20K, mIoU (B-IoU) in percent,
and the public figures of the backbones, single scale. None of them was measured here, since neither
the data nor the weights were at hand:

| backbone | paper | paper + DenoiseRep | public mIoU |
|---|---|---|---|
| fcn_r50 | 35.9 (28.7) | 36.5 (29.9) | 35.94 (mmsegmentation, 80k steps) |
| fcn_r101 | 39.6 (30.6) | 40.4 (31.6) | 39.61 (mmsegmentation, 80k steps) |
| segformer_b0 | 37.4 (29.2) | 38.1 (29.7) | 37.41 (mmsegmentation), 37.4 (NVlabs) |
| segformer_b1 | 42.2 (34.1) | 42.5 (34.8) | 40.97 (mmsegmentation), 42.2 (NVlabs) |

The paper does not define its B-IoU, so that column cannot be compared with ours. Test images are
resized to a short side of 512 and a long one of at most 2048; logits are resized to the labels'
size. `--config.data.test_resize=short:512:2048:32` rounds the sides up to multiples of 32, as
NVlabs does (segformer_b0_nvlabs, segformer_b1_nvlabs). That alone moves mIoU by 0.7, so both arms
need the same. The report says which was used.

Learning follows mmsegmentation: images scaled by 0.5 … 2, crops of which no class covers more than
three quarters, flips, photometric distortion, batches of 16. FCN has SGD with a rate of 0.01 that
falls by (1 − k/T)^0.9 to 1e-4. SegFormer has AdamW with 6e-5, falling linearly after 1,500 steps of
warm-up, ten times that in the head, and no decay of norms. `baseline` trains a backbone so, from
the beginning; the other modes take a trained one.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import choice
from configs.default import get_default

IMAGENET = {"mean": (123.675 / 255, 116.28 / 255, 103.53 / 255), "std": (58.395 / 255, 57.12 / 255, 57.375 / 255)}

# crop, and (short, long) side that scale 1 stands for; test images are resized to the latter, or keep their size
DATASETS: dict[str, dict[str, Any]] = {
    "ade20k": {"crop": (512, 512), "base": (512, 2048), "classes": 150},
    "cityscapes": {"crop": (512, 1024), "base": (1024, 2048), "classes": 19},
    "voc": {"crop": (512, 512), "base": (512, 2048), "classes": 21},
    "coco_stuff": {"crop": (512, 512), "base": (512, 2048), "classes": 171},
    "camvid": {"crop": (360, 480), "base": (), "classes": 11},
    "folder": {"crop": (512, 512), "base": (512, 2048), "classes": 0},
}

FCN = {
    "optimizer": "momentum",
    "learning_rate": 0.01,
    "weight_decay": 5e-4,
    "decay": "poly:0.9",
    "floor": 1e-4,
}
SEGFORMER = {
    "optimizer": "adamw",
    "learning_rate": 6e-5,
    "weight_decay": 0.01,
    "decay": "poly:1",
    "warmup": 1500,
    # In mmsegmentation the norms after the stages and the head's do decay, since their names do not contain "norm".
    "no_decay": ("block.*norm.*", "patch_norm.*"),
    "rates": (("decode_head/.*", 10.0),),
}
BACKBONES: dict[str, dict[str, Any]] = {
    "fcn_r50": {"model": {}, "recipe": FCN, "steps": 80_000},
    "fcn_r101": {"model": {}, "recipe": FCN, "steps": 80_000},
    "fcn_resnet50": {"model": {}, "recipe": FCN, "steps": 80_000},
    "fcn_resnet101": {"model": {}, "recipe": FCN, "steps": 80_000},
    "segformer_b0": {"model": {}, "recipe": SEGFORMER, "steps": 160_000},
    "segformer_b1": {"model": {}, "recipe": SEGFORMER, "steps": 160_000},
    "segformer_b0_nvlabs": {"model": {"implementation": "nvlabs"}, "recipe": SEGFORMER, "steps": 160_000},
    "segformer_b1_nvlabs": {"model": {"implementation": "nvlabs"}, "recipe": SEGFORMER, "steps": 160_000},
}
NVLABS = "_nvlabs"

MODES: dict[str, dict[str, Any]] = {**choice.MODES, "baseline": {"learner": "closed_form", "compare": ()}}
STEPS = 20_000
"""Of learning denoisers, and of the control arm, which trains the backbone on for as long."""


def get_config(text: str = "ade20k:segformer_b0") -> ConfigDict:
    """Returns the configuration.

    Args:
      text: DATASET:BACKBONE or DATASET:BACKBONE:MODE.
    """
    name, dataset, backbone_name, backbone, mode, chosen = choice.parse_choice(
        text, "configs/segmentation.py", DATASETS, BACKBONES, MODES
    )

    config = get_default()
    config.name = f"segmentation_{name}_{backbone_name}_{mode}"
    config.update(chosen)
    config.task = "segmentation"
    config.data.update({"source": f"{'seg_folder' if name == 'folder' else name}:", **IMAGENET})
    config.data.update({"image_size": dataset["crop"], "resize": "crop", "flip": True, "photometric": True})
    config.data.update({"scale": (0.5, 2.0), "scale_base": dataset["base"], "cat_max_ratio": 0.75})
    config.data.test_resize = ":".join(["short", *map(str, dataset["base"])]) if dataset["base"] else "keep"
    if backbone_name.endswith(NVLABS) and dataset["base"]:
        config.data.test_resize += ":32"
    config.model.update({"name": backbone_name.removesuffix(NVLABS), **backbone["model"]})
    config.segmentation.average = "all"  # as mmsegmentation divides
    labeled = {**backbone["recipe"], "batch_size": 16}
    config.backbone.update({**labeled, "steps": backbone["steps"] if mode == "baseline" else 0})
    # Trained networks are trained on with a tenth of the rate.
    config.control.update({**labeled, "steps": STEPS if mode in choice.LABELED else 0, "floor": 0.0})
    config.control.learning_rate = labeled["learning_rate"] / 10
    config.denoise.update({"train_steps": STEPS, "batch_size": 16, "learning_rate": 4e-4, "tokens": 0.25})
    config.denoise.update({"moment_images": 2000, "moment_tokens": 0.25})
    config.alternate.update({"steps": STEPS, "period": 2000})
    config.noise = "gaussian:0..40"
    config.measured.update({"images": 200, "clean_share": (0.8, 0.9)})
    config.select.update({"labels": False, "images": 50, "max_clean_loss": 15.0, "leading": (0.3, 0.6, 1.0)})
    config.evaluate.update({"conditions": ("clean", "gaussian:20", "gaussian:40"), "batch_size": 16})
    config.evaluate.update({"latency_batch": 4, "certificate_images": 2})
    return config
