"""report.html: the blocks of a report as one self-contained page."""

import base64
import math
import struct
from collections.abc import Mapping
from typing import Any

import jinja2

from drep_jax.report.blocks import Table, as_text
from drep_jax.report.comparisons import Comparison
from drep_jax.report.sections import sections

BAR_WIDTH = 220
"""Width of the drawing of an interval, in pixels."""
_MARGIN = 6


def html(report: Mapping[str, Any], plots: Mapping[str, bytes]) -> str:
    """Returns report.html for a complete report, with the plots (name ↦ PNG) embedded."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("drep_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"text": as_text, "kind": lambda value: type(value).__name__}
    page = environment.get_template("page.html.jinja")
    pictures = {name: _picture(image) for name, image in plots.items()}
    return page.render(
        report=report, sections=sections(report), pictures=pictures, scale=scale, bar=bar, width=BAR_WIDTH
    )


def _picture(image: bytes) -> dict[str, Any]:
    width, height = struct.unpack(">II", image[16:24])  # the size field of the PNG header
    return {"source": f"data:image/png;base64,{base64.b64encode(image).decode()}", "width": width, "height": height}


def scale(table: Table) -> tuple[float, float] | None:
    """Returns the range that holds zero and every finite end of the table's intervals.

    None without intervals.
    """
    intervals = [cell.interval for row in table.rows for cell in row if isinstance(cell, Comparison)]
    if not intervals:
        return None
    ends = [end for one in intervals for end in (one.low, one.difference, one.high) if math.isfinite(end)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    return (low, high) if high > low else (-1.0, 1.0)


def bar(row: Comparison, limits: tuple[float, float]) -> dict[str, float]:
    """Returns where an interval's ends, its difference and zero are, in pixels from the left."""
    low, high = limits

    def place(value: float) -> float:
        fraction = (min(max(value, low), high) - low) / (high - low)
        return round(_MARGIN + fraction * (BAR_WIDTH - 2 * _MARGIN), 1)

    interval = row.interval
    difference = 0.0 if math.isnan(interval.difference) else interval.difference
    return {"low": place(interval.low), "high": place(interval.high), "at": place(difference), "zero": place(0.0)}
