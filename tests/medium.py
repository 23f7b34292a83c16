"""The marker `medium`: what `make test` leaves out to take two minutes on two cores.

`tests/medium.txt` lists what takes more than half a second of a processor: tests, and fixtures, which mark all tests that use
them. A test that is not listed has no marker. `pytest --list-medium` runs the tests and renews the list.
"""

import os
import pathlib

import pytest

LIST = pathlib.Path(__file__).with_name("medium.txt")
LIMIT = 0.5  # seconds
TEST, FIXTURE = "test", "fixture"


def pytest_addoption(parser):
    text = f"write to tests/{LIST.name} what takes more than {LIMIT:g} s of a processor"
    parser.addoption("--list-medium", action="store_true", help=text)


def pytest_configure(config):
    if config.getoption("--list-medium"):
        config.pluginmanager.register(Measuring(), "measuring of medium tests")
        if not hasattr(config, "workerinput"):  # not in the workers of pytest-xdist
            config.pluginmanager.register(Listing(), "listing of medium tests")


def mark(items):
    """Marks the tests that the list names, or one of whose fixtures it names."""
    lines = {tuple(line.split()) for line in LIST.read_text(encoding="utf-8").splitlines()}
    for item in items:
        places = (f"{item.nodeid.partition('::')[0]}::", "")
        used = {(FIXTURE, place + name) for place in places for name in item.fixturenames}
        if (TEST, without_case(item.nodeid)) in lines or not lines.isdisjoint(used):
            item.add_marker("medium")


def without_case(name):
    """The name of a test function, without its parameters."""
    return name.partition("[")[0]


# ---- measuring, if --list-medium is given -------------------------------------------------------------------------------


def processor_seconds():
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def measured(item, kind, name):
    """Runs a hook around what it measures, and notes that for the report of `item`."""
    began = processor_seconds()
    try:
        return (yield)
    finally:
        if (taken := processor_seconds() - began) > LIMIT:
            item.user_properties.append((kind, name, taken))


class Measuring:
    """Measures fixtures and tests where they run."""

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        place = f"{fixturedef.baseid}::" if fixturedef.baseid.endswith(".py") else ""
        kind = TEST if fixturedef.scope == "function" else FIXTURE
        name = without_case(request._pyfuncitem.nodeid) if kind == TEST else place + fixturedef.argname
        return (yield from measured(request._pyfuncitem, kind, name))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        return (yield from measured(item, TEST, without_case(item.nodeid)))


class Listing:
    """Writes the list when all tests have run."""

    def __init__(self):
        self.lines = set()

    def pytest_runtest_logreport(self, report):
        self.lines |= {f"{kind} {name}" for kind, name, _ in report.user_properties if kind in (TEST, FIXTURE)}

    def pytest_sessionfinish(self):
        LIST.write_text("".join(f"{line}\n" for line in sorted(self.lines)), encoding="utf-8")
