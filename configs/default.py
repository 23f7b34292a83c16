"""Every setting with its default; a configuration file changes what is different about it."""

from ml_collections import ConfigDict


def get_default() -> ConfigDict:
    """Returns the settings that all configurations share."""
    config = ConfigDict()
    config.name = "default"  # of the experiment: its work directory is runs/NAME
    config.seed = 0  # of everything that is random
    config.log_every = 50  # steps a line of the log, which holds their mean
    config.checkpoint_every = 500  # steps; written in the background
    config.progress = True  # bars with the time left
    config.dry_run = False  # two steps of the full-size job on random images
    config.dry_run_batch = 8  # images a device in a dry run
    config.latency_rounds = 30  # measurements of each network's latency
    config.profile = ""  # FIRST:COUNT traces these steps of every stage for TensorBoard, in WORKDIR/profile

    # Without labels: algorithm1, closed_form, wiener, measured. With: label_augmented, alternating, continued.
    config.learner = "algorithm1"  # Its weights are exported.
    config.compare = ()  # further learners, evaluated beside it; also final_only, which cannot be fused
    config.task = "classification"  # what labels mean: classification, or retrieval (docs/reid.md)
    config.noise = "gaussian:0..40"  # for learner measured: a corruption, several with commas, or pairs:DIR

    config.data = ConfigDict(  # the images
        {
            "source": "digits",  # digits, folder:DIR, list:FILE, npz:FILE.npz, tfds:NAME, …: docs/data.md
            "merge": (),  # further sources to learn from without labels, with weights: (("folder:DIR", 2.0), …)
            "weight": 1.0,  # of `source` among them
            "max_unreadable": 0.0,  # images that may be unreadable: a number, or a share below 1; 0 refuses the first
            "data_dir": "",  # where TFDS keeps its data sets; "" means TFDS_DATA_DIR or ~/tensorflow_datasets
            "image_size": (224, 224),  # (height, width)
            "resize": "crop",  # crop, crop:SHARE of the short side that is kept, squash or exact
            "mean": (0.5, 0.5, 0.5),  # of the normalisation, on the scale 0 to 1, as the weights in use expect
            "std": (0.5, 0.5, 0.5),  # likewise
            "flip": False,  # augmentation of training images from here on (docs/data.md); every default is off
            "shift": 0,  # pixels
            "crop_scale": (),  # (smallest, largest) share of the area of a random resized crop, such as (0.08, 1.0)
            "crop_ratio": (3 / 4, 4 / 3),  # its width over height
            "randaugment": 0,  # operations an image
            "randaugment_magnitude": 9.0,  # 0 to 30
            "erase": 0.0,  # probability
            "erase_fill": (),  # the colour of erased boxes, as (0.485, 0.456, 0.406); () for random bytes
            "mixup": 0.0,  # parameter of the Beta distribution; labelled stages only
            "cutmix": 0.0,  # likewise
        }
    )
    config.model = ConfigDict(  # the backbone's architecture; further settings of it may be added (docs/models.md)
        {
            "name": "vit",  # of the registry, or PACKAGE.MODULE:NAME or FILE.py:NAME of your own (docs/own_model.md)
            "num_classes": 0,  # 0: as many as the images have; -1: features, no head
        },
        type_safe=False,
    )

    computing = {
        "accumulate": 1,  # parts that a device's share of a batch is cut into, for the memory of one
        "divide_optimizer": False,  # among the devices, each keeping its share of the optimiser's state (ZeRO, stage 1)
        "compute": "float32",  # or bfloat16; parameters and optimiser stay float32
        "remat": False,  # recompute blocks in the backward pass: less memory, more time
    }
    stage = {
        **computing,
        "steps": 0,  # of training; 0 for none
        "batch_size": 64,  # images a step, on all devices together
        "optimizer": "adamw",  # adam, adamw or sgd
        "learning_rate": 1e-3,  # its peak; it falls to 0 along a cosine
        "warmup": 0,  # steps in which it rises first
        "weight_decay": 0.0,  # of adamw and sgd
        "clip": 0.0,  # largest norm of the gradient; 0 for any
        "label_smoothing": 0.0,  # share of the target spread over all classes
    }
    init = {
        "init_from": "",  # file of trained weights, ours or foreign (docs/weights.md); or train from scratch with steps > 0
        "init_format": "",  # of a foreign file; "" recognizes it by its names
        "init_names": "",  # name table of a foreign file, FILE.py or a module; "" for the built-in ones (docs/own_model.md)
        "init_state": "",  # which state in it, such as "model_ema"; "" takes the only one, or the averaged one
        "init_grid": (),  # (height, width) in patches of its position embeddings, where these are to be resized
        "init_allow": (),  # regular expressions over names that may be missing, left over or of another shape
    }
    config.backbone = ConfigDict({**init, **stage})  # what is denoised: read from a file, or trained with labels
    config.control = ConfigDict(stage)  # the backbone trained on, for the budget of the denoisers; steps 0: no such arm

    config.retrieval = ConfigDict(  # task retrieval: how it is trained with labels, and evaluated
        {
            "metric": "cosine",  # or euclidean
            "rerank": (),  # k-reciprocal re-ranking: (k1, k2, λ), such as (20, 6, 0.3)
            "noisy": "both",  # which images the conditions of the evaluation corrupt: query, gallery or both
            "interval": "query",  # what the intervals resample: query, or identity with all its queries
            "shown": 2,  # queries of each kind (gained most, lost most, at random) whose results the report shows; 0 for none
            "attributed": 0,  # sites, those that changed most, whose own effect on the ranking is measured; 0 for none
            "side": "",  # what the backbone is told beside the image: camera, view or camera+view
            "identities": 16,  # P of a labelled stage's batch of P × K images
            "instances": 4,  # K; 0 for batches of any images
            "lonely": "refuse",  # or drop: identities of one image, which P × K batches have no use for
            "id_weight": 1.0,  # of the cross-entropy over identities
            "triplet_weight": 1.0,  # of the batch-hard triplet loss
            "margin": 0.0,  # of the triplets; 0 for the soft margin
            "centre_weight": 0.0,  # of the centre loss, such as 0.0005
            "centre_rate": 0.5,  # learning rate of the centres
            "weighting": "half",  # of several features: half (TransReID), sum (CLIP-ReID) or mean
            "views": False,  # triplets by view, for backbones with branches for the same and for different views
        }
    )
    config.schedule = ConfigDict(  # of the noise
        {
            "timesteps": 1000,  # T
            "beta_start": 1e-4,  # β at t = 1
            "beta_end": 0.002,  # β at t = T
        }
    )
    config.sites = ConfigDict(  # the layers that are denoised
        {
            "pattern": "",  # regular expression over layer paths; "" means the linears of each MLP, or every layer
            "kind": "auto",  # for convolutions: patch, pointwise or auto
        }
    )
    config.denoise = ConfigDict(  # the denoisers and how they are learned
        {
            **computing,
            "rule": "ddpm",  # ddpm (Eq. 5), paper (Eq. 7 as printed), ddim, ddim:r
            "steps": 1,  # reverse steps a site
            "rank": 0,  # of each denoiser's matrix, beside a multiple of the identity; 0: full matrices
            "time_scale": 1.0,  # t = time_scale · steps · (N − i + 1): above 1, more noise is assumed than in the paper
            "moment_images": 0,  # images whose moments give the optimum; 0 for all
            "moment_gib": 0.0,  # memory for moments on a device; sites beyond it take another pass over the images. 0: one pass
            "moment_tokens": 1.0,  # share of each image's feature vectors they are taken of; 0.25: 1.4 forwards, not 2.2
            "loss": "l2",  # l2, l1 or l1+l2
            "tokens": 1.0,  # share of each image's feature vectors to learn from
            "train_steps": 1000,  # of Algorithm 1
            "batch_size": 64,  # images a step, on all devices together
            "optimizer": "adam",  # adam, adamw or sgd
            "learning_rate": 4e-4,  # its peak; it falls to 0 along a cosine
            "warmup": 0,  # steps in which it rises first
            "weight_decay": 0.0,  # of adamw and sgd
            "clip": 0.0,  # largest norm of the gradient; 0 for any
            "ema": 0.0,  # decay of a moving average of the denoisers, which is then what was learned; 0 for none
            "label_lambda": 0.01,  # λ of Eq. 12, the weight of Algorithm 1's loss where labels take part
        }
    )
    config.alternate = ConfigDict(  # learner alternating: settings of `denoise` and, for the backbone, of `control`
        {
            "steps": 0,  # in all
            "period": 100,  # steps of each before the other's turn; the paper's is 10 epochs
            "order": ("denoise", "backbone"),  # whose turn is first
        }
    )
    config.measured = ConfigDict(  # learner measured
        {
            "images": 1500,  # 0 for all training images
            "draws": 1,  # corrupted versions of each image
            "clean_share": (0.75,),  # weight of the clean images; of several, the best on held-out images is taken
            "ridge": 1e-3,  # pull towards the identity, in units of a site's mean feature power
            "vectors": 400,  # feature vectors a site uses, in multiples of its width
            "chunk": 64,  # images whose patches are held at once, at most; fewer take less memory (docs/own_model.md)
            "shortcut": True,  # whether layers answer for the noise of the shortcut that they are added to
        }
    )
    config.wiener = ConfigDict({"ratios": (0.001, 0.003, 0.01, 0.03, 0.1)})  # noise over mean feature power
    config.select = ConfigDict(  # how wiener and measured choose on held-out images
        {
            "strengths": (0.0, 0.25, 0.5, 0.75, 1.0),  # of fusion, to choose from
            "conditions": (),  # () for those of the evaluation
            "images": 1000,  # 0 for all held-out images
            "labels": True,  # False: by agreement with the backbone's clean answers even where there are labels
            "max_clean_loss": 1.0,  # points on clean images
        }
    )
    config.sweep = ConfigDict(  # grid of `fuse.py --sweep`; how it chooses is in `select`
        {
            # reverse steps, and Wiener filters of this noise over mean feature power
            "rules": ("ddpm", "ddim:0", "wiener:0.001", "wiener:0.003", "wiener:0.01", "wiener:0.03", "wiener:0.1"),
            "steps": (1, 2, 5, 10),  # single jumps (ddim:r, wiener:r) have 1 only
            "scales": (1.0, 3.0, 10.0, 30.0, 100.0),  # of the time steps; what does not fit in the schedule is left out
            "strengths": (0.0, 0.25, 0.5, 0.75, 1.0, 1.5),  # of fusion
        }
    )
    config.evaluate = ConfigDict(  # what the arms are compared on
        {
            "conditions": ("clean", "gaussian:40", "gaussian:80"),  # of the test images (docs/corruptions.md)
            "batch_size": 200,  # images at once, on all devices together
            "gallery": 2000,  # training images of each merged source that its test images are compared with
            "resamples": 10_000,  # of the bootstrap
            "certificate_images": 16,  # that fused and explicit network are compared on
            "latency_batch": 64,  # images at once when the latency is measured
        }
    )
    config.wandb = ConfigDict(  # Weights & Biases: pip install -r requirements-wandb.txt
        {
            "project": "",  # "" for none
            "entity": "",  # user or team; "" for your default
            "name": "",  # "" takes the work directory's
            "group": "",  # of runs
            "tags": (),  # for finding it again
            "mode": "online",  # online, or offline (WORKDIR/wandb, for `wandb sync`)
        }
    )
    return config
