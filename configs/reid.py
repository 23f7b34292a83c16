"""Re-identification as in the paper's Tables 2 to 4 and 6: data sets, backbones, training modes.

    python train.py --config=configs/reid.py:market1501:transreid_ssl_s \\
        --config.data.source=market1501:DIR --config.backbone.init_from=vit_small.pth
    python train.py --config=configs/reid.py:msmt17:transreid_b:label_augmented \\
        --config.data.source=msmt17:DIR …
    python train.py --config=configs/reid.py:vehicleid:resnet50:alternating \\
        --config.data.source=vehicleid:DIR …
    python train.py --config=configs/reid.py:folder:transreid_ssl_s \\
        --config.data.source=reid_folder:DIR …

The first word is the data set, the second the backbone, and the optional third the training mode.
Weights are the published files (docs/weights.md). The field's protocol: images squashed to 256 ×
128 (vehicles 256 × 256; transreid_ssl_b_ics 384 × 128, for which it is published), flipped, shifted
by up to 10 pixels, half of them with a rectangle erased; batches of 16 identities with 4 images
each; single query, cross-camera. Views are read from `veri:DIR?views=known` (transreid_b,
resnet50_views), which leaves out the images of unknown view. The paper's merged training is
`--config.data.merge="(('msmt17:DIR', 1.0),)"` with the mode label_free. Results on these data sets
were not measured here: they are not public. Results on a real set of two cameras are in
docs/results.md.
"""

from ml_collections import ConfigDict

from configs.choice import LABELED, MODES, parse_choice
from configs.default import get_default
from drep_jax.errors import ConfigError

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
PERSONS, VEHICLES = (256, 128), (256, 256)

DATASETS = {
    "market1501": PERSONS,
    "duke": PERSONS,
    "msmt17": PERSONS,
    "cuhk03": PERSONS,
    "folder": PERSONS,
    "vehicleid": VEHICLES,
    "veri": VEHICLES,
}
BACKBONES = {
    "transreid_b": {"model": {"name": "transreid_b16", "patch_stride": 12}, "data": HALF},
    "transreid_b_baseline": {"model": {"name": "transreid_b16_baseline"}, "data": HALF},
    "transreid_ssl_s": {"model": {"name": "transreid_ssl_s16"}, "data": HALF},
    "transreid_ssl_b": {"model": {"name": "transreid_ssl_b16"}, "data": HALF},
    "transreid_ssl_s_ics": {"model": {"name": "transreid_ssl_s16_ics"}, "data": HALF},
    "transreid_ssl_b_ics": {"model": {"name": "transreid_ssl_b16_ics"}, "data": HALF, "persons": (384, 128)},
    "clip_reid": {
        "model": {"name": "clip_reid_b16"},
        "data": HALF,
        "aggregate": "sum",
        "margin": 0.3,
        "id_weight": 0.25,
    },
    "resnet50": {"model": {"name": "resnet50_reid"}, "data": IMAGENET, "margin": 0.3, "center_weight": 0.0005},
    "resnet50_views": {"model": {"name": "resnet50_vanet"}, "data": IMAGENET, "margin": 0.3, "views": True},
}
SIDE = {"veri": "camera+view", "vehicleid": ""}
"""Side information of published TransReID networks for vehicles; for persons it is the camera."""
SMOOTHED = ("clip_reid", "resnet50", "resnet50_views")
"""Backbones published with label smoothing."""

MODES = {**MODES, "final_only": {"learner": "closed_form", "compare": ("final_only",)}}
STEPS = 24_000  # 120 epochs of 12,936 images in batches of 64, as in the paper


def get_config(text: str = "market1501:transreid_ssl_s") -> ConfigDict:
    """Returns the configuration.

    Args:
      text: DATASET:BACKBONE or DATASET:BACKBONE:MODE.
    """
    dataset, size, name, backbone, mode, chosen = parse_choice(text, "configs/reid.py", DATASETS, BACKBONES, MODES)
    if size == PERSONS:
        size = backbone.get("persons", PERSONS)
    if backbone.get("views") and dataset not in ("veri", "folder"):
        raise ConfigError(
            "resnet50_views needs the view of every image, which of these data sets only veri and folder give."
        )

    config = get_default()
    config.name = f"reid_{dataset}_{name}_{mode}"
    config.update(chosen)
    config.task = "retrieval"
    config.data.update({"source": f"{'reid_folder' if dataset == 'folder' else dataset}:", **backbone["data"]})
    config.data.update({"image_size": size, "resize": "squash", "flip": True, "shift": 10, "erase": 0.5})
    config.model.update(backbone["model"])
    chosen = ("aggregate", "margin", "id_weight", "center_weight", "views")
    config.retrieval.update({key: backbone[key] for key in chosen if key in backbone})
    if name == "transreid_b":
        config.retrieval.side = SIDE.get(dataset, "camera")
        config.model.jigsaw_shift = 8 if size == VEHICLES else 5
    config.denoise.update({"train_steps": STEPS, "batch_size": 64, "learning_rate": 4e-4})
    labeled = {"batch_size": 64, "optimizer": "sgd", "learning_rate": 8e-3, "warmup": 1000, "weight_decay": 1e-4}
    labeled["label_smoothing"] = 0.1 if name in SMOOTHED else 0.0
    config.backbone.update(labeled)
    config.control.update({**labeled, "steps": STEPS if mode in LABELED else 0, "learning_rate": 4e-4})
    config.alternate.update({"steps": STEPS, "period": 2000})
    config.noise = "gaussian:0..40"
    config.select.labels = False
    config.evaluate.update({"conditions": ("clean", "gaussian:20"), "batch_size": 256, "latency_batch": 64})
    config.evaluate.certificate_images = 4
    return config
