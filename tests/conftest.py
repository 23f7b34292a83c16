"""Strict JAX, eight simulated devices, a cache of compiled programs, and one finished run that many tests look at."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the tests' time: so nothing is optimised, and runs of one job in this process and in others share
# their programs.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).resolve().parents[1] / ".pytest_cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401  the hook finds its checker by this name

# Before anything imports it: the shapes that the annotations of the core state are checked at every call.
install_import_hook("drep_jax.core", "tests.shapes.checked")
jax.config.update("jax_numpy_rank_promotion", "raise")
# The same examples in every run; `--hypothesis-profile=default` looks for others.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The tiny job, done once: its configuration, work directory, report and backbone as a file. Do not write there."""
    from drep_jax import weights
    from drep_jax.jobs import fuse, train
    from tests.command import Finished
    from tests.tiny_config import get_config

    config = get_config().to_dict()
    directory = str(tmp_path_factory.mktemp("finished") / "run")
    report = train.run(config, directory)
    run, variables, denoise = fuse.load_run(directory)
    backbone = os.path.join(os.path.dirname(directory), "backbone.safetensors")
    weights.save_safetensors(backbone, variables)
    return Finished(config, directory, report, run.setup, variables, denoise, backbone)
