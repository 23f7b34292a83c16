"""What the benchmarks share: a command line with --tiny, the network of that size, and processes of their own.

With --tiny every script does all of its work at the smallest sizes, in this process and in about a
second. Its figures then mean nothing: tests/test_benchmarks.py runs it so, that no script can rot.
"""

import argparse
import contextlib
import io
import subprocess
import sys
from collections.abc import Callable, Sequence

TINY_PIXELS = 16


class Parser(argparse.ArgumentParser):
    """A command line with the flag --tiny, which replaces the defaults of other options."""

    def __init__(self, description: str | None, **tiny: object) -> None:
        """Makes a command line.

        Args:
          description: of the script, as it is written.
          **tiny: option ↦ its default with --tiny; options on the command line still count.
        """
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--tiny", action="store_true", help="the smallest sizes, which show that the script runs")
        self._tiny = tiny

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """Returns the options of `args`, or of the command line."""
        args = sys.argv[1:] if args is None else list(args)
        if "--tiny" in args:
            if unknown := self._tiny.keys() - {action.dest for action in self._actions}:
                raise ValueError(f"--tiny sets options that there are not: {sorted(unknown)}")
            self.set_defaults(**self._tiny)
        return super().parse_args(args, namespace)


def network(name: str, tiny: bool, pixels: int = 224, num_classes: int = 1000):
    """Returns a backbone and the side of its images: the registered one, or with tiny a block of a ViT."""
    from drep_jax.models import create_model

    if not tiny:
        return create_model(name, num_classes=num_classes, image_size=(pixels, pixels)), pixels
    sizes = {"patch_size": 8, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24}
    return create_model("vit", num_classes=num_classes, image_size=(TINY_PIXELS,) * 2, **sizes), TINY_PIXELS


def printed_by(main: Callable[[Sequence[str]], object], script: str, arguments: Sequence[str], tiny: bool) -> str:
    """Returns what a script prints, run in a process of its own, or with tiny in this one.

    Args:
      main: of the script.
      script: its file.
      arguments: of its command line.
      tiny: whether --tiny was given.
    """
    if not tiny:
        return subprocess.run(
            [sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main([*arguments, "--tiny"])
    return output.getvalue()
