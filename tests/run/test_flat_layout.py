"""A run of the last revision with flat modules (806e2bd): the code in packages goes on with it, fuses it and reads its files.

`fixtures/flat_layout.tar.gz` holds a tiny job on eight devices: backbone, control arm, Algorithm 1 with a moving average,
measured noise and alternating fine-tuning; its configuration has the settings' old names.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

from drep_jax import fuse_exact, weights
from drep_jax.jobs import fuse, train
from drep_jax.run import workdir
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.training.logging import lines_of
from tests.archives import unpack
from tests.command import call

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "flat_layout.tar.gz"


@pytest.fixture
def run(tmp_path):
    """A copy of the work directory."""
    unpack(FIXTURE, tmp_path)
    return tmp_path / "run"


def test_it_fuses_to_the_same_bits_and_its_fused_file_loads(run):
    old_names = json.loads((run / "config.json").read_text())["retrieval"]
    assert "lonely" in old_names and "centre_weight" in old_names, "the fixture is of before the renaming"
    ended = call("fuse.py", f"--workdir={run}", f"--out={run / 'again'}")
    assert ended.status == 0 and "Certificate: PASSED" in ended.output, ended
    old, new = (safetensors.numpy.load_file(run / place / "fused.safetensors") for place in ("fused", "again"))
    assert old.keys() == new.keys()
    assert all(old[name].tobytes() == new[name].tobytes() for name in old)
    loaded, variables, denoise = fuse.load_run(str(run))
    fused = weights.load(str(run / "fused" / "fused.safetensors"), loaded.setup.abstract, allow_fused=True)
    kernel = [tree["params"]["encoderblock_0"]["mlp"]["fc1"]["kernel"] for tree in (variables, fused)]
    assert np.abs(kernel[0] - kernel[1]).max() > 0 and denoise
    resolved = call("fuse.py", f"--workdir={run}", "--resolve", "--rule=paper", f"--out={run / 'resolved'}")
    assert resolved.status == 0 and "Certificate: PASSED" in resolved.output, resolved


def test_it_resumes_and_ends_with_the_same_weights(run, monkeypatch):
    """Two stages lose their last checkpoint; the run goes on from the one before, with the same data, noise and steps."""
    shutil.rmtree(run / "checkpoints" / "algorithm1" / "12")
    shutil.rmtree(run / "checkpoints" / "alternating")
    config = workdir.read_config(str(run))
    report = json.loads((run / "report.json").read_text())
    before = {stage: lines_of(str(run), stage) for stage in ("algorithm1", "alternating", "control")}
    learned = {}
    monkeypatch.setattr(train, "finish", lambda job, baseline, continued, results, data: learned.update(results))
    train.run(config, str(run))
    assert list(learned) == ["measured", "alternating", "algorithm1"]
    for stage, lines in before.items():
        now = lines_of(str(run), stage)
        assert [line["step"] for line in now] == [line["step"] for line in lines]
        np.testing.assert_allclose([line["loss"] for line in now], [line["loss"] for line in lines], rtol=1e-4)
    loaded = Run(config, build(config), str(run))
    params = {"backbone": fuse.load_run(str(run))[1]["params"], "denoise": learned["algorithm1"].denoisers}
    fused = fuse_exact(params, loaded.setup.sites, loaded.setup.schedule)
    there = weights.load(str(run / "fused" / "fused.safetensors"), loaded.setup.abstract, allow_fused=True)["params"]
    for name in ("fc1", "fc2"):
        ours, old = (tree["encoderblock_0"]["mlp"][name]["kernel"] for tree in (fused, there))
        np.testing.assert_allclose(ours, old, atol=1e-5)
    chosen = learned["measured"].choice
    front = report["learning"]["measured"]["chosen"]
    assert chosen.points[chosen.chosen].label == front["label"] and chosen.criterion == front["criterion"]
