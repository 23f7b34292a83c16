"""The authors' VMamba in PyTorch, on the CPU, from a checkout that the environment variable VMAMBA_REFERENCE points to.

    git clone https://github.com/MzeroMiko/VMamba && export VMAMBA_REFERENCE=$PWD/VMamba

Its GPU kernels and tools for counting FLOPs are replaced by nothing: what is left is its plain PyTorch path. Run as a program,
it prints the golden numbers of tests/models/test_vmamba.py.
"""

import contextlib
import importlib
import os
import pathlib
import sys
import types
import warnings
from unittest import mock

import numpy as np
import torch

from tests.named_weights import named_weights

PACKAGE = "vmamba_reference_models"


class _Anything(types.ModuleType):
    """A module in which every name is a function that returns what it decorates."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda f=None, *args, **kwargs: f


class _NoDropPath(torch.nn.Module):
    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x


def load_reference(checkout):
    """The module classification/models/vmamba.py of the checkout."""
    folder = pathlib.Path(checkout, "classification", "models")
    if not (folder / "vmamba.py").is_file():
        raise FileNotFoundError(f"{folder / 'vmamba.py'} is not there; VMAMBA_REFERENCE must be a checkout of VMamba.")
    layers = _Anything("timm.models.layers")
    layers.DropPath, layers.trunc_normal_ = _NoDropPath, torch.nn.init.trunc_normal_
    triton, language = _Anything("triton"), _Anything("triton.language")
    triton.language = language
    stubs = {
        "timm": _Anything("timm"),
        "timm.models": _Anything("timm.models"),
        "timm.models.layers": layers,
        "triton": triton,
        "triton.language": language,
        "fvcore": _Anything("fvcore"),
        "fvcore.nn": _Anything("fvcore.nn"),
        f"{PACKAGE}.mamba2": _Anything("mamba2"),
        f"{PACKAGE}.mamba2.ssd_minimal": _Anything("ssd_minimal"),
    }
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update({**stubs, PACKAGE: package})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that its GPU kernels are missing
            return importlib.import_module(f"{PACKAGE}.vmamba")
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def make_reference(module, depths, width, ssm_ratio, num_classes, d_state=1):
    """The published form (`vmamba_tiny_s1l8` and its like), as a network in evaluation mode."""
    net = module.VSSM(
        depths=list(depths),
        dims=width,
        num_classes=num_classes,
        ssm_d_state=d_state,
        ssm_ratio=ssm_ratio,
        ssm_conv_bias=False,
        forward_type="v05_noz",
        norm_layer="ln2d",
        downsample_version="v3",
        patchembed_version="v2",
        drop_path_rate=0.0,
    )
    return net.eval()


def run_reference(net, tensors, images):
    """(features, logits) of NHWC images under the given weights."""
    net.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in tensors.items()})
    features = []
    hook = net.classifier.flatten.register_forward_hook(lambda module, inputs, output: features.append(output))
    nowhere = mock.patch.object(
        torch.cuda, "device", lambda device: contextlib.nullcontext()
    )  # it enters the GPU it is on
    with torch.no_grad(), nowhere:
        logits = net(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
    hook.remove()
    return features[0].numpy(), logits.numpy()


def shapes_of(net):
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def main():
    from tests.models.test_vmamba import GOLDEN_CONFIG, golden_images

    net = make_reference(load_reference(os.environ["VMAMBA_REFERENCE"]), **GOLDEN_CONFIG)
    features, logits = run_reference(net, named_weights(shapes_of(net)), golden_images())
    for name, array in (("FEATURES", features), ("LOGITS", logits)):
        print(name, np.array2string(array, separator=", ", precision=7, max_line_width=110))


if __name__ == "__main__":
    main()
