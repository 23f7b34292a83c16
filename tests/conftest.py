"""Strict JAX, eight simulated devices, programs that compile quickly, and one finished run that many tests look at."""

import ctypes
import fcntl
import gc
import itertools
import os
import pathlib
import pickle
import shutil

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the tests' time. So programs are not optimized, XLA's fusion emitters (which go through MLIR and
# cost twice the time of the plain ones) stay off.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)
# Nor are they kept on disk: writing and reading one takes as long as compiling it so. Whoever runs one file again and again
# gains a quarter by 1 here and JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).resolve().parents[1] / ".pytest_cache" / "xla")
)
os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "0")  # which nobody reads

import hypothesis
import jax
import pytest
from jax._src.interpreters import mlir

from tests import medium, shapes
from tests.medium import pytest_addoption, pytest_configure  # noqa: F401, hooks of pytest

shapes.install()
jax.config.update("jax_numpy_rank_promotion", "raise")
# The same examples in every run; `--hypothesis-profile=default` looks for others.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")


def shared_contexts(make, programs=50):
    """Returns what gives the same context of MLIR for so many programs; making one takes a fifth of a small program's time.

    Not for ever, because a context keeps every type, attribute and place of a source that it has seen.
    """
    numbers, last = itertools.count(), []

    def shared():
        if next(numbers) % programs == 0 or not last:
            last[:] = [make()]
        return last[0]

    return shared


if hasattr(mlir, "make_ir_context"):  # of JAX's own, which another version may not have
    mlir.make_ir_context = shared_contexts(mlir.make_ir_context)


LONG_FIRST = ("tasks", "learners", "jobs", "core", "models", "evaluation", "run")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Files of long tests go first, so that the processes of pytest-xdist end together."""
    rank = {name: number for number, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.parent.name, len(rank)))
    medium.mark(items)


def pytest_collection_finish():
    """What was imported stays: the garbage collector need not walk through it again and again, nor so often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def resident() -> float:
    """Returns the memory of this process in GiB; 0 where the system does not say."""
    try:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:
        return 0.0


def memory_share() -> float:
    """Returns half of this process's share of the machine's memory in GiB, 1.5 at least; 2.5 where it is unknown."""
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (OSError, ValueError):
        return 2.5
    return max(1.5, machine / 2 / int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """After a file that leaves the process large, forgets its compiled programs: each takes more than a megabyte.

    That takes seconds, and what follows is compiled again, so it is done late.
    """
    yield
    if resident() > memory_share():
        jax.clear_caches()
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps what was freed
            libc.malloc_trim(0)


@pytest.fixture(scope="module", autouse=True)
def checked_core(request):
    """Shapes and types are checked where the core is tested (see tests/shapes.py)."""
    with shapes.checking(request.path.is_relative_to(pathlib.Path(__file__).parent / "core")):
        yield


@pytest.fixture(scope="module", autouse=True)
def lean_jobs(request):
    """Jobs draw no plots and time no networks, which takes six seconds of a processor each.

    `finished` does both, and so does what tests/report draws.
    """
    if request.path.parent.name == "report":
        yield
        return
    from drep_jax import report
    from drep_jax.jobs import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "PLOTS", {})
        patch.setattr(train, "measure_cost", lambda *arguments: None)
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The tiny job, done once: its configuration, work directory, report and backbone as a file. Do not write there.

    The first process of the tests to want it makes it, the others copy what was made.
    """
    from drep_jax import weights
    from drep_jax.jobs import fuse, train
    from tests.command import Finished, whole_reports
    from tests.tiny_config import get_config

    config = get_config().to_dict()
    place = tmp_path_factory.mktemp("finished")
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    common = place if alone else tmp_path_factory.getbasetemp().parent
    made, report_file = common / "finished_run", common / "finished_report"
    with open(common / "finished_lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not report_file.exists():
            with whole_reports(), shapes.checking():
                report_file.write_bytes(pickle.dumps(train.run(config, str(made))))
    directory = str(made if alone else shutil.copytree(made, place / "run", symlinks=True))
    report = pickle.loads(report_file.read_bytes())
    run, variables, denoise = fuse.load_run(directory)
    backbone = str(place / "backbone.safetensors")
    weights.save_safetensors(backbone, variables)
    return Finished(config, directory, report, run.setup, variables, denoise, backbone)
