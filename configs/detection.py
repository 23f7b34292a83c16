"""Detection as in the paper's table: data sets, networks, training modes.

    python train.py --config=configs/detection.py:coco:faster_rcnn_r50 \\
        --config.data.source=coco:DIR --config.backbone.init_from=faster_rcnn_r50.pth
    python train.py --config=configs/detection.py:coco:yolov3_d53:label_augmented \\
        --config.data.source=coco:DIR --config.backbone.init_from=yolov3_d53.pth
    python train.py --config=configs/detection.py:folder:detr_r50:alternating \\
        --config.data.source=det_folder:DIR …

The first word is the data set, the second the network, and the optional third the training mode.
Weights are the public files (docs/weights.md). The paper's rows on COCO, box AP in percent, and the
rows of mmdetection's model zoo that have these baselines. None of them was measured here, since
neither the data nor the weights were at hand:

| network | paper | paper + DenoiseRep | public AP (mask AP) |
|---|---|---|---|
| faster_rcnn_r50 | 37.4 | 38.3 | 37.4 (1x) |
| mask_rcnn_r50 | 42.6 | 43.2 | no public row of 42.6: 38.2 (1x), 40.9 (3x) |
| mask_rcnn_swin_t | 42.8 | 44.3 | 42.7 (39.3), 1x |
| mask_rcnn_swin_s | 48.2 | 49.0 | 48.2 (43.2), 3x |
| detr_r50 | 39.9 | 40.8 | 39.9 (150 epochs) |
| yolov3_d53 | 27.9 | 28.4 | 27.9 (320 pixels) |
| atss_r50 | 39.4 | 39.9 | 39.4 (1x) |
| centernet_r50 | 40.2 | 40.6 | 40.2 (CenterNet-update) |

The paper writes SwinV2, and its baselines are to the digit those of Swin (v1): both are here,
mask_rcnn_swin_t and _s as published, mask_rcnn_swinv2_t and _s with the backbone that it names.

Test images follow mmdetection: a short side of 800 and a long one of at most 1333, padded with 0 to
multiples of 32; for YOLOv3 at most 320 × 320; for DETR without padding. Training follows its
schedules in batch, optimizer, rate and steps, but on images of one size: each is fitted into 800 ×
1344 pixels (416 × 416 for YOLOv3), scaled by 0.5 … 1.5 and flipped. `baseline` trains a network so,
from the beginning; the other modes take a trained one. Denoisers work in the backbone: heads come
after the features that the noise is in, and a proposal head of 12,544 inputs would need 157 million
numbers.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import choice
from configs.default import get_default

IMAGENET = {"mean": (123.675 / 255, 116.28 / 255, 103.53 / 255), "std": (58.395 / 255, 57.12 / 255, 57.375 / 255)}
CAFFE = {"mean": IMAGENET["mean"], "std": (1 / 255, 1 / 255, 1 / 255)}
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

DATASETS: dict[str, dict[str, Any]] = {
    "coco": {"source": "coco:", "images": 117_266},
    "voc": {"source": "det_voc:", "images": 5_717},
    "folder": {"source": "det_folder:", "images": 5_000},
}
"""Reader, and images with objects in its training split, an epoch; that of a folder is a guess."""

SGD = {"optimizer": "momentum", "learning_rate": 0.02, "weight_decay": 1e-4, "warmup": 500}
ADAMW = {"optimizer": "adamw", "learning_rate": 1e-4, "weight_decay": 0.05, "warmup": 1000}
ONE, THREE = {"epochs": 12, "decay": "steps:0.6667,0.9167"}, {"epochs": 36, "decay": "steps:0.75,0.9167"}
LARGE = {"size": (800, 1344), "test": "short:800:1333", "padding": 32, "batch": 16, "data": IMAGENET}
CONVOLUTIONS, LINEARS = "backbone/.*", "backbone/.*mlp.*"

NETWORKS: dict[str, dict[str, Any]] = {
    "faster_rcnn_r50": {**LARGE, **ONE, "recipe": SGD, "sites": CONVOLUTIONS},
    "mask_rcnn_r50": {**LARGE, **ONE, "recipe": SGD, "sites": CONVOLUTIONS},
    "mask_rcnn_swinv2_t": {**LARGE, **ONE, "recipe": ADAMW, "sites": LINEARS},
    "mask_rcnn_swinv2_s": {**LARGE, **THREE, "recipe": ADAMW, "sites": LINEARS},
    "mask_rcnn_swin_t": {**LARGE, **ONE, "recipe": ADAMW, "sites": LINEARS},
    "mask_rcnn_swin_s": {**LARGE, **THREE, "recipe": ADAMW, "sites": LINEARS},
    "detr_r50": {
        **LARGE,
        "padding": 1,
        "epochs": 150,
        "decay": "steps:0.6667",
        "recipe": {"optimizer": "adamw", "learning_rate": 1e-4, "weight_decay": 1e-4, "clip": 0.1},
        "rates": (("backbone/.*", 0.1),),
        "sites": CONVOLUTIONS,
    },
    "yolov3_d53": {
        "size": (416, 416),
        "test": "short:320:320",
        "padding": 32,
        "batch": 64,
        "data": PLAIN,
        "epochs": 273,
        "decay": "steps:0.7985,0.9011",
        "recipe": {"optimizer": "momentum", "learning_rate": 1e-3, "weight_decay": 5e-4, "clip": 35.0, "warmup": 2000},
        "sites": "",
    },
    "atss_r50": {**LARGE, **ONE, "recipe": {**SGD, "learning_rate": 0.01}, "sites": CONVOLUTIONS},
    "centernet_r50": {
        **LARGE,
        **ONE,
        "data": CAFFE,
        "recipe": {**SGD, "learning_rate": 0.01, "warmup": 4000},
        "sites": CONVOLUTIONS,
    },
}

MODES: dict[str, dict[str, Any]] = {**choice.MODES, "baseline": {"learner": "closed_form", "compare": ()}}
STEPS = 20_000
"""Of learning denoisers, and of the control arm, which trains the network on for as long."""


def get_config(text: str = "coco:faster_rcnn_r50") -> ConfigDict:
    """Returns the configuration.

    Args:
      text: DATASET:NETWORK or DATASET:NETWORK:MODE.
    """
    name, dataset, network_name, network, mode, chosen = choice.parse_choice(
        text, "configs/detection.py", DATASETS, NETWORKS, MODES
    )
    batch, recipe = network["batch"], network["recipe"]

    config = get_default()
    config.name = f"detection_{name}_{network_name}_{mode}"
    config.update(chosen)
    config.task = "detection"
    config.data.update({"source": dataset["source"], **network["data"]})
    config.data.update({"image_size": network["size"], "resize": "pad", "flip": True, "scale": (0.5, 1.5)})
    config.data.update({"scale_base": network["size"], "test_resize": network["test"]})
    config.detection.padding = network["padding"]
    config.detection.masks = network_name.startswith("mask_") and mode in (*choice.LABELED, "baseline")
    config.model.name = network_name
    config.sites.pattern = network["sites"]
    labeled = {**recipe, "batch_size": batch, "decay": network["decay"], "rates": network.get("rates", ())}
    epoch = -(-dataset["images"] // batch)
    config.backbone.update({**labeled, "steps": network["epochs"] * epoch if mode == "baseline" else 0})
    # Trained networks are trained on with a tenth of the rate.
    config.control.update({**labeled, "steps": STEPS if mode in choice.LABELED else 0})
    config.control.learning_rate = recipe["learning_rate"] / 10
    config.denoise.update({"train_steps": STEPS, "batch_size": batch, "learning_rate": 4e-4, "tokens": 0.25})
    config.denoise.update({"moment_images": 2000, "moment_tokens": 0.25})
    config.alternate.update({"steps": STEPS, "period": 2000})
    config.noise = "gaussian:0..40"
    config.measured.update({"images": 200, "clean_share": (0.7, 0.9)})
    config.select.update({"labels": False, "images": 50, "max_clean_loss": 10.0, "leading": (0.1, 0.25, 0.5)})
    config.evaluate.update({"conditions": ("clean", "gaussian:20", "gaussian:40"), "batch_size": 8})
    config.evaluate.update({"latency_batch": 2, "certificate_images": 2, "resamples": 1000})
    return config
