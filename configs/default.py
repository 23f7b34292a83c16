"""Every setting with its default; a configuration file changes what is different about it."""

from ml_collections import ConfigDict


def get_default() -> ConfigDict:
    """Returns the settings that all configurations share."""
    config = ConfigDict()
    config.name = "default"
    config.seed = 0
    config.log_every = 50
    config.checkpoint_every = 500
    config.progress = True
    config.dry_run = False  # two steps of the full-size job on random images
    config.dry_run_batch = 8  # images a device in a dry run
    config.latency_rounds = 30
    config.profile = ""  # FIRST:COUNT traces these steps of every stage for TensorBoard, in WORKDIR/profile

    # Without labels: algorithm1, closed_form, wiener, measured. With: label_augmented, alternating, continued.
    config.learner = "algorithm1"  # its weights are exported
    config.compare = ()  # further learners, evaluated beside it; also final_only, which cannot be fused
    config.noise = "gaussian:0..40"  # for learner measured: a corruption, several with commas, or pairs:DIR

    config.data = ConfigDict(
        {
            "source": "digits",  # digits, folder:DIR, tfds:NAME, random:COUNT
            "data_dir": "",  # where TFDS keeps its data sets; "" means TFDS_DATA_DIR or ~/tensorflow_datasets
            "image_size": (224, 224),
            "resize": "crop",  # crop, squash or exact
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "flip": False,  # augmentation of training images
            "shift": 0,  # pixels
        }
    )
    config.model = ConfigDict({"name": "vit", "num_classes": 0}, type_safe=False)  # 0: of the images; -1: features

    computing = {
        "accumulate": 1,  # parts that a device's share of a batch is cut into, for the memory of one
        "compute": "float32",  # or bfloat16; parameters and optimiser stay float32
        "remat": False,  # recompute blocks in the backward pass: less memory, more time
    }
    stage = {
        **computing,
        "steps": 0,
        "batch_size": 64,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "warmup": 0,
        "weight_decay": 0.0,
        "clip": 0.0,
        "label_smoothing": 0.0,
    }
    init = {
        "init_from": "",  # file of trained weights, ours or foreign (docs/weights.md); or train from scratch with steps > 0
        "init_format": "",  # of a foreign file; "" recognises it by its names
        "init_state": "",  # which state in it, such as "model_ema"; "" takes the only one, or the averaged one
        "init_grid": (),  # (height, width) in patches of its position embeddings, where these are to be resized
        "init_allow": (),  # regular expressions over names that may be missing, left over or of another shape
    }
    config.backbone = ConfigDict({**init, **stage})
    config.control = ConfigDict(stage)  # the backbone trained on, for the budget of the denoisers; steps 0: no such arm

    config.schedule = ConfigDict({"timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.002})
    config.sites = ConfigDict(
        {
            "pattern": "",  # regular expression over layer paths; "" means the linears of each MLP, or every layer
            "kind": "auto",  # for convolutions: patch, pointwise or auto
        }
    )
    config.denoise = ConfigDict(
        {
            **computing,
            "rule": "ddpm",  # ddpm (Eq. 5), paper (Eq. 7 as printed), ddim, ddim:r
            "steps": 1,  # reverse steps a site
            "rank": 0,  # of each denoiser's matrix, beside a multiple of the identity; 0: full matrices
            "time_scale": 1.0,  # t = time_scale · steps · (N − i + 1): above 1, more noise is assumed than in the paper
            "moment_images": 0,  # images whose moments give the optimum; 0 for all
            "moment_tokens": 1.0,  # share of each image's feature vectors they are taken of; 0.25: 1.4 forwards, not 2.2
            "loss": "l2",  # l2, l1 or l1+l2
            "tokens": 1.0,  # share of each image's feature vectors to learn from
            "train_steps": 1000,
            "batch_size": 64,
            "optimizer": "adam",
            "learning_rate": 4e-4,
            "warmup": 0,
            "weight_decay": 0.0,
            "clip": 0.0,
            "ema": 0.0,  # decay of a moving average of the denoisers, which is then what was learned; 0 for none
            "label_lambda": 0.01,  # λ of Eq. 12, the weight of Algorithm 1's loss where labels take part
        }
    )
    config.alternate = ConfigDict(  # learner alternating: settings of `denoise` and, for the backbone, of `control`
        {
            "steps": 0,  # in all
            "period": 100,  # steps of each before the other's turn; the paper's is 10 epochs
            "order": ("denoise", "backbone"),
        }
    )
    config.measured = ConfigDict(
        {
            "images": 1500,  # 0 for all training images
            "draws": 1,  # corrupted versions of each image
            "clean_share": (0.75,),  # weight of the clean images; of several, the best on held-out images is taken
            "ridge": 1e-3,  # pull towards the identity, in units of a site's mean feature power
            "vectors": 400,  # feature vectors a site uses, in multiples of its width
            "shortcut": True,  # whether layers answer for the noise of the shortcut that they are added to
        }
    )
    config.wiener = ConfigDict({"ratios": (0.001, 0.003, 0.01, 0.03, 0.1)})  # noise over mean feature power
    config.select = ConfigDict(  # how wiener and measured choose on held-out images
        {
            "strengths": (0.0, 0.25, 0.5, 0.75, 1.0),
            "conditions": (),  # () for those of the evaluation
            "images": 1000,  # 0 for all held-out images
            "labels": True,  # False: by agreement with the backbone's clean answers even where there are labels
            "max_clean_loss": 1.0,  # points on clean images
        }
    )
    config.sweep = ConfigDict(  # grid of `fuse.py --sweep`; how it chooses is in `select`
        {
            "rules": ("ddpm", "ddim:0", "wiener:0.001", "wiener:0.003", "wiener:0.01", "wiener:0.03", "wiener:0.1"),
            "steps": (1, 2, 5, 10),  # single jumps (ddim:r, wiener:r) have 1 only
            "scales": (1.0, 3.0, 10.0, 30.0, 100.0),  # of the time steps; what does not fit in the schedule is left out
            "strengths": (0.0, 0.25, 0.5, 0.75, 1.0, 1.5),
        }
    )
    config.evaluate = ConfigDict(
        {
            "conditions": ("clean", "gaussian:40", "gaussian:80"),
            "batch_size": 200,
            "resamples": 10_000,
            "certificate_images": 16,
            "latency_batch": 64,
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
