"""report.html in a real browser: quiet, alone, whole pictures, the numbers of report.json, and room for its text."""

import io
import json
import re
import shutil

import html5lib
import pytest
from PIL import Image

from drep_jax.report import PLOTS, html, plain, write_report
from tests.report.test_report import CASES, LEARNERS, LOWER, OURS, UNCHANGED, condition, make_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
METRICS = {
    "clean": condition({"baseline": LOWER, "placebo": UNCHANGED, "continued": UNCHANGED}, learners=LEARNERS),
    "gaussian:40": condition(
        {"baseline": (12.3, 9.5, 15.0, 1e-9), "placebo": (13.0, 10.0, 16.0, 1e-9), "continued": UNCHANGED},
        learners=LEARNERS,
        score=88.1,
    ),
}
EVIL = '<script>alert(1)</script><img src="http://localhost:1/x.png" onerror="alert(2)"> & "quoted"'
LONG = "stage_" * 40
_png = io.BytesIO()
Image.new("RGB", (1, 1)).save(_png, "PNG")
DOT = _png.getvalue()


def everything():
    """A report with every part, several learners and enough sites for a long table."""
    return make_report(sites=30, learners=LEARNERS, metrics=METRICS, pictures=True)


def with_names(name):
    """A report in which everything that can have a name is called `name`."""
    entry = json.loads(json.dumps(METRICS["clean"]).replace("acc@5", json.dumps(name)[1:-1]))
    report = make_report(sites=3, learners=LEARNERS, metrics={name: entry}, pictures=True)
    report["environment"]["command"] = report["environment"]["device"] = name
    report["config"][name] = name
    report["sites"][0]["path"] = name
    report["certificate"]["results"]["float64"]["sites"][0] |= {"path": name, "error": 1.0}
    report["learning"][OURS]["per_site"][name] = [1.0, 0.9]
    report["front"]["points"][0]["label"] = name
    report["spectra"][name] = report["spectra"].pop("encoderblock_0/mlp/fc1")
    report["recovery"] = {name: {name: 0.5}}
    return report


# ---- without a browser -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES, "everything", "hostile names"])
def test_is_valid_html_with_nothing_from_outside(case):
    made = {"everything": everything, "hostile names": lambda: with_names(EVIL)}
    report = made[case]() if case in made else make_report(**CASES[case])
    text = html(plain(report), dict.fromkeys(PLOTS, DOT))
    document = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)  # raises on any error
    ids = [node.get("id") for node in document.iter() if node.get("id")]
    assert len(ids) == len(set(ids)) > 5
    for node in document.iter():
        assert node.tag not in ("script", "iframe", "object", "embed")
        assert not [name for name in node.keys() if name.startswith("on")]  # noqa: SIM118, an element is no dict
        for name in ("src", "href"):
            assert (node.get(name) or "#").startswith(("#", "data:"))
    assert {f"#{name}" for name in ids} == {node.get("href") for node in document.iter("a")}
    assert not re.search(r"url\(|@import", text)
    assert not re.search(r">\s*(None|nan|inf)\s*<", text)


# ---- in the browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH; `apt-get install chromium` brings one")
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser and is not installed")
    with api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM)
        yield opened
        opened.close()


REPORTS = {"everything": everything, "hostile": lambda: with_names(EVIL), "long": lambda: with_names(LONG)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Returns the folder of a report by its name, written when first asked for."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            write_report(REPORTS[name](), str(folders[name]))
        return folders[name]

    return folder


@pytest.fixture
def show(browser, written):
    """Opens the page of a report; what the browser said and asked for is in `page.heard`."""
    pages = []

    def opened(name="everything", width=1200, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        page.heard = []
        page.on("console", lambda message: page.heard.append(("console", message.text)))
        page.on("pageerror", lambda error: page.heard.append(("error", str(error))))
        page.on("dialog", lambda dialog: (page.heard.append(("dialog", dialog.message)), dialog.dismiss()))
        page.on("request", lambda request: page.heard.append(("request", request.url)))
        page.goto((written(name) / "report.html").as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        return page

    yield opened
    for page in pages:
        page.close()


@pytest.mark.slow
def test_loads_quietly_alone_and_with_whole_pictures(show, written):
    page = show()
    assert page.heard == [("request", (written("everything") / "report.html").as_uri())]
    sizes = page.evaluate("[...document.images].map(one => [one.naturalWidth, one.naturalHeight, one.alt.length])")
    assert len(sizes) == 6
    assert all(min(size) > 10 and size[0] > 300 for size in sizes)
    drawn = page.evaluate("[...document.images].map(one => one.clientHeight / one.clientWidth)")
    assert drawn == pytest.approx([height / width for width, height, _ in sizes], rel=0.02)  # not squeezed
    assert page.evaluate("document.querySelectorAll('#in-short .verdict').length") == 3


def test_names_from_outside_are_only_text(show, written):
    page = show("hostile")
    assert page.heard == [("request", (written("hostile") / "report.html").as_uri())]
    for section in ("in-short", "results", "certificate", "sites", "learning", "what-ran"):
        assert "<script>alert(1)</script>" in page.inner_text(f"#{section}")


def rows(page, section, number=0):
    """Returns the cells of a table of a section, one list a row."""
    script = """([section, number]) => [...document.querySelectorAll(`#${section} table`)[number].tBodies]
        .flatMap(body => [...body.rows]).map(row => [...row.cells].map(cell => cell.innerText.trim()))"""
    return page.evaluate(script, [section, number])


def number(text):
    """Returns the first number in a text."""
    return float(re.search(r"[+-]?\d+(\.\d+)?(e-?\d+)?", text.replace("−", "-"))[0])


def test_tables_hold_the_numbers_of_report_json(show, written):
    page = show()
    report = json.loads((written("everything") / "report.json").read_text(encoding="utf-8"))
    found = rows(page, "results")
    expected = []
    for name, entry in report["metrics"].items():
        for arm, scores in {"baseline": entry["baseline"], **entry["control"], **entry["denoised"]}.items():
            expected.append((name, arm, scores, entry))
    assert len(found) == len(expected) == 12
    for row, (name, arm, scores, entry) in zip(found, expected, strict=True):
        if arm == "baseline":
            assert row[:3] == [name, "600", "baseline"] and row[5:] == ["", "", ""]
            continue
        assert row[2] == (f"{arm} *" if arm == "measured" else arm)
        assert [float(cell) for cell in row[3:5]] == pytest.approx(list(scores.values()), abs=0.06)
        told = [number(part) for part in re.split(r"[\[,]", row[5])]
        truth = [entry["difference"][f"{arm} - baseline"]["acc@1"], *entry["interval"][f"{arm} - baseline"]["acc@1"]]
        assert told == pytest.approx(truth, abs=0.06)
        p = entry["mcnemar"][f"{arm} - baseline"]
        excludes_zero = (truth[1] > 0 or truth[2] < 0) and p < 0.05
        assert row[7] == ("not significant" if not excludes_zero else "higher" if truth[1] > 0 else "lower")

    for row, site in zip(rows(page, "sites"), report["sites"], strict=True):
        assert row[0] == site["path"] and row[4] == str(site["t"][0])
        assert number(row[5]) == pytest.approx(100 * site["relative_change"][0], rel=0.01)
    certificate = report["certificate"]["results"]
    figures = [(number(row[2]), number(row[3])) for row in rows(page, "certificate")[::2]]
    assert figures == [(r["error"], r["bound"]) for r in certificate.values()]
    latencies = [number(row[3]) for row in rows(page, "cost")]
    assert latencies == pytest.approx(list(report["cost"]["latency_ms"].values()), abs=0.006)
    for index, learner in enumerate(report["learning"].values()):
        losses = [[number(cell) for cell in row[1:3]] for row in rows(page, "learning", index)]
        assert losses == list(learner["per_site"].values())
    assert [row[1:] for row in rows(page, "results", 1)] == [["93 %", "−2 %", "–"], ["–", "–", "110 %"]]
    assert "data.size = 32" in page.inner_text("#what-ran")


def test_bars_show_the_intervals(show):
    page = show()
    script = """[...document.querySelectorAll('.bar')].map(bar => [
        ...['.span', '.zero'].flatMap(name => ['x1', 'x2'].map(end => +bar.querySelector(name).getAttribute(end))),
        +bar.querySelector('circle').getAttribute('cx'), bar.parentElement.innerText, bar.getBoundingClientRect().left,
        bar.closest('table').getBoundingClientRect().left + 1e4 * [...document.querySelectorAll('table')].indexOf(
            bar.closest('table'))])"""
    bars = page.evaluate(script)
    assert len(bars) > 20
    lefts = {}
    for low, high, zero, other, at, text, left, table in bars:
        difference, first, last = (number(part) for part in re.split(r"[\[,]", text))
        assert 0 < low <= at <= high < 220 and zero == other
        assert (low <= zero <= high) == (first <= 0 <= last)
        assert (at > zero) == (difference > 0)
        lefts.setdefault(table, set()).add(left)
    assert all(len(found) == 1 for found in lefts.values())  # the zeros of a table stand below one another


OVERFLOWING = """() => {
  const wide = [...document.querySelectorAll('main *, header *, nav *')].filter(one =>
    !one.closest('.scroll .scroll, svg') && !one.parentElement.closest('.scroll:not(:has(.compared))') &&
    (one.getBoundingClientRect().right > innerWidth + 1 || one.getBoundingClientRect().left < -1));
  const clipped = [...document.querySelectorAll('h1, h2, h3, p, pre, summary, a')].filter(one =>
    one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).display !== 'inline');
  return [...new Set([...wide, ...clipped])].map(one => `${one.tagName}.${one.className}: ${one.innerText?.slice(0, 40)}`);
}"""


@pytest.mark.parametrize("width", [320, 400, 1200])
@pytest.mark.parametrize("name", ["everything", "long"])
def test_text_fits_the_screen(width, name, show):
    page = show(name, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if name == "everything" or width < 1200:  # on a wide screen a table of such names scrolls by itself
        assert page.evaluate(OVERFLOWING) == []
    page.evaluate("document.querySelector('style').remove()")
    if name == "long":
        assert page.evaluate("document.documentElement.scrollWidth") > width  # so it is the style that makes it fit


CONTRAST = """name => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const numbers = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = colour => numbers(colour).slice(0, 3).map(v => v / 255).map(v =>
    v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const element = document.querySelector(name);
  let behind = element;
  while (behind.parentElement && numbers(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const [a, b] = [light(getComputedStyle(element).color), light(getComputedStyle(behind).backgroundColor)];
  return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), b];
}"""


def test_light_and_dark_follow_the_reader(show):
    backs = {}
    for scheme in ("light", "dark"):
        page = show(scheme=scheme)
        for name in (
            "body p",
            ".byline",
            ".word.higher",
            ".word.lower",
            ".verdict.higher",
            ".verdict.lower",
            "a",
            "pre",
        ):
            ratio, back = page.evaluate(CONTRAST, name)
            assert ratio > 4.5, (scheme, name)
            backs.setdefault(scheme, []).append(back)
    assert min(backs["light"]) > 0.7 and max(backs["dark"]) < 0.1
