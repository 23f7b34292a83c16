"""Shared by `train.py` and `fuse.py`: flags, and errors as messages that name the nearest option."""

import codecs
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from drep_jax.cli import machine
from drep_jax.cli.help import HELP, usage
from drep_jax.errors import ConfigError, DrepError, did_you_mean
from drep_jax.files import expanded
from drep_jax.imports import import_module
from drep_jax.parallel.session import end_process
from drep_jax.run.config import announce, new_names, renamed
from drep_jax.run.workdir import flatten
from drep_jax.training.signals import Interrupted, Terminated, raising_on_sigterm

EXIT_ERROR = 1


EXIT_PREEMPTED = 75
"""Exit status after SIGTERM, "try again" in sysexits.h: the same command resumes the run."""


EXIT_INTERRUPTED = 130


class Flags:
    """The configuration and the work directory of the command line.

    Attributes:
      default: configuration file if the command line names none.
      explicit: whether the command line names one.
    """

    def __init__(self, default: str) -> None:
        self.default = default
        # Without a default the flag is parsed with the others, so that errors in it can be
        # explained.
        self._config = config_flags.DEFINE_config_file(
            "config",
            None,
            "Configuration file; --config.x.y=value overrides an entry.",
            lock_config=False,  # entries that there are not yet are accepted here, and checked in `check_overrides`
            accept_new_attributes=True,
        )
        self._workdir = flags.DEFINE_string(
            "workdir",
            None,
            "Directory of the run, written to and resumed from; by default runs/<name of the configuration>.",
        )
        self.explicit = any(re.match("--?config(=|$)", argument) for argument in sys.argv[1:])
        if not self.explicit:
            sys.argv.insert(1, f"--config={default}")
        # ml_collections refuses names that the configuration does not have.
        sys.argv[1:] = with_new_names(sys.argv[1:])

    @property
    def value(self) -> config_dict.ConfigDict:
        """The configuration.

        Raises:
          ConfigError: if there is no such file.
        """
        path = self.source
        if not os.path.isfile(path.partition(":")[0]):
            folder = os.path.dirname(path) or "."
            near = [os.path.join(folder, name) for name in os.listdir(folder)] if os.path.isdir(folder) else []
            raise ConfigError(f"There is no configuration {path}.{did_you_mean(path, near)}")
        values, old_names = renamed(self._config.value.to_dict(), keep=self.overrides)
        for name in old_names:  # set by the configuration file
            announce(name)
        return config_dict.ConfigDict(values) if old_names else self._config.value

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings given on the command line, {"a.b": value}."""
        return config_flags.get_override_values(flags.FLAGS["config"])

    def check_overrides(self) -> None:
        """Refuses settings that the configuration file does not have, but for options of the model, and locks it.

        Raises:
          ConfigError: naming the setting.
        """
        path, *argument = self.source.split(":", 1)
        known = flatten(import_module(path).get_config(*argument).to_dict())
        sections = {name[:end] for name in known for end in range(len(name)) if name[end] == "."}
        for name in self.overrides:
            if name not in known and name not in sections and not re.fullmatch(r"model\.\w+", name):
                section, _, last = name.rpartition(".")
                siblings = {
                    k.removeprefix(f"{section}.").partition(".")[0] for k in known if k.startswith(f"{section}.")
                }
                if section and not siblings:
                    section, last = "", section.partition(".")[0]
                options = siblings if section else {k.partition(".")[0] for k in known}
                near = did_you_mean(last, options)
                hint = near if "Did you mean" in near else " configs/default.py lists them all."
                raise ConfigError(f'Unknown setting "{last}".{hint}')
        self._config.value.lock()

    @property
    def source(self) -> str:
        """The configuration file."""
        flag: Any = flags.FLAGS["config"]
        return flag.config_filename

    @property
    def workdir(self) -> str | None:
        """The work directory, or None."""
        return None if self._workdir.value is None else expanded(self._workdir.value)


def define_config(default: str) -> Flags:
    """Defines --workdir, and --config with a default relative to the script."""
    return Flags(os.path.join(os.path.dirname(sys.argv[0]), default))


def with_new_names(arguments: list[str]) -> list[str]:
    """Returns command-line arguments with the current names of settings.

    Prints a line for every old name.
    """

    def current(argument: str) -> str:
        option, equals, value = argument.partition("=")
        flag, name = option[: (cut := option.find(".") + 1)], option[cut:]
        if flag not in ("--config.", "-config.") or name not in new_names():
            return argument
        announce(name)
        return f"{flag}{new_names()[name]}{equals}{value}"

    return [current(argument) for argument in arguments]


def absl_main(main: Callable[[list[str]], int], *, resume: str, config: Flags | None = None) -> int:
    """Runs `main` under absl, with errors as messages on standard error.

    Args:
      main: function of the remaining command line that returns the exit status.
      resume: the command that resumes an interrupted run.
      config: flags of a script with a configuration, for --help.

    Returns:
      The exit status: that of `main`, 1 for bad input, 130 after Ctrl-C, 75 after SIGTERM.
    """
    write_any_text()
    machine.choose_cache()
    machine.allow_promotion()
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="ml_collections")

    # Orbax logs every save, and tracebacks of errors that are reported here.
    logging.set_verbosity(logging.FATAL)

    def guarded(argv: list[str]) -> int:
        try:
            if argv[1:]:
                raise flags.Error(f"Unexpected argument {argv[1]!r}; every option starts with --.")
            with raising_on_sigterm(lambda: end_process(terminated())):
                return main(argv)
        except Interrupted as error:
            status = EXIT_INTERRUPTED if error.number == signal.SIGINT else EXIT_PREEMPTED
            return _say(f"\n{error}\nTo go on: {resume}", status)
        except KeyboardInterrupt:
            return _say(f"\nStopped by Ctrl-C. To go on from the last checkpoint: {resume}", EXIT_INTERRUPTED)
        except Terminated:
            return terminated()
        except (DrepError, flags.Error) as error:
            return _say(f"Error: {error}", EXIT_ERROR)
        except (OSError, MemoryError, RuntimeError) as error:
            if explanation := machine.explained(error):
                return _say(f"Error: {explanation}", EXIT_ERROR)
            raise

    def terminated() -> int:
        return _say(f"\nStopped by SIGTERM. To go on from the last checkpoint: {resume}", EXIT_PREEMPTED)

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            if config is not None and os.path.isfile(config.source.partition(":")[0]):
                config.check_overrides()
            return rest
        except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError) as error:
            sys.exit(_say(f"Error: {_explain(error)}", EXIT_ERROR))

    if help_arguments := [argument for argument in sys.argv[1:] if argument in HELP]:
        doc = machine.docstring_of(main.__globals__)
        if config is None:
            print(usage(doc, None))
            return 0
        parse([argument for argument in sys.argv if argument not in help_arguments])
        try:
            print(usage(doc, config.value.to_dict(), config.source))
        except DrepError as error:
            return _say(f"Error: {error}", EXIT_ERROR)
        return 0
    _hide_late_reports()
    try:
        app.run(guarded, flags_parser=parse)
    except SystemExit as end:
        return int(end.code or 0) if not isinstance(end.code, str) else EXIT_ERROR
    return 0


def write_any_text() -> None:
    """Makes the output streams take any text: where their encoding lacks a character, something like it is written."""
    codecs.register_error("drep_jax.similar", _similar)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not one that is closed, or that a test has put there
            stream.reconfigure(errors="drep_jax.similar")


SIMILAR = {"–": "-", "—": "-", "−": "-", "×": "x", "·": "*", "…": "...", "±": "+-", "≤": "<=", "≥": ">=", "→": "->"}
SIMILAR |= {
    "≡": "=",
    "≠": "!=",
    "≈": "~",
    "“": '"',
    "”": '"',
    "’": "'",
    "α": "alpha",
    "β": "beta",
    "σ": "sigma",
    "λ": "lambda",
}


def _similar(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    written = "".join(SIMILAR.get(letter) or letter.encode("ascii", "backslashreplace").decode() for letter in text)
    return written, error.end


def _hide_late_reports() -> None:
    """Hides reports of Orbax's threads to an event loop that a failure has closed."""
    report = sys.unraisablehook
    if getattr(report, "__name__", "") == "_unless_late":  # hidden by an earlier call
        return

    def _unless_late(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            report(unraisable)

    sys.unraisablehook = _unless_late


def _explain(error: BaseException) -> str:
    """Returns the error in the command line.

    Ml_collections wraps its text in several layers of quotes.
    """
    text = str(error.args[0] if error.args else error).replace("\\n", " ").replace("\n", " ").replace("\\", "")
    if raised := re.search(r"drep_jax\.errors\.\w+: (.*)$", text):  # by the configuration
        return raised.group(1).strip()
    if isinstance(error, (KeyError, AttributeError)):
        name = re.search(r"['\"](\w+)['\"]", text)
        near = re.search(r'Did you mean "(\w+)"', text)
        if name:
            return f'Unknown setting "{name.group(1)}".' + (
                f' Did you mean "{near.group(1)}"?' if near else " configs/default.py lists them all."
            )
    return text


def _say(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status
