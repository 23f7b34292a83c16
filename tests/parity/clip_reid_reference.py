"""CLIP-ReID's authors' code in PyTorch, on the CPU, from a checkout that the variable CLIP_REID_REFERENCE points to.

    git clone https://github.com/Syliz517/CLIP-ReID && export CLIP_REID_REFERENCE=$PWD/CLIP-ReID

Its tokenizer and its download of CLIP are replaced: CLIP's weights are drawn at random, with a small text encoder.
"""

import importlib
import pathlib
import re
import sys
import types
from unittest import mock

import numpy as np
import torch

from tests.named_weights import named_weights

PACKAGE = "clip_reid_reference"
TEXT = {"context_length": 7, "vocab_size": 9, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 1}


def load_reference(checkout):
    """The modules model/make_model_clipreid.py and model/clip/model.py of the checkout."""
    folder = pathlib.Path(checkout, "model")
    if not (folder / "make_model_clipreid.py").is_file():
        raise FileNotFoundError(
            f"{folder}/make_model_clipreid.py is not there; CLIP_REID_REFERENCE must be a checkout of CLIP-ReID."
        )
    package, clip = types.ModuleType(PACKAGE), types.ModuleType(f"{PACKAGE}.clip")
    package.__path__, clip.__path__ = [str(folder)], [str(folder / "clip")]
    tokenizer = types.ModuleType(f"{PACKAGE}.clip.simple_tokenizer")
    tokenizer.SimpleTokenizer = clip.clip = lambda: None
    layers = types.ModuleType("timm.models.layers")
    layers.DropPath = layers.to_2tuple = None
    layers.trunc_normal_ = torch.nn.init.trunc_normal_
    empty = {name: types.ModuleType(name) for name in ("timm", "timm.models")}
    stubs = {module.__name__: module for module in (package, clip, tokenizer, layers, *empty.values())}
    with mock.patch.dict(sys.modules, stubs):
        return tuple(importlib.import_module(f"{PACKAGE}.{name}") for name in ("make_model_clipreid", "clip.model"))


class _Prompts(torch.nn.Module):
    """Stands for the prompts, whose tensors are in the published files."""

    def __init__(self, classes, *args):
        super().__init__()
        self.cls_ctx = torch.nn.Parameter(torch.zeros(classes, 4, 8))
        self.register_buffer("token_prefix", torch.zeros(1, 5, 8))


def draw(net):
    """Draws all of a network's numbers at random; the shifts of the necks stay at zero."""
    shapes = {n: tuple(t.shape) for n, t in net.state_dict().items() if t.is_floating_point()}
    drawn = named_weights(shapes, spread="fan_in")
    for name in drawn:
        if re.search(r"(ln_\w+|bottleneck\w*)\.weight$", name):
            drawn[name] += 1
        elif re.fullmatch(r"bottleneck\w*\.bias", name):
            drawn[name][:] = 0
    net.load_state_dict({n: torch.from_numpy(np.asarray(a)) for n, a in drawn.items()}, strict=False)


def make_clip(clip):
    """OpenAI's CLIP with ViT-B/16 for 224 pixels, at random."""
    net = clip.CLIP(512, 224, 12, 768, 16, 16, **TEXT, h_resolution=14, w_resolution=14).eval()
    draw(net)
    return net


def resized(clip, state, grid, stride):
    """CLIP with its positions resized, as the authors build it."""
    with mock.patch("builtins.print"):
        return clip.build_model(dict(state), *grid, stride)


def make_reference(reference, size, stride, classes, cameras, views, weight):
    """The network that the authors train on identities, at random."""
    made, clip = reference
    node = types.SimpleNamespace
    cfg = node(
        MODEL=node(
            NAME="ViT-B-16",
            COS_LAYER=False,
            NECK="bnneck",
            SIE_COE=weight,
            STRIDE_SIZE=[stride, stride],
            SIE_CAMERA=cameras > 0,
            SIE_VIEW=views > 0,
        ),
        TEST=node(NECK_FEAT="before"),
        INPUT=node(SIZE_TRAIN=size),
        DATASETS=node(NAMES="market1501"),
    )

    def load(name, height, width, stride):
        return resized(clip, make_clip(clip).state_dict(), (height, width), stride)

    with (
        mock.patch.object(made, "load_clip_to_cpu", load),
        mock.patch.object(made, "PromptLearner", _Prompts),
        mock.patch.object(torch.nn.Module, "to", lambda self, *args: self),  # it goes to the GPU
        mock.patch("builtins.print"),
    ):
        net = made.make_model(cfg, classes, cameras, views).eval()
    draw(net)
    return net


def run(net, images, camera=None, view=None):
    """What the network returns for NHWC images, as arrays: the feature, or in training (features, logits)."""
    labels = {
        name: None if label is None else torch.from_numpy(np.asarray(label))
        for name, label in (("cam_label", camera), ("view_label", view))
    }
    with torch.no_grad():
        found = net(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), **labels)
    if isinstance(found, torch.Tensor):
        return found.numpy()
    scores, features, _ = found
    return [f.numpy() for f in features], [s.numpy() for s in scores]
