"""Shared by the plots: colors, axes, and a figure as PNG bytes."""

import io
import warnings
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colors, distinct with any color vision; markers differ too.
BLUE, RED, GRAY = "#0072B2", "#D55E00", "#555555"
COLORS = (BLUE, RED, "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("D", "X", "*", "p", "h", "8")

NAME = 24
"""Longest name that fits in a plot, in characters."""


def png(figure: Figure) -> bytes:
    """Returns a figure drawn with Agg, without global state.

    The same figure gives the same bytes.
    """
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A folder may be named in a script that the font lacks.
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def styled(axes: Any, grid: str) -> Any:
    """Returns the axes with two spines and a light grid in x, y or both."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def shortened(name: str, most: int) -> str:
    """Returns the last `most` characters of a longer name.

    >>> shortened("encoderblock_11/mlp/fc1", 12)
    '…_11/mlp/fc1'
    """
    return name if len(name) <= most else "…" + name[1 - most :]
