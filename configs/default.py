"""All settings with their defaults and meanings; a configuration file of an experiment changes some of them.

The comments are the help texts of `train.py --help`.
"""

from ml_collections import ConfigDict

RENAMED = {
    "retrieval.lonely": "retrieval.singletons",
    "retrieval.shown": "retrieval.examples",
    "retrieval.noisy": "retrieval.corrupted",
    "retrieval.interval": "retrieval.bootstrap_unit",
    "retrieval.weighting": "retrieval.aggregate",
    "retrieval.centre_rate": "retrieval.center_lr",
    "retrieval.centre_weight": "retrieval.center_weight",
}
"""Settings with another name in earlier releases, old to new; a setting stays in its section.

Saved runs, configuration files and command lines may go on using the old names.
"""


EARLIER = {"sites.concatenated": "full"}
"""Values of settings in saved runs that do not have them, where they differ from today's defaults."""


def get_default() -> ConfigDict:
    """Returns the settings that all configurations share."""
    config = ConfigDict()
    config.name = "default"  # of the experiment; the work directory is runs/NAME
    config.seed = 0  # of all random numbers
    config.log_every = 50  # steps between log lines; each line is the mean since the last
    config.checkpoint_every = 500  # steps between checkpoints, which are written in the background
    config.progress = True  # show progress bars with the remaining time
    config.dry_run = False  # run two steps of the full-size job on random images, and write nothing
    config.dry_run_batch = 8  # images per device in a dry run
    config.latency_rounds = 30  # latency measurements of each network
    config.profile = ""  # FIRST:COUNT, steps of every stage to trace for TensorBoard, in WORKDIR/profile

    # Without labels: algorithm1, closed_form, wiener, measured, distilled, distilled_backbone. With labels:
    # label_augmented, alternating, continued.
    config.learner = "algorithm1"  # The weights of this learner are exported.
    config.compare = ()  # further learners to evaluate; also final_only, which cannot be fused
    config.task = "classification"  # meaning of the labels: classification, retrieval (docs/reid.md) or segmentation
    # for learners measured and distilled: corruptions, separated by commas, or pairs:, bank:, like: or unpaired:PLACE
    config.noise = "gaussian:0..40"

    config.data = ConfigDict(  # the images
        {
            "source": "digits",  # digits, folder:DIR, list:FILE, npz:FILE.npz, tfds:NAME, …: docs/data.md
            "merge": (),  # further sources for learning without labels, with weights: (("folder:DIR", 2.0), …)
            "weight": 1.0,  # of `source` when sources are merged
            "max_unreadable": 0.0,  # unreadable images to tolerate: a number, or a fraction below 1; 0 for none
            "max_megapixels": 0.0,  # largest image to decode, in millions of pixels; 0 for Pillow's limit of 179
            "data_dir": "",  # folder of TFDS data sets; "" means TFDS_DATA_DIR or ~/tensorflow_datasets
            "image_size": (224, 224),  # (height, width)
            "resize": "crop",  # crop, crop:FRACTION of the short side, squash, pad (whole image, padded) or exact
            "test_resize": "",  # of test images; keep and short:SHORT:LONG:M leave several sizes; "": as usual in the task
            "mean": (0.5, 0.5, 0.5),  # of the normalization, on the scale 0 to 1, as the weights expect
            "std": (0.5, 0.5, 0.5),  # of the normalization
            "flip": False,  # augmentation: horizontal flip with probability 1/2 (docs/data.md)
            "shift": 0,  # largest translation, in pixels
            "crop_scale": (),  # (smallest, largest) fraction of the area of a random resized crop, such as (0.08, 1.0)
            "crop_ratio": (3 / 4, 4 / 3),  # smallest and largest aspect ratio (width / height) of that crop
            "scale": (),  # (smallest, largest) factor of a random resize, such as (0.5, 2.0), and a crop of `image_size`
            "scale_base": (),  # (short, long) side that factor 1 stands for, such as (512, 2048); () the image's own
            "cat_max_ratio": 1.0,  # with `scale`: largest fraction of one class in a crop, such as 0.75
            "photometric": False,  # random brightness, contrast, saturation and hue
            "randaugment": 0,  # operations per image
            "randaugment_magnitude": 9.0,  # of the operations, 0 to 30
            "erase": 0.0,  # probability of random erasing
            "erase_fill": (),  # color of erased boxes, such as (0.485, 0.456, 0.406); () for random bytes
            "mixup": 0.0,  # α of the Beta distribution of mixing weights; labeled stages only
            "cutmix": 0.0,  # α of the Beta distribution of areas; labeled stages only
        }
    )
    config.model = ConfigDict(  # the backbone's architecture; models have further settings (docs/models.md)
        {
            "name": "vit",  # in the registry, or PACKAGE.MODULE:NAME or FILE.py:NAME of your own (docs/own_model.md)
            "num_classes": 0,  # 0: those of the images; -1: no head, the backbone gives features
        },
        type_safe=False,
    )

    computing = {
        "accumulate": 1,  # microbatches per step; more of them need less memory
        "divide_optimizer": False,  # shard the optimizer's state among the devices (ZeRO, stage 1)
        "compute": "float32",  # or bfloat16; parameters and optimizer state stay float32
        "remat": False,  # recompute blocks in the backward pass: less memory, more time
    }
    falling = {
        "decay": "cosine",  # of the learning rate: cosine, poly:POWER such as poly:0.9, or steps:FRACTION,… (÷10 at each)
        "floor": 0.0,  # learning rate at the end
        "no_decay": (),  # regular expressions over paths of parameters without weight decay; () for the usual ones
        "rates": (),  # factors on the learning rate: ((regular expression over paths, factor), …)
    }
    unlabeled = {
        **computing,
        **falling,
        "steps": 0,  # of training; 0 for no training
        "batch_size": 64,  # images per step, over all devices
        "optimizer": "adamw",  # adam, adamw, sgd (Nesterov) or momentum
        "learning_rate": 1e-3,  # the peak
        "warmup": 0,  # steps of linear warm-up
        "weight_decay": 0.0,  # not for adam
        "clip": 0.0,  # largest gradient norm; 0 for no limit
    }
    stage = {
        **unlabeled,
        "label_smoothing": 0.0,  # fraction of the target spread over all classes
    }
    init = {
        "init_from": "",  # file of trained weights (docs/weights.md); "" to train from scratch with steps > 0
        "init_format": "",  # of a foreign file; "" recognizes it by the names of its tensors
        "init_names": "",  # name table of a foreign file, FILE.py or a module; "" for the built-in ones (docs/own_model.md)
        "init_state": "",  # state within the file, such as "model_ema"; "" for the only one, or the averaged one
        "init_grid": (),  # (height, width) in patches of its position embeddings, if they are to be resized
        "init_channels": "",  # "sum", "mean" or "repeat": how a first convolution of other channels is read; "" refuses it
        "init_allow": (),  # regular expressions; names that may be missing, unused or of another shape
    }
    config.pretrain = ConfigDict(  # the backbone, a ViT, first learns to denoise without labels (docs/pretraining.md)
        {
            **unlabeled,
            "components": 16,  # d, latents a patch
            "scale": "global",  # unit of the noise: global (one standard deviation), whiten (each latent's own) or none
            "center": True,  # whether the mean patch is subtracted before the PCA
            "noise": "latent",  # latent (l-DAE), pixels (a classical denoiser), mask (whole patches) or none
            "schedule": "linear",  # of the noise: linear (σ from 0 to max_sigma), single (√⅓), variance or ddpm
            "max_sigma": 2**0.5,  # largest σ of schedule linear
            "timesteps": 1000,  # time steps of the schedule, drawn uniformly
            "predict": "clean",  # or noise
            "inputs": "image",  # image (by the inverse PCA) or latent
            "outputs": "image",  # image, projection (of it on the components) or latent
            "residual_weight": 0.1,  # weight of the loss outside the components, with outputs image
            "mask_ratio": 0.6,  # probability that a patch is hidden, with noise mask
            "conditioned": True,  # whether the network is told the time step, by adaLN-Zero
            "time_width": 0,  # of the time embedding; 0 for a quarter of the width
            "gate": 0.0,  # of every branch at the start: 0 as in the paper; 1 starts as a plain ViT, for short pre-training
            "blocks": 0,  # of encoder and decoder together, an even number; 0 for twice model.depth
            "t": 10,  # time step at which the encoder becomes a plain ViT
            "project": True,  # whether the ViT sees images projected on the components, as in pre-training
            "sweep": (),  # further time steps to probe, such as (0, 20, 40, 80)
            "probe_images": 0,  # training images of the linear probe; 0 for all
            "probe_every": 0,  # steps between the points of the probe's curve; 0 for none
        }
    )
    config.backbone = ConfigDict({**init, **stage})  # the network to denoise: read from a file, or trained with labels
    # the arm that trains the backbone on for the budget of the denoisers; none if steps is 0
    config.control = ConfigDict(stage)

    config.retrieval = ConfigDict(  # labeled training and evaluation in task retrieval
        {
            "metric": "cosine",  # or euclidean
            "rerank": (),  # (k1, k2, λ) of k-reciprocal re-ranking, such as (20, 6, 0.3); () for none
            "corrupted": "both",  # images that the conditions of the evaluation corrupt: query, gallery or both
            "bootstrap_unit": "query",  # what confidence intervals resample: query, or identity (with all its queries)
            "examples": 2,  # queries in the report of each kind: largest gain, largest loss, at random; 0 for none
            "attributed": 0,  # sites that change most whose single effect on the ranking is measured; 0 for none
            "side": "",  # side information given to the backbone: camera, view or camera+view
            "unseen": "refuse",  # its values that training never saw: refuse, drop (no embedding), map:VALUE or keep
            "side_values": (),  # numbers of cameras and views the backbone knows, to evaluate it on other ones
            "identities": 16,  # P of a labeled stage's P × K batches
            "instances": 4,  # K images of each identity; 0 for batches of any images
            "singletons": "refuse",  # or drop: identities with a single image, which P × K batches cannot use
            "id_weight": 1.0,  # weight of the cross-entropy over identities
            "triplet_weight": 1.0,  # weight of the batch-hard triplet loss
            "margin": 0.0,  # of the triplet loss; 0 for the soft margin
            "center_weight": 0.0,  # weight of the center loss, such as 0.0005
            "center_lr": 0.5,  # learning rate of the centers
            "aggregate": "half",  # weighting of several features: half (TransReID), sum (CLIP-ReID) or mean
            "views": False,  # triplets by view, for backbones with one branch for equal and one for different views
        }
    )
    config.segmentation = ConfigDict(  # labeled training and evaluation in task segmentation (docs/segmentation.md)
        {
            "average": "labeled",  # the loss is divided by the number of labeled pixels, or of all, as mmsegmentation does
            "auxiliary_weight": 0.4,  # of the loss of an auxiliary head, in training only
            "boundary_ratio": 0.02,  # width of the regions of the boundary IoU, a fraction of the image's diagonal
            "void_outputs": (),  # outputs of the head that stand for no class of the labels, such as (11,)
            "void_answers": "never",  # where such an output is the largest: never (it is left out) or wrong
            "bootstrap_unit": "image",  # what confidence intervals resample: image, or cluster (such as a video)
            "examples": 6,  # test images in the report; 0 for none
        }
    )
    config.detection = ConfigDict(  # labeled training and evaluation in task detection (docs/detection.md)
        {
            "confidence": 0.3,  # score from which boxes of the clean unfused network are pseudo-labels, and are shown
            "objects": 0,  # objects that every batch has room for, which several processes need; 0: those of the batch
            "masks": False,  # labels have masks, which networks with masks learn from in labeled stages
            "padding": 1,  # multiple of pixels that test images of several sizes are padded to, such as 32
            "examples": 6,  # test images in the report; 0 for none
        }
    )
    config.schedule = ConfigDict(  # the noise schedule
        {
            "timesteps": 1000,  # T
            "beta_start": 1e-4,  # β at t = 1
            "beta_end": 0.002,  # β at t = T
        }
    )
    config.sites = ConfigDict(  # the layers to denoise
        {
            "pattern": "",  # regular expression over layer paths; "": the network's own, or MLPs, or else all layers
            "kind": "auto",  # for convolutions: patch, pointwise or auto
            "max_width": 2304,  # auto: largest patch (k²·C per group) with a patch denoiser; wider: pointwise
            "concatenated": "blocks",  # where a layer reads a concatenation: blocks, one denoiser a source, or full
            "call_weights": "positions",  # of layers called several times: all their positions weigh alike, or all calls
            "batchnorm_bias": False,  # constants also before layers without bias: in the running mean of their BatchNorm
        }
    )
    config.denoise = ConfigDict(  # the denoisers, and how Algorithm 1 learns them
        {
            **computing,
            **falling,
            "rule": "ddpm",  # reverse step: ddpm (Eq. 5), paper (Eq. 7 as printed), ddim, ddim:r
            "steps": 1,  # reverse steps per site
            "rank": 0,  # of each denoiser's matrix minus a multiple of the identity; 0 for full matrices
            "time_scale": 1.0,  # t = time_scale · steps · (N − i + 1); above 1 it assumes more noise than the paper
            "moment_images": 0,  # images for the moments, which give the optimum; 0 for all
            "moment_gib": 0.0,  # GiB per device for moments; more sites take further passes; 0: one pass
            "moment_tokens": 1.0,  # fraction of each image's tokens used; 0.25 costs 1.4 forward passes instead of 2.2
            "loss": "l2",  # l2, l1 or l1+l2
            "tokens": 1.0,  # fraction of each image's tokens that Algorithm 1 learns from
            "train_steps": 1000,  # steps of Algorithm 1
            "batch_size": 64,  # images per step, over all devices
            "optimizer": "adam",  # adam, adamw, sgd (Nesterov) or momentum
            "learning_rate": 4e-4,  # the peak
            "warmup": 0,  # steps of linear warm-up
            "weight_decay": 0.0,  # not for adam
            "clip": 0.0,  # largest gradient norm; 0 for no limit
            "ema": 0.0,  # decay of a moving average of the denoisers, used in place of the last values; 0 for none
            "label_lambda": 0.01,  # λ of Eq. 12: weight of Algorithm 1's loss in labeled stages
        }
    )
    config.alternate = ConfigDict(  # of learner alternating; its phases also follow `denoise` and `control`
        {
            "steps": 0,  # total steps of both phases
            "period": 100,  # steps of each phase; 10 epochs in the paper
            "order": ("denoise", "backbone"),  # the phases, first to last
        }
    )
    config.measured = ConfigDict(  # of learner measured
        {
            "images": 1500,  # training images used; 0 for all
            "draws": 1,  # corrupted versions of each image
            "clean_share": (0.75,),  # weight of the clean images; of several, the best on held-out images is chosen
            "ridge": 0.0,  # pull to the identity, in units of a site's mean feature power; 0: chosen on held-out images
            "vectors": 400,  # feature vectors per site, in multiples of its width
            "chunk": 64,  # images that are computed at once on a device, at most; large ones go in smaller chunks
            "memory_gib": 4.0,  # GiB of images and features that wait in memory; the others are computed again
            "shortcut": True,  # whether layers also remove the noise of the shortcut that they are added to
        }
    )
    config.distilled = ConfigDict(  # of learners distilled and distilled_backbone, which train on the clean answers
        {
            **computing,
            **falling,
            "init_from": "",  # measured: start from the solution of that learner, which is compared; "" for the backbone
            "clean_share": 0.25,  # fraction of the images that are left clean
            "steps": 1000,  # of training
            "batch_size": 64,  # images per step, over all devices
            "optimizer": "adam",  # adam, adamw, sgd (Nesterov) or momentum
            "learning_rate": 1e-4,  # the peak; distilled_backbone takes more, such as 1e-3
            "warmup": 0,  # steps of linear warm-up
            "weight_decay": 0.0,  # not for adam
            "clip": 0.0,  # largest gradient norm; 0 for no limit
        }
    )
    config.wiener = ConfigDict(  # of learner wiener
        {"ratios": (0.001, 0.003, 0.01, 0.03, 0.1)}  # of noise to mean feature power, candidates
    )
    config.select = ConfigDict(  # choice of learners wiener, measured and distilled on held-out images
        {
            "strengths": (0.0, 0.25, 0.5, 0.75, 1.0),  # of fusion, candidates
            "leading": (
                1.0,
            ),  # fractions of the sites, the first in execution order, candidates; the rest stays as it is
            "conditions": (),  # to choose by; () for those of the evaluation
            "images": 1000,  # held-out images used; 0 for all
            "labels": True,  # False: by agreement with the backbone's answers on clean images, even with labels
            "weighted": False,  # classification without labels: answers count by the backbone's probability for them
            "max_clean_loss": 1.0,  # largest loss on clean images, in percentage points
        }
    )
    config.sweep = ConfigDict(  # grid of `fuse.py --sweep`, which chooses as set in `select`
        {
            # reverse steps, and Wiener filters with this ratio of noise to mean feature power
            "rules": ("ddpm", "ddim:0", "wiener:0.001", "wiener:0.003", "wiener:0.01", "wiener:0.03", "wiener:0.1"),
            "steps": (1, 2, 5, 10),  # reverse steps per site; ddim:r and wiener:r take one only
            "scales": (1.0, 3.0, 10.0, 30.0, 100.0),  # of the time steps; combinations outside the schedule are skipped
            "strengths": (0.0, 0.25, 0.5, 0.75, 1.0, 1.5),  # of fusion
        }
    )
    config.evaluate = ConfigDict(  # the comparison of the arms
        {
            "conditions": ("clean", "gaussian:40", "gaussian:80"),  # of the test images (docs/corruptions.md)
            "batch_size": 200,  # images per batch, over all devices
            "statistics": (),  # rows with BatchNorms that mix statistics of the images, such as ("image:0.1", "batch:0.25")
            "unknown_classes": "refuse",  # test images of classes without a training image; score: the backbone knows them
            "gallery": 2000,  # training images of each merged source among which nearest neighbors are sought
            "resamples": 10_000,  # bootstrap resamples
            "placebo": "effect",  # random maps as large as the learned ones: by effect on clean features, or norm (of maps)
            "certificate_images": 16,  # images on which the fused network is compared with the explicit one
            "certificate_sizes": (),  # further sizes of these images to compare at, such as ("512x683", "97x131")
            "latency_batch": 64,  # images per batch of the latency measurement
            "spectra": False,  # take the moments for the report's spectra even where no learner needs them
        }
    )
    config.wandb = ConfigDict(  # Weights & Biases: pip install -r requirements-wandb.txt
        {
            "project": "",  # "" for no logging there
            "entity": "",  # user or team; "" for your default
            "name": "",  # of the run; "" for that of the work directory
            "group": "",  # of runs it belongs to
            "tags": (),  # of the run
            "mode": "online",  # online, or offline (WORKDIR/wandb, for `wandb sync`)
        }
    )
    return config
