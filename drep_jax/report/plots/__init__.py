"""The plots of a report as PNG files in memory."""

from collections.abc import Callable, Mapping
from typing import Any

from drep_jax.report.plots.accuracy import plot_accuracy
from drep_jax.report.plots.boxes import plot_boxes
from drep_jax.report.plots.examples import plot_examples
from drep_jax.report.plots.front import plot_front
from drep_jax.report.plots.loss import plot_loss
from drep_jax.report.plots.overlays import plot_overlays
from drep_jax.report.plots.pretraining import plot_filters, plot_probe_curve, plot_reconstructions
from drep_jax.report.plots.ranked import plot_ranked
from drep_jax.report.plots.sites import plot_sites
from drep_jax.report.plots.spectra import plot_spectra

PLOTS: dict[str, Callable[[Mapping[str, Any]], bytes | None]] = {
    "accuracy": plot_accuracy,
    "loss": plot_loss,
    "sites": plot_sites,
    "spectra": plot_spectra,
    "front": plot_front,
    "examples": plot_examples,
    "overlays": plot_overlays,
    "boxes": plot_boxes,
    "ranked": plot_ranked,
    "probe_curve": plot_probe_curve,
    "reconstructions": plot_reconstructions,
    "filters": plot_filters,
}
"""NAME ↦ function that draws plots/NAME.png, or returns None if there is nothing to show."""
