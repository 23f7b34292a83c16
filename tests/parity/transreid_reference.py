"""The authors' TransReID and TransReID-SSL in PyTorch, from checkouts that two environment variables point to.

    git clone https://github.com/damo-cv/TransReID && export TRANSREID_REFERENCE=$PWD/TransReID
    git clone https://github.com/damo-cv/TransReID-SSL && export TRANSREID_SSL_REFERENCE=$PWD/TransReID-SSL

Their losses, their other networks and a module that PyTorch no longer has are replaced by nothing. Run as a program, it prints
the golden numbers of tests/models/test_transreid.py.
"""

import collections.abc
import functools
import importlib
import os
import pathlib
import sys
import types

import numpy as np
import torch

from tests.named_weights import named_weights

VARIABLES = {"transreid": "TRANSREID_REFERENCE", "transreid_ssl": "TRANSREID_SSL_REFERENCE"}
_FOLDERS = {"transreid": ("model",), "transreid_ssl": ("transreid_pytorch", "model")}
_MODEL = {
    "PRETRAIN_CHOICE": "",
    "PRETRAIN_PATH": "",
    "LAST_STRIDE": 1,
    "NAME": "transformer",
    "COS_LAYER": False,
    "NECK": "bnneck",
    "ID_LOSS_TYPE": "softmax",
    "DROP_PATH": 0.0,
    "DROP_OUT": 0.0,
    "ATT_DROP_RATE": 0.0,
    "STRIDE_SIZE": [16, 16],
    "JPM": False,
    "SHIFT_NUM": 5,
    "SHUFFLE_GROUP": 2,
    "DEVIDE_LENGTH": 4,
    "RE_ARRANGE": True,
    "SIE_COE": 3.0,
    "SIE_CAMERA": False,
    "SIE_VIEW": False,
    "REDUCE_FEAT_DIM": False,
    "FEAT_DIM": 512,
    "DROPOUT_RATE": 0.0,
    "GEM_POOLING": False,
    "STEM_CONV": False,
}


class _Nothing(types.ModuleType):
    """A module in which every name is there and is nothing."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)


def load_reference(which):
    """The module make_model of a checkout."""
    folder = pathlib.Path(os.environ[VARIABLES[which]], *_FOLDERS[which])
    if not (folder / "make_model.py").is_file():
        raise FileNotFoundError(f"{folder / 'make_model.py'} is not there; {VARIABLES[which]} must be a checkout.")
    name = f"{which}_reference"
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    six = types.ModuleType("torch._six")
    six.container_abcs = collections.abc
    stubs = {
        "torch._six": six,
        "loss": _Nothing("loss"),
        "loss.metric_learning": _Nothing("loss.metric_learning"),
        f"{name}.backbones.swin_transformer": _Nothing("swin_transformer"),
        f"{name}.backbones.resnet_ibn_a": _Nothing("resnet_ibn_a"),
    }
    before = {key: sys.modules.get(key) for key in stubs}
    sys.modules.update({**stubs, name: package})
    try:
        return importlib.import_module(f"{name}.make_model")
    finally:
        for key, module in before.items():
            if module is None:
                del sys.modules[key]
            else:
                sys.modules[key] = module


def config(size, kind="vit_base_patch16_224_TransReID", feature="before", **model):
    """The authors' configuration, with these entries of MODEL changed."""
    return types.SimpleNamespace(
        MODEL=types.SimpleNamespace(**{**_MODEL, "TRANSFORMER_TYPE": kind, **model}),
        INPUT=types.SimpleNamespace(SIZE_TRAIN=list(size)),
        TEST=types.SimpleNamespace(NECK_FEAT=feature),
    )


def make_reference(which, cfg, classes, cameras=0, views=0):
    """A published network."""
    return load_reference(which).make_model(cfg, classes, cameras, views)


def make_tiny(cfg, classes, cameras, views, *, patch, width, depth, heads, ratio):
    """The same code, narrow: the public networks have their widths written into them, but not TransReID-SSL's classes."""
    module = load_reference("transreid_ssl")
    backbone = importlib.import_module("transreid_ssl_reference.backbones.vit_pytorch")

    def narrow(stride_size, **options):
        net = backbone.TransReID(
            patch_size=patch,
            stride_size=stride_size,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=ratio,
            qkv_bias=True,
            **options,
        )
        net.in_planes = width
        return net

    make = module.build_transformer
    if cfg.MODEL.JPM:
        make = functools.partial(module.build_transformer_local, rearrange=cfg.MODEL.RE_ARRANGE)
    return make(classes, cameras, views, cfg, {cfg.MODEL.TRANSFORMER_TYPE: narrow})


def draw(net):
    """Draws all weights and running statistics at random but the shifts that are held at 0."""
    shapes = {name: tuple(t.shape) for name, t in net.state_dict().items() if t.is_floating_point()}
    drawn = named_weights(shapes, spread="fan_in")
    drawn |= {n: np.zeros_like(a) for n, a in drawn.items() if n.startswith("bottleneck") and n.endswith(".bias")}
    net.load_state_dict({name: torch.from_numpy(array) for name, array in drawn.items()}, strict=False)
    return drawn


def run(net, images, index=None, views=0, train=False):
    """The feature in evaluation, or (features, logits) in training, of NHWC pictures; index as in our fourth channel."""
    labels = {}
    if index is not None:
        index = torch.from_numpy(np.asarray(index))
        labels = {"cam_label": index // views, "view_label": index % views} if views else {"cam_label": index}
    net.train(train)
    with torch.no_grad():
        out = net(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), **labels)
    if not train:
        return out.numpy()
    logits, features = (tuple(o) if isinstance(o, list) else (o,) for o in out)
    return tuple(f.numpy() for f in features), tuple(s.numpy() for s in logits)


def main():
    from tests.models.test_transreid import GOLDEN_CASES, golden_images

    for name, (theirs, cameras, views, sizes, _) in GOLDEN_CASES.items():
        cfg = config(kind="tiny", **theirs)
        net = make_tiny(cfg, 3, cameras, views, **sizes)
        draw(net)
        x = golden_images(name)
        index = x[:, 0, 0, 3].astype(int) if x.shape[-1] == 4 else None
        feature = run(net, x[..., :3], index, views)
        _, logits = run(net, x[..., :3], index, views, train=True)
        for kind, array in (("feature", feature), ("logits", np.stack(logits))):
            print(
                name, kind, np.array2string(array, separator=", ", precision=5, suppress_small=True, max_line_width=110)
            )


if __name__ == "__main__":
    main()
