"""The report: complete files, honest words, and plots that hold many sites."""

import copy
import io
import itertools
import json
import os
import re
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from drep_jax.errors import CheckpointError, DataError
from drep_jax.metrics.pictures import small
from drep_jax.report import KEYS, PLOTS, console_table, markdown, plain, validate, verdict, write_report
from drep_jax.report.plots.front import non_dominated
from drep_jax.report.plots.spectra import through_the_depth

COMPARISON = dict[str, tuple[float, float, float, float]]
OURS = "algorithm1"


def condition(differences: COMPARISON, n=600, score=96.0, learners=(OURS,)):
    """One condition; `differences` has (difference, low, high, p) in acc@1 of every learner to each arm."""
    entry = {"n": n, "control": {}, "denoised": {name: {"acc@1": score, "acc@5": 99.8} for name in learners}}
    entry |= {"difference": {}, "interval": {}, "mcnemar": {}}
    gained = differences["baseline"][0]
    for arm, (difference, low, high, p) in differences.items():
        values = {"acc@1": score - difference, "acc@5": 99.7}
        pairs = {f"{name} - {arm}": ({"acc@1": difference, "acc@5": 0.1}, [low, high], p) for name in learners}
        if arm == "baseline":
            entry["baseline"] = values
        else:
            entry["control"][arm] = values
            gap = gained - difference
            pairs[f"{arm} - baseline"] = ({"acc@1": gap, "acc@5": 0.0}, [gap - 1.0, gap + 1.0], 0.5)
        for key, (values, interval, p_value) in pairs.items():
            entry["difference"][key] = values
            entry["interval"][key] = {"acc@1": interval, "acc@5": [-0.1, 0.3]}
            entry["mcnemar"][key] = p_value
    return entry


UNCHANGED = (0.2, -0.3, 0.7, 0.6)
HIGHER = (3.1, 1.2, 5.0, 0.0004)
LOWER = (-1.5, -2.5, -0.5, 0.004)
THREE = {
    "clean": condition({"baseline": UNCHANGED, "placebo": HIGHER, "continued": (-0.4, -1.0, 0.2, 0.2)}),
    "gaussian:20": condition(
        {"baseline": HIGHER, "placebo": (4.0, 2.0, 6.0, 1e-5), "continued": UNCHANGED}, score=81.3
    ),
    "jpeg:10": condition({"baseline": LOWER, "placebo": LOWER, "continued": LOWER}, score=70.2),
}


def make_report(sites=8, stack=1, metrics=THREE, change=0.004, optimum=True, learners=(OURS,), pictures=False):
    """A realistic report of a ViT."""
    rng = np.random.default_rng(0)
    paths = [f"encoderblock_{i // 2}/mlp/{('fc1', 'fc2')[i % 2]}" for i in range(sites)]
    if stack > 1:
        paths = [f"stage_{i}/ScanBlocks/block/mlp/fc1" for i in range(sites)]
    listed = []
    for i, path in enumerate(paths):
        listed.append(
            {
                "path": path,
                "layers": [path],
                "kind": "dense",
                "width": 64,
                "groups": 1,
                "bias": True,
                "t": [sites * stack - i * stack - j for j in range(stack)],
                "relative_change": [change * float(rng.uniform(0.2, 2)) for _ in range(stack)],
            }
        )
    steps = np.unique(np.geomspace(1, 2000, 60).astype(int))
    curve = [[int(step), sites * (0.95 + 3 * float(np.exp(-step / 60)))] for step in steps]
    figure = {"passed": True, "error": 2.1e-12, "bound": 3e-10, "change": 0.0123 if change else 0.0}
    rows = [{"path": s["path"], "slice": j, "t": [t], **figure} for s in listed for j, t in enumerate(s["t"])]
    report = {
        "schema": 2,
        "config": {"seed": 0, "data": {"name": "digits", "size": 32}, "sites": ["*/mlp/*"]},
        "environment": {
            "drep_jax": "0.1.0",
            "jax": "0.10.2",
            "flax": "0.12.8",
            "python": "3.11.9",
            "device": "cpu",
            "device_count": 8,
            "command": "python train.py --config=configs/digits.py",
            "git_revision": "abc1234",
            "date": "2026-01-02 03:04",
        },
        "sites": listed,
        "coverage": {"layers": sites, "candidates": 30, "kernel_share": 0.63},
        "learning": {
            name: {
                "steps": 2000,
                "seconds": 31.2,
                "loss": curve if name == OURS else [],
                "per_site": {path: [1.5, 0.96] for path in paths},
                "optimum": dict.fromkeys(paths, 0.94) if optimum else None,
                "images": 1000,
            }
            for name in learners
        },
        "exported": learners[-1],
        "metrics": copy.deepcopy(metrics),
        "certificate": {
            "passed": True,
            "rule": "ddpm",
            "steps": 1,
            "results": {
                "float64": {**figure, "sites": rows},
                "float32": {**figure, "error": 4e-3, "bound": 0.2, "sites": [{**row, "bound": 0.2} for row in rows]},
            },
            "structure": {"same_tree": True, "same_dtypes": True, "same_program": True},
        },
        "cost": {
            "flops": {"baseline": 1.25e9, "fused": 1.25e9, "explicit": 1.7e9},
            "flop_ratio": {"fused": 1.0, "explicit": 1.36},
            "latency_ms": {"baseline": 12.1, "fused": 12.15, "explicit": 19.0},
            "latency_ratio": {"fused": 1.004, "explicit": 1.57},
            "parameters": {"backbone": 1_234_567, "denoise": 33_280},
            "batch": 64,
        },
    }
    return report | (pictures_of(paths) if pictures else {})


def pictures_of(paths):
    """The optional parts of a report."""
    variance = np.geomspace(3.0, 1e-3, 64)
    strengths = [round(0.1 * index, 1) for index in range(11)]
    return {
        "spectra": {
            path: {"variance": variance, "gain": variance / (variance + 0.02 * (index + 1))}
            for index, path in enumerate(paths)
        },
        "front": {
            "conditions": ["clean", "gaussian:20", "gaussian:40"],
            "chosen": 7,
            "points": [
                {
                    "label": f"τ = {s}",
                    "strength": s,
                    "scores": {
                        "clean": 95 - 3 * s**2,
                        "gaussian:20": 75 + 14 * s,
                        "gaussian:40": 40 + 40 * np.sin(2.2 * s),
                    },
                }
                for s in strengths
            ],
        },
        "ranked": ranked_of(("no denoising", "closed_form")),
        "examples": examples_of(("no denoising", "closed_form")),
        "recovery": {
            "gaussian:20": {"measured": 0.93, "placebo": -0.02},
            "gaussian:40": {"measured": None, "tent": 1.1},
        },
    }


def ranked_of(arms, queries=3, found=10):
    """Queries with made pictures of a person's shape."""
    rng = np.random.default_rng(0)
    return {
        "condition": "gaussian:20",
        "metric": "cosine",
        "arms": list(arms),
        "queries": [
            {
                "image": index,
                "why": ("largest gain", "largest loss", "drawn at random")[index],
                "ap": dict(zip(arms, (0.2 + 0.1 * index, 0.45), strict=True)),
                "found": {
                    arm: [
                        {
                            "image": 3 + (3 * place + index) % 7,
                            "distance": 0.1 + 0.05 * place,
                            "right": (place + at) % 3 == 0,
                        }
                        for place in range(found - index)
                    ]
                    for at, arm in enumerate(arms)
                },
            }
            for index in range(queries)
        ],
        "images": {str(row): small(rng.integers(0, 256, (64, 32, 3))) for row in range(10)},
    }


def examples_of(arms, images=5):
    """Test images with made pictures, of which the second arm answers every other one rightly."""
    rng = np.random.default_rng(0)
    kinds = ("corrected", "broken", "drawn at random")
    return {
        "condition": "gaussian:20",
        "arms": list(arms),
        "counts": {"corrected": 12, "broken": 3, "changed": 4},
        "of": 600,
        "images": [
            {
                "index": 7 * index,
                "why": kinds[index % 3],
                "label": "tabby cat",
                "clean": small(rng.integers(0, 256, (32, 32, 3))),
                "corrupted": small(rng.integers(0, 256, (32, 32, 3))),
                "answers": {
                    arm: {"answer": ("tabby cat", "lynx")[(index + at) % 2], "confidence": 0.5 + 0.1 * index}
                    for at, arm in enumerate(arms)
                },
            }
            for index in range(images)
        ],
    }


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


LEARNERS = (OURS, "closed_form", "measured")
CASES = {
    "usual": {},
    "48 sites": {"sites": 48},
    "stacked": {"sites": 4, "stack": 12},
    "240 slices": {"sites": 20, "stack": 12},
    "no controls": {"metrics": {"clean": condition({"baseline": HIGHER})}},
    "no labels": {"metrics": {}},
    "zero change": {"change": 0.0, "metrics": {"clean": condition({"baseline": (0.0, 0.0, 0.0, 1.0)})}},
    "no optimum": {"optimum": False},
    "unknown change": {"change": np.nan},
    "pictures": {"pictures": True, "sites": 30},
    "closed form": {
        "learners": ("closed_form",),
        "metrics": {"clean": condition({"baseline": UNCHANGED}, learners=("closed_form",))},
    },
    "three learners": {
        "learners": LEARNERS,
        "metrics": {"clean": condition({"baseline": UNCHANGED, "placebo": HIGHER}, learners=LEARNERS)},
    },
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if case in ("stacked", "240 slices") else []) for case in CASES],
)
def test_writes_everything_and_nothing_else(case, tmp_path):
    report = make_report(**CASES[case])
    before = copy.deepcopy(report)
    write_report(report, str(tmp_path / "new" / "run"))
    folder = tmp_path / "new" / "run"
    assert plain(report) == plain(before)
    assert json.loads(read(folder / "report.json")) == plain(report)

    text = read(folder / "report.md")
    plots = {f"plots/{name}" for name in os.listdir(folder / "plots")}
    assert sorted(os.listdir(folder)) == [
        "plots",
        "report.html",
        "report.json",
        "report.md",
    ]  # no temporary file is left
    missing = {"no labels": {"accuracy"}, "closed form": {"loss"}}.get(case, set())
    missing |= {"overlays", "boxes", "reconstructions", "probe_curve", "filters"} | (
        set() if case == "pictures" else {"spectra", "front", "ranked", "examples"}
    )
    assert plots == {f"plots/{name}.png" for name in PLOTS.keys() - missing}
    assert set(re.findall(r"!\[.*\]\((.*)\)", text)) == plots
    for site in report["sites"]:
        assert f"| {site['path']} " in text
    for plot in plots:
        with Image.open(folder / plot) as image:
            assert min(image.size) > 150 and len(image.getcolors(1 << 24)) > 10
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert tables and not re.search(r"\b(None|nan|inf)\b", text)


@pytest.mark.slow
def test_plots_are_reproducible_and_follow_the_numbers():
    def draw(report):
        return {name: zlib.crc32(plot(report)) for name, plot in PLOTS.items()}

    report = make_report(sites=3, pictures=True)
    first, second = draw(report), draw(report)
    assert first == second
    report["sites"][0]["relative_change"] = [0.02]
    report["learning"][OURS]["optimum"]["encoderblock_0/mlp/fc1"] = 0.5
    report["metrics"]["clean"]["interval"][f"{OURS} - baseline"]["acc@1"] = [0.1, 0.9]
    report["spectra"]["encoderblock_0/mlp/fc1"]["gain"] = np.full(64, 0.5)
    report["front"]["chosen"] = 3
    report["ranked"]["queries"][0]["found"]["closed_form"][0]["right"] ^= True
    report["examples"]["images"][0]["answers"]["closed_form"]["answer"] = "puma"
    third = draw(report)
    assert all(first[name] != third[name] for name in PLOTS)


@pytest.mark.slow
def test_sites_plot_grows_with_the_sites_but_not_for_ever():
    heights = []
    for sites in (8, 48, 160, 170):
        with Image.open(io.BytesIO(PLOTS["sites"](make_report(sites=sites)))) as image:
            heights.append(image.height)
    assert heights[0] < heights[1] < heights[2] == heights[3]
    assert heights[1] / 48 > 20  # pixels a bar, enough for its label


@pytest.mark.parametrize("mode", ["right", "wrong"])
def test_right_and_wrong_differ_by_more_than_colour(mode):
    """Frames of right images are whole, those of wrong ones dashed; pictures are pasted in their own colours."""
    ranked = ranked_of(("a", "b"), queries=1, found=1)
    ranked["images"] = {name: small(np.full((64, 32, 3), (30, 60, 200))) for name in ranked["images"]}
    for arm in ("a", "b"):
        ranked["queries"][0]["found"][arm][0]["right"] = mode == "right"
    with Image.open(io.BytesIO(PLOTS["ranked"]({"ranked": ranked}))) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    blue = (abs(pixels - (30, 60, 200)) < 12).all(axis=2)
    assert blue.sum() > 4 * 70 * 140  # two rows of the query and one image
    frame = (0, 158, 115) if mode == "right" else (213, 94, 0)
    drawn = (abs(pixels - frame) < 12).all(axis=2)
    most = drawn.sum(axis=0).max() / blue.any(axis=1).sum()  # share of the frame's upright side that is drawn
    assert most > 0.9 if mode == "right" else 0.3 < most < 0.8
    assert PLOTS["ranked"]({"ranked": {**ranked, "queries": []}}) is None
    assert PLOTS["ranked"]({}) is None


@pytest.mark.parametrize("right", [True, False])
def test_examples_show_both_pictures_and_whether_each_answer_is_right(right):
    examples = examples_of(("a", "b"), images=1)
    (image,) = examples["images"]
    blue, yellow = (30, 60, 200), (230, 200, 30)
    image["clean"], image["corrupted"] = (small(np.full((64, 64, 3), color)) for color in (blue, yellow))
    for arm in ("a", "b"):
        image["answers"][arm]["answer"] = image["label"] if right else "lynx"
    with Image.open(io.BytesIO(PLOTS["examples"]({"examples": examples}))) as drawn:
        pixels = np.asarray(drawn.convert("RGB")).astype(int)

    def shown(color):
        return (abs(pixels - color) < 12).all(axis=2)

    assert shown(blue).sum() == pytest.approx(shown(yellow).sum(), rel=0.05) and shown(blue).sum() > 5000
    assert np.nonzero(shown(blue))[1].max() < np.nonzero(shown(yellow))[1].min()  # clean on the left
    green, red = shown((0, 158, 115)).sum(), shown((213, 94, 0)).sum()
    assert (green > 10 and red == 0) if right else (red > 10 and green == 0)
    assert PLOTS["examples"]({"examples": {**examples, "images": []}}) is None
    assert PLOTS["examples"]({}) is None


def test_the_pages_say_how_many_answers_changed(tmp_path, monkeypatch):
    monkeypatch.setattr("drep_jax.report.PLOTS", {})
    write_report(make_report(pictures=True), str(tmp_path))
    for kind in ("md", "html"):
        text = read(tmp_path / f"report.{kind}")
        assert "600 gaussian:20 images" in text and "closed_form answers 12 rightly that no denoising" in text
    write_report(make_report(), str(tmp_path / "without"))
    assert "rightly" not in read(tmp_path / "without" / "report.md")


def test_spectra_of_many_sites_are_spread_through_the_depth():
    names = [f"layer_{index}" for index in range(48)]
    chosen = [int(name.removeprefix("layer_")) for name in through_the_depth(names)]
    assert len(chosen) == 12 and chosen[0] == 0 and chosen[-1] == 47
    assert {b - a for a, b in itertools.pairwise(chosen)} <= {4, 5}
    assert through_the_depth(names[:12]) == names[:12]


def test_spectra_with_no_variance_or_gains_beyond_one_are_drawn():
    spectra = {
        "a": {"variance": [0.0], "gain": [1.0]},
        "b": {"variance": [2.0, None, -1e-9], "gain": [1.4, None, -0.2]},
    }
    assert PLOTS["spectra"](make_report() | {"spectra": spectra})


@hypothesis.given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(places):
    best = non_dominated(places)

    def beats(a, b):
        return a[0] >= b[0] and a[1] >= b[1] and a != b

    assert best
    for index, place in enumerate(places):
        assert (index in best) != any(beats(other, place) for other in places)
    assert all(any(beats(places[i], place) or places[i] == place for i in best) for place in places)


@pytest.mark.parametrize(
    "front",
    [
        {
            "conditions": ["clean"],
            "chosen": 0,
            "points": [{"label": "", "strength": 0.0, "scores": {"clean": 1.0}}] * 2,
        },
        {
            "conditions": ["clean", "b"],
            "chosen": 0,
            "points": [{"label": "", "strength": 0.0, "scores": {"clean": 1.0, "b": value}} for value in (2.0, None)],
        },
    ],
)
def test_a_front_of_one_condition_or_point_is_not_drawn(front):
    assert PLOTS["front"](make_report() | {"front": front}) is None


def test_recovery_is_a_table_of_shares():
    report = make_report(pictures=True)
    title = "Fraction of the labeled fine-tuning's recovery"
    rows = [" ".join(line.split()) for line in console_table(report).split(title)[1].splitlines()]
    assert rows[1:5:3] == ["condition measured placebo tent", "gaussian:40 – – 110 %"]
    assert rows[3] == "gaussian:20 93 % −2 % –"
    assert f"### {title}\n" in markdown(plain(report))


def test_stale_plots_are_removed(tmp_path):
    write_report(make_report(), str(tmp_path))
    assert (tmp_path / "plots/accuracy.png").exists()
    write_report(make_report(metrics={}), str(tmp_path))
    assert not (tmp_path / "plots/accuracy.png").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_report(make_report(), str(tmp_path))
    old = read(tmp_path / "report.json")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_report(make_report(sites=2), str(tmp_path))
    assert read(tmp_path / "report.json") == old
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if ".tmp" in name]


def test_a_work_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match=r"Cannot write .*taken"):
        write_report(make_report(), str(tmp_path / "taken"))


# ---- words ---------------------------------------------------------------------------------------------------------


def test_verdict_of_no_significant_change():
    sentence = verdict("clean", condition({"baseline": UNCHANGED}), OURS)
    assert (
        sentence == "algorithm1: No significant change on clean images: acc@1 +0.2 points [−0.3, +0.7] against the "
        "unchanged backbone."
    )


def test_verdict_credits_denoising_only_against_every_control():
    def say(**controls):
        return verdict("gaussian:50", condition({"baseline": HIGHER, **controls}), OURS)

    assert say().startswith("algorithm1: Significantly higher on gaussian:50 images: acc@1 +3.1 points [+1.2, +5.0] ")
    unproven = "so denoising is not shown to be the cause."
    assert say().endswith("; no control arm ran, " + unproven)
    assert say(placebo=HIGHER, continued=HIGHER).endswith("; significantly higher than placebo, continued.")
    mixed = say(placebo=HIGHER, continued=UNCHANGED)
    assert mixed.endswith("; significantly higher than placebo; no significant change from continued, " + unproven)
    assert say(placebo=LOWER, continued=HIGHER).endswith(unproven)
    unchanged = verdict("clean", condition({"baseline": UNCHANGED, "placebo": HIGHER}), OURS)
    assert "No significant change" in unchanged and "cause" not in unchanged


def test_verdict_is_that_of_the_arm_asked_for():
    entry = condition({"baseline": HIGHER, "placebo": HIGHER}, learners=LEARNERS)
    entry["difference"]["measured - baseline"]["acc@1"] = -7.0
    entry["interval"]["measured - baseline"]["acc@1"] = [-9.0, -5.0]
    assert verdict("clean", entry, "measured").startswith("measured: Significantly lower on clean images: acc@1 −7.0 ")
    assert verdict("clean", entry, "closed_form").startswith("closed_form: Significantly higher")


def test_verdict_says_when_it_got_worse():
    sentence = verdict("clean", condition({"baseline": LOWER, "placebo": LOWER}), OURS)
    assert "Significantly lower on clean images: acc@1 −1.5 points [−2.5, −0.5]" in sentence


def test_mcnemar_can_only_take_significance_away():
    disagreeing = condition({"baseline": (0.8, 0.1, 1.5, 0.07)})
    assert "No significant change" in verdict("clean", disagreeing, OURS)
    disagreeing["mcnemar"] = {}
    assert "Significantly higher" in verdict("clean", disagreeing, OURS)
    assert "No significant change" in verdict("clean", condition({"baseline": (0.2, -0.1, 0.5, 0.01)}), OURS)


@pytest.mark.parametrize(
    ("difference", "n", "printed"),
    [
        ((0.0, 0.0, 0.0, 1.0), 600, "0.0 points [0.0, 0.0]"),
        ((-0.01, -0.04, 0.03, 1.0), 600, "0.0 points [0.0, 0.0]"),
        ((0.3, 0.002, 0.61, 0.04), 50_000, "+0.300 points [+0.002, +0.610]"),
        ((-0.123, -0.5, 0.25, 0.4), 10_000, "−0.12 points [−0.50, +0.25]"),
        ((2.0, None, None, 1.0), 3, "+2.0 points [−∞, +∞]"),
        ((2.0, -np.inf, np.inf, 1.0), 3, "+2.0 points [−∞, +∞]"),
    ],
)
def test_differences_are_signed_and_rounded_without_lying(difference, n, printed):
    assert printed in verdict("clean", condition({"baseline": difference}, n=n), OURS)


def test_console_table_tells_arms_intervals_and_verdicts():
    text = console_table(make_report())
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["condition", "n", "arm"] and "acc@1 against baseline" in lines[0]
    rows = [" ".join(line.split()) for line in lines]
    assert "clean 600 baseline 95.8 99.7" in rows
    assert "placebo 92.9 99.7 −2.9 [−3.9, −1.9] 0.500 not significant" in rows  # McNemar's test does not agree
    assert "algorithm1 * 96.0 99.8 +0.2 [−0.3, +0.7] 0.600 not significant" in rows
    assert "algorithm1 * 81.3 99.8 +3.1 [+1.2, +5.0] <0.001 higher" in rows
    assert "algorithm1 * 70.2 99.8 −1.5 [−2.5, −0.5] 0.004 lower" in rows
    for name, entry in THREE.items():
        assert verdict(name, entry, OURS) in lines
    assert "Certificate: PASSED" in text and "float64  error 2.1e-12 of the change, bound 3.0e-10" in text
    assert "fused 1.000× FLOPs, 1.00× latency; explicit 1.360× FLOPs, 1.57× latency" in text
    assert "8 sites: 8 of 30 linear layers, 63 % of the kernel weights" in text


def test_console_table_of_three_learners_fits_and_speaks_of_the_exported_one():
    controls = {"baseline": HIGHER, "placebo": HIGHER, "continued": LOWER}
    report = make_report(metrics={"gaussian:40": condition(controls, learners=LEARNERS)}, learners=LEARNERS)
    for entry in report["metrics"].values():
        for arm in (entry["baseline"], *entry["control"].values(), *entry["denoised"].values()):
            arm |= {"acc@10": 99.9, "acc@20": 100.0}
        for part, value in (("difference", 0.0), ("interval", [0.0, 0.0])):
            for numbers in entry[part].values():
                numbers |= {"acc@10": value, "acc@20": value}
    lines = console_table(report).splitlines()
    table = lines[: lines.index("")]
    assert max(map(len, table)) <= 110 and "acc@20" not in table[0]
    assert [line.split()[0] for line in table[3:]] == ["placebo", "continued", *LEARNERS]
    assert [line.split()[0] for line in table if "*" in line] == ["measured"]
    told = [line for line in lines if ": Significantly" in line]
    assert told == [verdict("gaussian:40", report["metrics"]["gaussian:40"], "measured")]
    text = markdown(plain(report))
    assert "acc@20" in text
    for learner in LEARNERS:
        assert verdict("gaussian:40", report["metrics"]["gaussian:40"], learner) in text
        assert f"### {learner}\n" in text


def test_an_unlabelled_run_says_why_there_is_no_accuracy():
    report = make_report(metrics={})
    written = markdown(plain(report))
    for text in (console_table(report), written):
        assert "no labeled test images" in text and "acc@1" not in text
        assert "significant" not in text and "Certificate" in text


def test_any_metric_names_and_no_mcnemar():
    pairs = ("algorithm1 - baseline", "algorithm1 - augmented", "augmented - baseline")
    entry = {
        "n": 300,
        "baseline": {"mAP": 50.0, "rank-1": 80.0},
        "control": {"augmented": {"mAP": 50.5, "rank-1": 80.5}},
        "denoised": {OURS: {"mAP": 52.0, "rank-1": 80.0}},
        "difference": {pair: {"mAP": 2.0, "rank-1": 0.0} for pair in pairs},
        "interval": {pair: {"mAP": [1.0, 3.0], "rank-1": [-1, 1]} for pair in pairs},
        "mcnemar": {},
    }
    text = console_table(make_report(metrics={"clean": entry}))
    assert "Significantly higher on clean images: mAP +2.0 points [+1.0, +3.0]" in text
    assert "augmented" in text and "rank-1" in text


def test_a_control_against_the_baseline_is_shown():
    entry = condition({"baseline": HIGHER, "continued": UNCHANGED})
    key = "continued - baseline"
    entry["mcnemar"][key] = 0.002
    written = markdown(plain(make_report(metrics={"clean": entry})))
    assert re.search(
        r"continued − baseline +\| acc@1 +\| +\+2\.9 \[\+1\.9, \+3\.9\] \| +0\.002 \| higher",
        written,
    )
    del entry["interval"][key]
    with pytest.raises(DataError, match=r"continued - baseline.acc@1 is missing"):
        validate(make_report(metrics={"clean": entry}))


def test_certificate_tells_failure_and_indecision():
    report = make_report()
    certificate = report["certificate"]
    certificate["passed"] = certificate["results"]["float64"]["passed"] = False
    certificate["results"]["float64"]["sites"][3] |= {"error": 5e-9, "passed": False}
    certificate["results"]["float32"] |= {"bound": 3.0}
    certificate["structure"]["same_program"] = False
    written = markdown(plain(report))
    for text in (console_table(report), written):
        assert "FAILED" in text and "PASSED" not in text
        assert "same program: NO" in text
        assert "encoderblock_1/mlp/fc2" in text and "5.0e-09" in text
        assert "too coarse a type to decide" in text


def test_learning_tells_the_gap_to_the_optimum():
    text = markdown(plain(make_report()))
    assert "Sum over the sites: 12.0000 → 7.6800, optimum 7.5200, gap +0.1600; 96.4 % of the possible reduction" in text
    assert re.search(r"\| encoderblock_0/mlp/fc1 +\| +1\.5000 \| +0\.9600 \| +0\.9400 \| +\+0\.0200 \|", text)
    written = markdown(plain(make_report(optimum=False)))
    assert "The optimum is not known" in written


def test_stacked_sites_show_their_range():
    report = make_report(sites=2, stack=12)
    report["sites"][0]["relative_change"] = [0.001 * (j + 1) for j in range(12)]
    written = markdown(plain(report))
    assert re.search(r"\| 24…13 \| +0\.1 % … 1\.2 % \|", written)


def test_what_the_sources_say_and_what_was_left_out_is_told(tmp_path):
    facts = {"source": "folder:<x>", "images": 1200, "classes": 3, "unlabeled": 2, "notes": ["Ignored 3 entries."]}
    data = {"train": facts, "test": {**facts, "classes": None, "unlabeled": 1200}}
    metrics = {"clean": {**THREE["clean"], "left_out": {"images without a label": 4, "queries without a match": 2}}}
    metrics["jpeg:10"] = THREE["jpeg:10"] | {"left_out": metrics["clean"]["left_out"]}
    content = make_report(metrics=metrics) | {"data": data}
    write_report(content, str(tmp_path))
    pages = {kind: read(tmp_path / f"report.{kind}") for kind in ("md", "html", "json")}
    assert "## Images" in pages["md"] and "folder:&lt;x&gt;" in pages["html"]
    for text in (pages["md"], pages["html"]):
        assert text.count("Ignored 3 entries.") == 1, "what two parts say is told once"
        assert "1,200 images, 3 classes, 2 without a label" in text and "1,200 images, no labels" in text
    left_out = "Left out of the scores: 4 images without a label, 2 queries without a match."
    assert all(text.count(left_out) == 1 for text in (pages["md"], pages["html"], console_table(content)))
    assert json.loads(pages["json"])["data"] == data


def test_a_failed_evaluation_is_no_run_without_labels():
    content = make_report(metrics={}) | {"evaluation_failed": "DataError: a.png cannot be read."}
    for text in (markdown(plain(content)), console_table(content)):
        assert "The evaluation FAILED, so no arms were compared: DataError: a.png cannot be read." in text
        assert "no labeled test images" not in text


def test_parts_that_were_not_measured_are_named():
    report = make_report() | {"learning": {OURS: None}, "certificate": None, "cost": None}
    text = markdown(plain(report))
    assert "it is not shown that fused equals explicit" in text and "Cost: not measured" in text
    assert "Nothing was learned" in text
    assert "Cost: not measured" in console_table(report)


# ---- validation ----------------------------------------------------------------------------------------------------


RESULTS = (("certificate", "results", "float64"), ("certificate", "results", "float32"))
FRONT = pictures_of(())["front"]
RANKED = ranked_of(("no denoising", "closed_form"), queries=1)
EXAMPLES = examples_of(("no denoising", "closed_form"), images=1)
FREE = ("config", "per_site", "optimum", "control", "baseline", "denoised", "mcnemar")


def places(value, path=()):
    """Yields the path of every key below `value`; of a list, those of its first entry."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from places(item, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def required():
    """Yields every key that the schema fixes; names of arms, metrics, conditions, sites and precisions are free."""
    report = make_report(sites=1, metrics={"clean": THREE["clean"]})
    for place in places(report):
        inside_metric = place[0] == "metrics" and len(place) > 3 and place[2] in FREE
        inside_free = any(name in place[:-1] for name in ("config", "per_site", "optimum"))
        if not (inside_metric or inside_free or place in (("metrics", "clean"), ("learning", OURS), *RESULTS)):
            yield place


@pytest.mark.parametrize("place", list(required()), ids=lambda place: ".".join(map(str, place)))
def test_every_missing_key_is_named(place):
    report = make_report(sites=1, metrics={"clean": THREE["clean"]})
    validate(report)
    parent = report
    for key in place[:-1]:
        parent = parent[key]
    del parent[place[-1]]
    with pytest.raises(DataError, match=re.escape(str(place[-1])) + ".* is missing"):
        validate(report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, "schema is 1, expected 2"),
        ({"sites": None}, "sites is null"),
        ({"environment": "cpu"}, "environment is 'cpu', expected an object"),
        ({"sites": 3}, "sites is 3, expected entries"),
        ({"sites": [{**make_report()["sites"][0], "t": [1, 2]}]}, "2 and 1 numbers in t and relative_change"),
        ({"metrics": {"clean": {**THREE["clean"], "baseline": {}}}}, "metrics.clean.baseline is empty"),
        (
            {"spectra": {"a": {"variance": [1.0, 2.0], "gain": [1.0]}}},
            "spectra.a has 2 and 1 numbers in variance and gain",
        ),
        ({"spectra": {"a": {"variance": [], "gain": []}}}, "spectra.a has 0 and 0 numbers"),
        ({"spectra": {"a": {"variance": 3.0, "gain": [1.0]}}}, "spectra.a.variance is 3.0, expected entries"),
        ({"spectra": {"a": {"variance": [3.0]}}}, "spectra.a.gain is missing"),
        ({"front": {**FRONT, "chosen": 11}}, "front.chosen is 11, expected the index of one of 11 points"),
        ({"front": {**FRONT, "conditions": ["clean", "jpeg:5"]}}, r"front\.points\.0\.scores\.jpeg:5 is missing"),
        ({"front": {**FRONT, "points": [{"label": "a"}]}}, r"front\.points\.0\.strength is missing"),
        ({"ranked": {**RANKED, "images": {}}}, r"ranked\.images\.0 is missing"),
        ({"ranked": {**RANKED, "arms": ["a"]}}, r"ranked\.queries\.0\.ap\.a is missing"),
        ({"ranked": {**RANKED, "queries": [{"image": 1}]}}, r"ranked\.queries\.0\.why is missing"),
        ({"examples": {**EXAMPLES, "arms": ["a"]}}, r"examples\.images\.0\.answers\.a is missing"),
        ({"examples": {**EXAMPLES, "images": [{"index": 1}]}}, r"examples\.images\.0\.why is missing"),
        ({"recovery": 0.5}, "recovery is 0.5, expected entries"),
        ({"exported": "fused"}, "exported is 'fused', expected one of learning: algorithm1"),
        (
            {"metrics": {"clean": {**THREE["clean"], "denoised": {}}}},
            r"metrics\.clean\.denoised\.algorithm1 is missing",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        validate(make_report() | change)


def test_every_key_is_documented():
    document = read(os.path.join(os.path.dirname(__file__), "../../docs/report.md"))

    def names(keys):
        for key, below in keys.items():
            yield from [key.rstrip("?")] if not key.startswith("*") else []
            yield from names(below or {})

    assert [key for key in names(KEYS) if f"`{key}`" not in document] == []


def test_an_incomplete_report_writes_nothing(tmp_path):
    with pytest.raises(DataError, match="and 10 more"):
        write_report({"schema": 2, "cost": {}, "environment": {}}, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_names_that_are_not_utf_8_can_be_written_and_drawn():
    examples = examples_of(("a", "b"), images=1)
    examples["images"][0]["answers"]["a"]["answer"] = "v\udcf6gel"
    report = plain({"examples": examples, "v\udcf6gel": 1})
    assert report["examples"]["images"][0]["answers"]["a"]["answer"] == "v\\udcf6gel" in report
    assert PLOTS["examples"](report) is not None


def test_plain_makes_valid_json_or_says_where_it_cannot():
    value = {"a": np.float32(0.5), "b": (1, np.int64(2)), "c": np.array([1.0, np.nan]), "d": np.bool_(True), 3: np.inf}
    assert plain(value) == {"a": 0.5, "b": [1, 2], "c": [1.0, None], "d": True, "3": None}
    with pytest.raises(DataError, match=r"report\.config\.model is a object"):
        plain({"config": {"model": object()}})
