"""Whole runs that are killed, stopped, moved to other devices or out of disk, and go on: the same bits come out."""

import concurrent.futures
import json
import os
import random
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest

from drep_jax import report
from drep_jax.training.logging import CLOCK, read_metrics
from tests.command import TINY, largest_difference, same_bits, start

LEARNERS = "--config.compare=('closed_form','measured')"
STAGES = ("backbone", "control", "algorithm1", "closed_form", "measured")
KILLS = 7  # of each of three runs

AT_EVENT = """
import os, sys, threading
count, lock = [0], threading.Lock()
def heard(event, args):
    changes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if changes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
        if isinstance(args[0], (str, os.PathLike)) and {directory!r} in os.fspath(args[0]):
            with lock:
                count[0] += 1
                if count[0] == {number}:
                    os.kill(os.getpid(), 9)
sys.addaudithook(heard)
"""
AFTER = """
import os, threading
timer = threading.Timer({seconds}, os.kill, (os.getpid(), 9))
timer.daemon = True
timer.start()
"""
IN_STAGE = """
import os
from drep_jax.training.logging import MetricWriter
write = MetricWriter.write
def fatal(self, stage, step, values):
    write(self, stage, step, values)
    if (stage, step) == ({stage!r}, {step}):
        {act}
MetricWriter.write = fatal
"""


def train(directory, *arguments, before="", devices=2):
    return start("train.py", TINY, LEARNERS, f"--workdir={directory}", *arguments, before=before, devices=devices)


def result(directory):
    """Everything that a run has computed, as bytes and numbers, without the clock."""
    found = {}
    for name in ("moments.npz",):
        with np.load(os.path.join(directory, name)) as held:
            found |= {f"moments {key}": held[key].tobytes() for key in held}
    for name in ("fused.safetensors", "orbax/drep_jax.json"):
        with open(os.path.join(directory, "fused", name), "rb") as file:
            found[name] = file.read()
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as reader:
        for stage in STAGES:
            folder = os.path.join(directory, "checkpoints", stage)
            newest = max(int(name) for name in os.listdir(folder) if name.isdigit())
            found[stage] = (newest, reader.restore(os.path.join(folder, str(newest), "state")))
    lines = read_metrics(os.path.join(directory, "metrics.jsonl"))
    found["lines"] = [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]
    with open(os.path.join(directory, "report.json"), encoding="utf-8") as file:
        content = json.load(file)
    report.validate(content)
    found |= {name: content[name] for name in ("metrics", "sites", "spectra", "coverage")}
    found["certificate"] = content["certificate"]["passed"]
    return found


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name in STAGES:
            assert value[0] == two[name][0] and same_bits(value[1], two[name][1]), name
        else:
            assert value == two[name], name


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The result of a run that nothing happened to, and the seconds it took."""
    directory = str(tmp_path_factory.mktemp("straight") / "run")
    began = time.monotonic()
    ended = train(directory)
    assert ended.status == 0, ended
    return result(directory), time.monotonic() - began


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_run_that_is_killed_again_and_again_gives_the_same_bits(seed, straight, tmp_path):
    """kill -9 at random times, and at random changes of a file or folder: that is inside of checkpoints and exports."""
    wanted, seconds = straight
    draw, directory, kills = random.Random(seed), str(tmp_path / "run"), []
    while len(kills) < KILLS:
        if len(kills) % 2:
            before = AT_EVENT.format(directory=directory, number=draw.randint(1, 160))
        else:
            before = AFTER.format(seconds=draw.uniform(0.2, 1.0) * seconds)
        ended = train(directory, before=before)
        assert ended.status in (-9, 0), ended
        if ended.status == 0:  # it was quicker: once more, from the beginning
            assert_same(wanted, result(directory))
            shutil.rmtree(directory)
        else:
            kills.append(sorted(os.listdir(directory)) if os.path.isdir(directory) else [])
    ended = train(directory)
    assert ended.status == 0, ended
    assert_same(wanted, result(directory))
    left = [name for _, folders, files in os.walk(directory) for name in (*folders, *files)]
    assert not [name for name in left if "orbax-checkpoint-tmp" in name], left


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "place", ["checkpoints/backbone/30.orbax", "checkpoints/measured", "fused", "fused/orbax.tmp", "report"]
)
def test_killed_inside_of_a_write(place, straight, tmp_path):
    """At the third change below a certain place."""
    directory = str(tmp_path / "run")
    ended = train(directory, before=AT_EVENT.format(directory=os.path.join(directory, place), number=3))
    assert ended.status == -9, ended
    ended = train(directory)
    assert ended.status == 0, ended
    assert_same(straight[0], result(directory))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_sigterm_saves_and_a_second_signal_ends_at_once(straight, tmp_path):
    directory = str(tmp_path / "run")
    twice = "os.kill(os.getpid(), 15); os.kill(os.getpid(), 15)"
    assert train(directory, before=IN_STAGE.format(stage="backbone", step=28, act=twice)).status == -15
    once = IN_STAGE.format(stage="algorithm1", step=14, act="os.kill(os.getpid(), 15)")
    ended = train(directory, before=once)
    assert ended.status == 75, ended
    assert "Stopped by SIGTERM in stage algorithm1 after step 14 of 30; the state is saved" in ended.messages
    assert "To go on: python" in ended.messages and "Traceback" not in ended.messages
    assert "14" in os.listdir(os.path.join(directory, "checkpoints", "algorithm1"))
    measuring = (
        "import os\nfrom drep_jax import learners\nlearners.LEARNERS['measured'] = lambda _: os.kill(os.getpid(), 15)"
    )
    ended = train(directory, before=measuring)
    assert ended.status == 75 and "Stopped by SIGTERM. To go on" in ended.messages, ended
    assert train(directory).status == 0
    assert_same(straight[0], result(directory))
    with open(os.path.join(directory, "run.json"), encoding="utf-8") as file:
        assert len(json.load(file)["starts"]) == 4


SIGTERM_TO_ONE = """
import os
from drep_jax.training import loop
count = loop._Pace.count
seen = []
def tenth(self, batch):
    count(self, batch)
    seen.append(1)
    if len(seen) == 10:
        os.kill(os.getpid(), 15)
loop._Pace.count = tenth
"""


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_sigterm_to_one_process_saves_and_stops_them_all(tmp_path):
    join = ["--num_processes=2", f"--coordinator_address=127.0.0.1:{free_port()}", f"--workdir={tmp_path / 'run'}"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        commands = [("", 0), (SIGTERM_TO_ONE, 1)]
        ends = [
            pool.submit(start, "train.py", TINY, *join, f"--process_id={i}", before=b, devices=2) for b, i in commands
        ]
        first, second = (end.result() for end in ends)
    assert first.status == second.status == 75, (first, second)
    assert "Stopped by SIGTERM in stage backbone after step 14 of 40; the state is saved" in first.messages
    assert "14" in os.listdir(tmp_path / "run" / "checkpoints" / "backbone")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_full_disk_stops_the_run_and_space_lets_it_go_on(straight, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a small disk can be made by root only")
    try:
        refused = []
        while (ended := train(str(disk / "run"))).status:  # it gets further each time
            assert ended.status == 1 and "Traceback" not in ended.messages, ended
            assert "No space left on device" in ended.messages and "same command again" in ended.messages, ended
            refused.append(ended.messages)
            size = 1000 + 350 * len(refused)
            subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
        assert len(refused) >= 3, refused
        assert_same(straight[0], result(str(disk / "run")))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("devices", [1, 4])
def test_a_run_of_eight_devices_goes_on_with_another_number(devices, tmp_path, straight):
    directory = str(tmp_path / "run")
    killed = IN_STAGE.format(stage="algorithm1", step=21, act="os.kill(os.getpid(), 9)")
    assert train(directory, before=killed, devices=8).status == -9
    ended = train(directory, devices=devices)
    assert ended.status == 0, ended
    theirs, ours = (one["algorithm1"][1]["params"]["denoise"] for one in (straight[0], result(directory)))
    assert largest_difference(ours, theirs) < 5e-3
