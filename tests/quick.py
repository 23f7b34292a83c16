"""`pytest --quick`: all tests but the long ones, in two minutes on two cores.

`tests/long_tests.txt` lists what takes more than a second of a processor: tests, and fixtures, whose tests are all left
out. What is not listed runs, so a new test does. `pytest --list-long` renews the list.
"""

import os
import pathlib

import pytest

LIST = pathlib.Path(__file__).with_name("long_tests.txt")
LIMIT = 1.0  # seconds
TEST, FIXTURE = "test", "fixture"


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help=f"leave out what tests/{LIST.name} lists")
    parser.addoption("--list-long", action="store_true", help=f"write what takes more than {LIMIT:g} s to that list")


def pytest_configure(config):
    if config.getoption("--list-long"):
        config.pluginmanager.register(Measuring(), "measuring of long tests")
        if not hasattr(config, "workerinput"):  # not in the workers of pytest-xdist
            config.pluginmanager.register(Listing(), "listing of long tests")


def leave_out_long(config, items):
    """Deselects the long tests if --quick is given."""
    if not config.getoption("--quick"):
        return
    lines = {tuple(line.split()) for line in LIST.read_text(encoding="utf-8").splitlines()}

    def is_long(item):
        places = (f"{item.nodeid.partition('::')[0]}::", "")
        used = {(FIXTURE, place + name) for place in places for name in item.fixturenames}
        return (TEST, without_case(item.nodeid)) in lines or not lines.isdisjoint(used)

    config.hook.pytest_deselected(items=[item for item in items if is_long(item)])
    items[:] = [item for item in items if not is_long(item)]


def without_case(name):
    """The name of a test function, without its parameters."""
    return name.partition("[")[0]


# ---- measuring, if --list-long is given -------------------------------------------------------------------------------


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
