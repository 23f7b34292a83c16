"""Export of fused backbones: files of this project, foreign formats, compiled programs."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from drep_jax import weights
from drep_jax.core.certificate import Certificate, certify
from drep_jax.core.denoisers import Denoisers
from drep_jax.core.fusion import fuse_variables_exact, survival
from drep_jax.errors import CheckpointError, ConfigError, ExportError, did_you_mean
from drep_jax.exporting.checked_file import Comparison
from drep_jax.exporting.fold_batchnorm import find_folds, fold_batchnorm
from drep_jax.exporting.fold_certificate import certify_folds
from drep_jax.exporting.onnx_file import export_onnx
from drep_jax.exporting.stablehlo import export_stablehlo
from drep_jax.exporting.statistics import MixedStatistics, Statistics
from drep_jax.files import expanded
from drep_jax.progress import pulsing
from drep_jax.run.backbone import init_options
from drep_jax.run.inputs import certificate_images, resized, sizes_of
from drep_jax.run.run import Run
from drep_jax.run.setup import Setup
from drep_jax.typing import Config, Tree
from drep_jax.weights.formats import formats_of

DTYPES = ("bfloat16", "float16", "float32", "float64")
"""Types that fused weights can be stored in."""

SAME = "same"
"""The export in the format that the backbone came in."""

PROGRAMS: dict[str, Callable[..., Comparison]] = {"stablehlo": export_stablehlo, "onnx": export_onnx}
"""Exports of the network with its weights; add one by a line here."""


@dataclasses.dataclass(frozen=True)
class Output:
    """What to write, and where.

    Attributes:
      directory: made if absent.
      dtype: storage type of new files; None keeps the type of each parameter.
      allow_rounding: whether to write even if less than 90 % of the change survives the storage
        type.
      forms: further files: "same", names of formats, or names of `PROGRAMS`.
      init_from: the file of the backbone's weights, if it moved since the run.
      init_names: its name table, if it moved.
      fold_batchnorm: whether to fold scale and shift of BatchNorms into the layers before them.
      statistics: what BatchNorms of exported programs mix with their trained statistics, or None.
    """

    directory: str
    dtype: str | None = None
    allow_rounding: bool = False
    forms: tuple[str, ...] = ()
    init_from: str | None = None
    init_names: str | None = None
    fold_batchnorm: bool = False
    statistics: Statistics | None = None

    def __post_init__(self) -> None:
        """Refuses an unknown storage type, and statistics that nothing is written with."""
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f'Unknown storage type "{self.dtype}".{did_you_mean(self.dtype, DTYPES)}')
        if self.statistics is None:
            return
        if not any(form in PROGRAMS for form in self.forms):
            raise ConfigError(
                f"--statistics={self.statistics} changes the program, and weights alone are the same with it: add "
                f"--export={' or '.join(PROGRAMS)}."
            )
        if self.fold_batchnorm:
            raise ConfigError(
                f"--fold_batchnorm makes BatchNorms constants, so --statistics={self.statistics} has nothing to mix with: "
                "leave one of the two out."
            )

    def network(self, backbone: nn.Module) -> nn.Module | MixedStatistics:
        """Returns what exported programs compute."""
        return backbone if self.statistics is None else MixedStatistics(backbone, self.statistics)

    def program(self, form: str) -> str:
        """Returns the path of an exported program; one with mixed statistics has a name of its own."""
        kind = "" if self.statistics is None else f"_{self.statistics.over}_{self.statistics.alpha:g}"
        return os.path.join(self.directory, f"fused{kind}.{form}")


def fuse_and_certify(run: Run, variables: Tree, denoisers: Denoisers) -> tuple[Tree, Certificate]:
    """Returns fused variables, rounded once to their own types, and their certificate at every size asked for.

    Behind a pre-trained encoder stands a probe, which may read differences of features far smaller than
    the features. Then these are compared, and the probe must be the very same numbers.
    """
    setup = run.setup
    sizes = sizes_of(run.config)
    with pulsing("fusion and certificate", 2 + len(sizes), "step", shown=run.config["progress"]) as steps:
        fused = fuse_variables_exact(variables, denoisers, setup.sites, setup.schedule)
        steps.update(text="fused")
        images = certificate_images(run.config, setup, run.directory)
        sites, schedule = setup.sites, setup.schedule
        probed = has_probe(run.config, setup)
        backbone = setup.headless if probed else setup.backbone
        base, deployed = (_without_head(tree) if probed else tree for tree in (variables, fused))
        given = {"fused": deployed["params"], "fused_statistics": deployed.get("batch_stats")}
        heads = [tree["params"]["head"] for tree in (variables, fused)] if probed else []

        def at(images: jax.Array, size: str) -> Certificate:
            certificate = certify(backbone, base, denoisers, sites, schedule, images, **given)
            steps.update(text=f"certificate{size}")
            if not probed:
                return certificate
            same = all(np.array_equal(heads[0][name], heads[1][name]) for name in heads[0])
            return dataclasses.replace(certificate, structure={**certificate.structure, "same_probe": same})

        others = {name: at(resized(images, size), f" at {name}") for name, size in sizes.items()}
        return fused, dataclasses.replace(at(images, ""), sizes=others)


def has_probe(config: Config, setup: Setup) -> bool:
    """Returns whether the head is the probe of a pre-trained encoder, and no site reads what it reads."""
    layers = {layer.path for site in setup.sites for layer in site.layers}
    pretrained = config["pretrain"]["steps"] and not config["backbone"]["steps"] and not config["backbone"]["init_from"]
    return bool(pretrained) and "head" in setup.abstract["params"] and ("head",) not in layers


def _without_head(variables: Tree) -> Tree:
    return {**variables, "params": {name: leaf for name, leaf in variables["params"].items() if name != "head"}}


def open_original(run: Run, variables: Tree, output: Output) -> weights.Foreign | None:
    """Checks all requested forms; reads the foreign file of the backbone if an export needs it.

    Args:
      run: a finished run.
      variables: of the run's backbone.
      output: what to write.

    Raises:
      ConfigError: for an unknown form, or "same" without a foreign file.
      CheckpointError: if the file does not hold the run's backbone.
    """
    if (output.init_from or output.init_names) and not output.forms:
        option = (
            "--init_from names the file to write again" if output.init_from else "--init_names names its name table"
        )
        raise ConfigError(f"{option}, so it goes with --export only.")
    options = init_options(run.config)
    options["names"] = expanded(output.init_names or "") or options["names"]
    files = [form for form in output.forms if form not in PROGRAMS]  # programs need no file of the backbone
    table = _table(options["names"]) if files else ()
    for form in output.forms:
        if form != SAME:
            _check_form(run.setup, form, table)
    path = expanded(output.init_from or run.config["backbone"]["init_from"])
    foreign = bool(path) and not weights.is_native(path)
    if SAME in output.forms and not foreign:
        raise ConfigError(
            "This run's backbone is from no foreign file, so --export=same has nothing to write again; name a format: "
            f"{', '.join(_forms(run.setup, table))}."
        )
    if not files or not foreign:
        return None
    original = weights.load_foreign(
        path, run.setup.backbone, run.setup.abstract, fresh=lambda: variables, **{**options, "names": table}
    )
    if weights.digest(original.variables) != weights.digest(variables):
        raise CheckpointError(
            f"The weights in {path} are not the backbone of this run; give the file that it was read from with --init_from."
        )
    if SAME in output.forms or original.format.name in output.forms:
        weights.check_can_write_back(original, _fused_leaves(run.setup))
    return original


def _fused_leaves(setup: Setup) -> set[str]:
    """Returns the paths, with their collection, of all leaves that fusion may change."""
    changed = [layer for site in setup.sites for layer in site.layers]
    layers = {"/".join(("params", *layer.path)) for layer in changed}
    means = {"/".join(("batch_stats", *layer.norm, "mean")) for layer in changed if layer.norm is not None}
    return {name for name in weights.names_of(setup.abstract) if name.rpartition("/")[0] in layers or name in means}


def _table(where: str) -> tuple[weights.Format, ...]:
    """Returns the formats of a run's name table."""
    if not where:
        return ()
    try:
        return weights.read_table(where)
    except ConfigError as error:
        raise ConfigError(f"{error} This is the name table of the run's weights: give it with --init_names.") from error


def needs_exact(output: Output, original: weights.Foreign | None) -> bool:
    """Returns whether a storage type differs from the parameters', which needs float64 weights."""
    return output.dtype is not None or (original is not None and original.rounds)


def _forms(setup: Setup, table: Sequence[weights.Format]) -> list[str]:
    """Returns the names of all exports of a backbone."""
    return [SAME, *formats_of(setup.backbone, table), *PROGRAMS]


def _check_form(setup: Setup, form: str, table: Sequence[weights.Format]) -> None:
    if form not in (forms := _forms(setup, table)):
        raise ConfigError(f'There is no export "{form}" for this backbone.{did_you_mean(form, forms)}')


def write(
    output: Output,
    setup: Setup,
    variables: Tree,
    fused: Tree,
    fusion: Mapping[str, Any],
    *,
    exact: Tree | None = None,
    original: weights.Foreign | None = None,
    images: jax.Array | None = None,
) -> list[str]:
    """Writes the backbone with fused weights: `orbax/`, `fused.safetensors`, requested exports.

    Args:
      output: what to write.
      setup: of the run.
      variables: of the unfused backbone.
      fused: its fused variables.
      fusion: rule, steps and strength of fusion; recorded in the files.
      exact: fused variables in float64; needed if a storage type is narrower.
      original: the foreign file of the backbone.
      images: on which the folding of BatchNorms is certified.

    Returns:
      The paths.

    Raises:
      CheckpointError: if rounding would lose more than 10 % of the change, or the directory is not
        writable.
      ExportError: if BatchNorms cannot be folded, or the outputs of a program differ from the
        network's.
    """
    exact = fused if exact is None else exact
    if output.dtype is not None:
        stored = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf).astype(output.dtype), exact["params"])
        _check_survival(output, output.dtype, variables, exact, {**exact, "params": stored})
    again = original is not None and any(form in (SAME, original.format.name) for form in output.forms)
    if original is not None and again and original.rounds:
        stored = weights.stored_tree(original, exact)
        _check_survival(output, original.source.path, variables, exact, stored)
    full = exact
    if output.fold_batchnorm:
        full = _folded(setup, fused, full, images)
    everything = jax.tree_util.tree_map(lambda new, old: np.asarray(new).astype(old.dtype), full, dict(variables))
    if output.dtype is not None:
        everything["params"] = jax.tree_util.tree_map(
            lambda leaf: np.asarray(leaf).astype(output.dtype), full["params"]
        )
    fusion = {**fusion, "sites": {site.name: [*site.times] for site in setup.sites}}
    try:
        os.makedirs(output.directory, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"Cannot write weights to {output.directory}: {error.strerror}.") from error
    paths = [os.path.join(output.directory, name) for name in ("fused.safetensors", "orbax")]
    weights.save_safetensors(paths[0], everything, fusion)
    weights.save_orbax(paths[1], everything, fusion)
    for form in dict.fromkeys(output.forms):
        if original is not None and form in (SAME, original.format.name):
            path = os.path.join(output.directory, weights.fused_name(original))
            count = len(weights.write_back(original, path, variables, weights.stored_tree(original, full), fusion))
            shards = original.source.shards
            what = f"the original file's {len(shards.paths)} shards" if shards else "the original file"
            print(f"{path}: {what} with {count} of its tensors replaced.")
            for remark in weights.remarks_on(original, variables, full):
                print(f"  {remark}")
        elif form in PROGRAMS:
            path, network = output.program(form), output.network(setup.backbone)
            print(f"{path}: {PROGRAMS[form](network, everything, setup.images.shape[1:3], path)}")
        else:
            path = os.path.join(output.directory, f"fused_{form}")
            path = weights.write_new(setup.backbone, everything, form, path, fusion)
        paths.append(path)
    return paths


def _folded(setup: Setup, fused: Tree, exact: Tree, images: Any) -> Tree:
    """Returns exact variables with BatchNorms folded; prints the rounded variables' certificate."""
    folds = find_folds(setup.backbone, images)
    certificate = certify_folds(setup.backbone, fused, folds, images)
    print(certificate)
    if not certificate.passed:
        raise ExportError("Folding BatchNorm changes what the network computes here; nothing was written.")
    # The statistics become constants, which are exact in their own type only.
    return {
        **fold_batchnorm(exact, folds, round_back=False),
        "batch_stats": fold_batchnorm(fused, folds)["batch_stats"],
    }


def _fusible(variables: Tree) -> Tree:
    """Returns what fusion may change, with the parameters' own names."""
    return {**variables["params"], "(running statistics)": variables.get("batch_stats", {})}


def _check_survival(output: Output, where: str, before: Tree, exact: Tree, stored: Tree) -> None:
    """Prints the fraction of the change that a storage type keeps; refuses less than 90 %."""
    surviving = survival(*(_fusible(tree) for tree in (before, exact, stored)))
    print(
        f"Stored as {where}, {100 * surviving.fraction:.1f} % of the change survives (worst: {surviving.worst_layer})."
    )
    if surviving.fraction < 0.9 and not output.allow_rounding:
        raise CheckpointError(
            f"Storing as {where} rounds away {100 * (1 - surviving.fraction):.0f} % of what fusion changed; the network "
            "would be the backbone with rounding noise. Keep float32, or insist with --allow_rounding."
        )
