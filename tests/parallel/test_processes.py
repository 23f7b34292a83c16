"""One device, eight, and two processes of four give the same; processes that do not fit together, or die, say so."""

import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from drep_jax.core.chunks import rounds_of
from drep_jax.core.moments import initial_state, programs
from drep_jax.errors import ConfigError
from drep_jax.evaluation import arms
from drep_jax.parallel import devices, processes
from drep_jax.parallel.hosts import Hosts, check
from drep_jax.parallel.session import EXIT_PEER
from drep_jax.training.logging import read_metrics
from tests.command import call
from tests.core.test_moments import measured, over_hosts
from tests.hosts import SMALL, begin, end

# ---- the same on any number of devices and processes -------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the runs are."""
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def several(place):
    """The job on eight devices of this process, and on four in each of two processes: its work directories."""
    several = begin(
        "train.py", lambda which: [*SMALL, f"--workdir={place / f'2x4-{which}'}"], devices=4, processes=2, heartbeat=120
    )
    assert call("train.py", *SMALL, f"--workdir={place / '8'}").status == 0
    first, second = end(several)
    assert (first.status, second.status) == (0, 0), (first, second)
    assert "Report: " in first.output and second.output == ""  # one process prints, and it alone writes
    assert not os.path.exists(place / "2x4-1")
    return {"8": str(place / "8"), "2x4": str(place / "2x4-0")}


@pytest.fixture(scope="module")
def single(place):
    """The job on one device: its work directory."""
    (one,) = end(begin("train.py", lambda which: [*SMALL, f"--workdir={place / '1'}"], devices=1))
    assert one.status == 0, one.messages
    return str(place / "1")


def learned(directory, stage):
    (step,) = (name for name in os.listdir(f"{directory}/checkpoints/{stage}") if name.isdecimal())
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.restore(f"{directory}/checkpoints/{stage}/{step}/state")
    return jax.tree_util.tree_map(np.asarray, tree["params"])


@pytest.mark.slow
def test_two_processes_do_what_one_does(several):
    same_learning(several["8"], several["2x4"])
    same_numbers(several["8"], several["2x4"])


@pytest.mark.slow
@pytest.mark.parametrize("many", ["8", "2x4"])
def test_many_devices_do_what_one_does(single, several, many):
    same_learning(single, several[many])
    same_numbers(single, several[many])


def same_learning(one, other):
    for stage in ("backbone", "algorithm1", "closed_form", "measured"):
        trees = [learned(directory, stage) for directory in (one, other)]
        for ours, theirs in zip(*(jax.tree_util.tree_leaves(tree) for tree in trees), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-5, err_msg=stage)
    assert max(np.abs(leaf).max() for leaf in jax.tree_util.tree_leaves(learned(one, "closed_form")["denoise"])) > 1
    fused = [safetensors.numpy.load_file(f"{directory}/fused/fused.safetensors") for directory in (one, other)]
    for name, ours in fused[0].items():
        np.testing.assert_allclose(ours, fused[1][name], rtol=1e-3, atol=2e-5, err_msg=name)


def same_numbers(one, other):
    moments = [np.load(f"{directory}/moments.npz") for directory in (one, other)]
    for name in moments[0].files:
        if name.endswith((":mean", ":covariance")):
            ours, theirs = (held[name] for held in moments)
            assert ours.dtype == np.float64
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(ours).max(), err_msg=name)
    logs = ([*read_metrics(f"{directory}/metrics.jsonl")] for directory in (one, other))
    for line, second in zip(*logs, strict=True):
        assert (line["stage"], line["step"]) == (second["stage"], second["step"])
        for key in line.keys() - {"stage", "seconds", "images_per_second"}:
            assert line[key] == pytest.approx(second[key], rel=1e-4, abs=1e-5), (line["stage"], key)
    reports = []
    for directory in (one, other):
        with open(f"{directory}/report.json", encoding="utf-8") as file:
            reports.append(json.load(file))
    ours, theirs = reports
    assert theirs["environment"]["device_count"] == 8
    assert ours["metrics"]["clean"]["n"] == 600
    for part in ("baseline", "control", "denoised"):
        flat, second = (jax.tree_util.tree_leaves(r["metrics"]["clean"][part]) for r in reports)
        assert flat == pytest.approx(second, abs=100 / 600 + 1e-9)  # of 600 images, at most one on the fence
    assert len(ours["front"]["points"]) == 3
    for point, second in zip(ours["front"]["points"], theirs["front"]["points"], strict=True):
        assert point["label"] == second["label"]
        assert point["scores"] == pytest.approx(second["scores"], abs=100 / 77 + 1e-9)


def test_the_closed_form_needs_one_exchange_in_the_whole_run():
    """No device hears of another while images are read; then everything is added up in one all-reduce."""
    net, sites, variables, x = over_hosts()
    center, add, everyone = programs(net, sites, 1.0)
    keys = np.zeros((16, 2), np.uint32)
    mask = np.ones(16, np.float32)
    shifts = center(variables, x[:8], mask[:8], keys[:8])
    state = initial_state(sites)
    batch = [devices.shard(part) for part in (x, mask, keys)]
    everywhere, shifted = devices.replicate(variables), devices.replicate(shifts)
    talking = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")

    def said(program, *args):
        text = program.lower(*args).compile().as_text()
        return {word: text.count(f" {word}(") + text.count(f" {word}-start(") for word in talking}

    assert sum(said(center, variables, x[:8], mask[:8], keys[:8]).values()) == 0
    assert sum(said(add, state, everywhere, shifted, *batch).values()) == 0
    # An all-reduce is a scatter of sums and a gathering of them.
    assert {word: n for word, n in said(everyone, *state).items() if n} == {"all-to-all": 1, "all-gather": 1}


def test_sums_of_devices_are_exact_to_48_bits():
    rng = np.random.default_rng(0)
    exact = {
        "a": rng.normal(size=(8, 37)) * 10.0 ** rng.integers(-6, 6, (8, 37)),
        "b": rng.normal(size=(8, 2, 3)) + 1e5,
    }
    high = jax.tree_util.tree_map(lambda leaf: leaf.astype(np.float32), exact)
    low = jax.tree_util.tree_map(lambda leaf, h: (leaf - h).astype(np.float32), exact, high)
    found = devices.on_devices(devices.exact_total)(high, low)
    for name, leaf in exact.items():
        h, rest = (np.asarray(part[name], np.float64) for part in found)
        for device in range(1, 8):
            np.testing.assert_array_equal(h[0], h[device])
        np.testing.assert_allclose((h + rest)[0], leaf.sum(0), rtol=1e-12, atol=1e-12 * np.abs(leaf).max())
        assert np.abs(h[0] - leaf.sum(0)).max() > 1e-9  # one float32 alone would not do


@pytest.mark.slow
def test_noise_is_measured_alike_on_one_device_and_on_eight(monkeypatch):
    """Five folds of 26 images, of whose vectors a sample is taken; they fill no whole number of chunks."""
    many = measured()
    with monkeypatch.context() as patch:
        for name in ("device_count", "local_device_count"):
            patch.setattr(devices, name, lambda: 1)
        one = measured()
    for ours, theirs in zip(one, many, strict=True):
        assert np.abs(ours).max() > 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("images", [1, 7, 64, 130, 1500, 1499])
@pytest.mark.parametrize("folds", [1, 5])
@pytest.mark.parametrize("hosts, count", [(1, 8), (2, 4), (3, 1)])
def test_every_image_is_measured_exactly_once(images, folds, hosts, count, monkeypatch):
    seen = {}
    monkeypatch.setattr(devices, "device_count", lambda: hosts * count)
    for which in range(hosts):
        monkeypatch.setattr(devices, "host", lambda which=which: (which, hosts))
        rounds = rounds_of(images, folds, 64)
        for images_of in rounds:
            index, mask = images_of.mine()
            assert index.shape == mask.shape == rounds[0].mine()[0].shape and index.shape[1] <= 64
            for image in index[mask > 0]:
                assert seen.setdefault(image, images_of.fold) == image % min(folds, images)
    assert sorted(seen) == list(range(images))
    total = sum(images_of.mask.sum() for images_of in rounds)
    places = sum(images_of.mask.size for images_of in rounds)
    assert total == images and places < images + folds * hosts * count * rounds[0].index.shape[1]
    assert images < 1000 or places < 1.15 * images  # the cost is in proportion, for a prime number too


def test_scores_of_hosts_come_back_in_the_order_of_the_source(monkeypatch):
    """Batches may have different numbers of images, and padding."""
    batches = [np.arange(8).reshape(2, 4), np.array([[8, 9], [10, -1]])]  # a row is a host's part
    monkeypatch.setattr(devices, "gather", lambda rows: np.stack([rows, others[rows.dtype.kind]]))
    mine, other = (np.concatenate([batch[host] for batch in batches]) for host in (0, 1))
    others = {"i": other, "f": other.astype(float), "b": other < 0}
    columns = {"index": [batch[0] for batch in batches], arms.UNLABELED: [batch[0] < 0 for batch in batches]}
    scored = arms._gathered({"arm": [{"score": batch[0].astype(float)} for batch in batches]}, columns)
    assert len(mine) == len(other)
    np.testing.assert_array_equal(scored.index, np.arange(11))
    np.testing.assert_array_equal(scored.statistics["arm"]["score"], np.arange(11))


def test_alone_there_is_nobody_to_wait_for():
    processes.barrier("nobody")
    processes.check_same("anything", {"a": 1})
    assert processes.from_primary(lambda: {"a": 1}) == {"a": 1}
    assert processes.primary() and processes.alone() and processes.leave(0) == 0
    assert devices.broadcast(b"word") == b"word"
    np.testing.assert_array_equal(devices.gather(np.arange(3)), np.arange(3)[None])
    anyone = devices.AnyHost()
    assert [anyone(False), anyone(True), anyone(True, last=True)] == [False, True, True]


# ---- what does not fit together ----------------------------------------------------------------------------------------

ADDRESS = "10.0.0.1:1234"
WRONG = {
    "no coordinator": (
        Hosts(num_processes=2, process_id=0),
        "--num_processes=2 and --process_id=0 alone.*--coordinator_a",
    ),
    "no number": (Hosts(coordinator_address=ADDRESS, process_id=0), "give --num_processes too"),
    "no id": (Hosts(coordinator_address=ADDRESS, num_processes=2), "give --process_id too"),
    "id too high": (Hosts(False, ADDRESS, 2, 2), r"--process_id=2 must be one of 0…1"),
    "id below 0": (Hosts(True, process_id=-1), "--process_id=-1"),
    "no processes": (Hosts(False, ADDRESS, 0, 0), "--num_processes=0 must be at least 1"),
    "no port": (Hosts(False, "10.0.0.1", 2, 0), "HOST:PORT"),
    "no heartbeat": (Hosts(False, ADDRESS, 2, 0, heartbeat=0), "--heartbeat=0"),
    "no time to join": (Hosts(False, ADDRESS, 2, 0, join_timeout=0), "--join_timeout=0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_flags_that_do_not_fit_together_are_refused(case):
    hosts, expected = WRONG[case]
    with pytest.raises(ConfigError, match=expected):
        check(hosts)


def test_good_flags_are_taken():
    for hosts in (Hosts(), Hosts(True), Hosts(False, ADDRESS, 4, 3), Hosts(False, "[::1]:80", 1, 0)):
        check(hosts)
    assert not Hosts(False, ADDRESS, 1, 0).several and Hosts(True).several and Hosts(False, ADDRESS, 2, 0).several


def test_train_and_fuse_refuse_them_before_anything_is_written(tmp_path):
    place = tmp_path / "run"
    call("train.py", *SMALL[:1], f"--workdir={place}", "--num_processes=2").refused(
        "--coordinator_address", "--process_id"
    )
    call("fuse.py", f"--workdir={place}", "--process_id=1").refused("--process_id=1 alone")
    # In this process the devices have been used, so that it is too late to join.
    call("train.py", *SMALL[:1], f"--workdir={place}", "--distributed").refused("before a device is used")
    assert not place.exists()


def test_a_batch_has_to_divide_by_the_devices_of_all_processes(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 16)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    devices.check_batch(32, "denoise.batch_size")
    with pytest.raises(ConfigError, match=r"denoise\.batch_size=24 .* multiple of 16, the number of 2 processes of 8"):
        devices.check_batch(24, "denoise.batch_size")


def test_what_differs_is_named():
    ours, theirs = {"seed": 0, "data.source": "digits"}, {"seed": 1, "data.source": "digits", "new": 2}
    assert processes.differences(ours, theirs) == [
        "new: 'absent' on process 0, 2 there",
        "seed: 0 on process 0, 1 there",
    ]
    assert processes.differences(ours, dict(ours)) == []


def test_moments_of_several_hosts_need_common_images(monkeypatch):
    from drep_jax.core.moments import collect_moments

    net, sites, variables, x = over_hosts()
    monkeypatch.setattr(devices, "host", lambda: (0, 2))
    with pytest.raises(ConfigError, match="give `shift_images`"):
        collect_moments(net, variables, sites, [(jnp.asarray(x[:8]), np.ones(8, np.float32))])


@pytest.mark.slow
def test_processes_with_other_settings_are_refused_by_name(tmp_path):
    """Both say so, and nothing is written."""
    args = lambda which: [*SMALL, f"--workdir={tmp_path / str(which)}", f"--config.seed={which}"]  # noqa: E731
    for ended in end(begin("train.py", args, devices=2, processes=2)):
        ended.refused("configuration of process 1 of 2", "seed: 0 on process 0, 1 there")
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_process_that_finds_nobody_says_where_it_looked(tmp_path):
    args = lambda which: [*SMALL, f"--workdir={tmp_path / 'run'}", "--join_timeout=4"]  # noqa: E731
    first, second = begin("train.py", args, devices=1, processes=2)
    second.kill()
    second.communicate()
    (ended,) = end([first])
    assert ended.status == EXIT_PEER
    for text in ("did not all find each other at 127.0.0.1:", "within 4 s", "--process_id of its own"):
        assert text in ended.messages


# ---- processes that die ------------------------------------------------------------------------------------------------

LONG = [*SMALL, "--config.backbone.steps=100000", "--config.checkpoint_every=20", "--config.log_every=5"]


def until_training(directory, started):
    """Waits until the backbone is being trained."""
    for _ in range(600):
        if len([*read_metrics(f"{directory}/metrics.jsonl")]) > 4:
            return
        assert all(process.poll() is None for process in started), end(started)
        time.sleep(0.5)
    raise AssertionError("training has not begun")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_its_name(victim, tmp_path):
    args = lambda which: [*LONG, f"--workdir={tmp_path / 'run'}"]  # noqa: E731
    started = begin("train.py", args, devices=2, processes=2, heartbeat=6)
    until_training(tmp_path / "run", started)
    began = time.monotonic()
    started[victim].kill()
    ended = end(started)
    assert ended[victim].status == -signal.SIGKILL
    other = ended[1 - victim]
    assert other.status == EXIT_PEER, other
    assert f"Process {victim} of 2" in other.messages and "is gone" in other.messages
    assert "from the last checkpoint" in other.messages
    assert time.monotonic() - began < 6 + 2 * 1.5 + 10  # the heartbeat, two looks, and a busy machine


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_the_run_goes_on_with_another_number(tmp_path):
    place = f"--workdir={tmp_path / 'run'}"
    args = lambda which: [*SMALL, "--config.backbone.steps=400", "--config.log_every=5", place]  # noqa: E731
    started = begin("train.py", args, devices=4, processes=2, heartbeat=60)
    until_training(tmp_path / "run", started)
    started[1].send_signal(signal.SIGTERM)
    first, second = end(started)
    assert (first.status, second.status) == (75, 75), (first, second)
    assert "signal to another process" in first.messages and "SIGTERM" in second.messages
    saved = int(first.messages.split("after step ")[1].split()[0])
    assert f"after step {saved} of 400" in second.messages and saved < 400
    assert (tmp_path / "run" / "checkpoints" / "backbone" / str(saved)).is_dir()
    (ended,) = end(begin("train.py", args, devices=8))
    assert ended.status == 0, ended
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["stage"] == "backbone"]
    assert steps[-1] == 400 and steps == sorted(steps)
