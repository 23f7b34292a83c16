"""Finding the state dict in a checkpoint: which entry of a wrapper holds it, and which prefix all of its names have."""

import re
from collections import Counter
from collections.abc import Iterable

from drep_jax.errors import CheckpointError, did_you_mean
from drep_jax.weights.files.contents import Path, full_name

# Entries that hold a state, the preferred first: averaged weights before plain ones, as timm does.
AVERAGED = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "model_ema_state_dict",
    "ema_model",
    "ema",
    "params_ema",
    "teacher",
)
PLAIN = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "module",
    "params",
    "weights",
    "backbone",
    "student",
)
# Entries whose tensors are not the weights of a network.
BESIDES = re.compile(
    r"(.*_)?(optim\w*|sched\w*|lr_schedul\w*|scaler|amp|rng\w*|loss\w*|criterion|callbacks|loops)(_.*)?"
)
PREFIXES = ("module", "_orig_mod", "model", "backbone", "encoder", "base", "teacher", "student")
# What may stand beside a prefixed network without belonging to it. Where anything else does, the
# prefix is the network's own: the blocks of torchvision's ViT are "encoder.layers…", beside
# "conv_proj" and "class_token".
ENDS = re.compile(
    r".*head.*|fc|classifier|.*decoder.*|neck.*|projector|predictor|projection|queue.*|criterion|loss.*|logit_scale|"
    r"mask_token|bottleneck.*|aux.*|pixel_mean|pixel_std|n_averaged|center"
)


def find_state(where: str, paths: Iterable[Path], state: str | None) -> tuple[dict[str, Path], list[str]]:
    """Finds the names of the network among all tensors of a file.

    Args:
      where: what errors call the file.
      paths: of all its tensors.
      state: the entry (or entries, with "/" between) of a wrapper, or the prefix, to take; None:
        the usual one.

    Returns:
      {name without wrappers and prefix: path}, and sentences that say what was recognized.

    Raises:
      CheckpointError: if `state` is not there, or no entry or several could be meant.
    """
    paths = list(paths)
    if not paths:
        raise CheckpointError(f"{where} holds no tensors.")
    found: list[str] = []
    inside: Path = ()
    named: set[str] = set()
    pending = state
    if state and (start := _entry(paths, tuple(state.split("/")))) is not None:
        inside, pending = start, None
        found.append(f'state under "{full_name(inside)}"')
    chosen = [path for path in paths if path[: len(inside)] == inside]
    while nested := _groups(chosen, len(inside)):
        known = [name for name in AVERAGED + PLAIN if name in nested]
        if not known and any(len(path) == len(inside) + 1 for path in chosen):
            break  # a flat state dict
        states = known or [name for name in nested if not BESIDES.fullmatch(name)]
        if not known and len(states) != 1:
            if pending:
                raise CheckpointError(f'{where} has no state "{pending}".{did_you_mean(pending, nested)}')
            raise CheckpointError(
                f"{where} holds tensors under {_listed(nested)}; say which of them are the weights (state=…)."
            )
        inside = (*inside, states[0])
        chosen = [path for path in chosen if path[: len(inside)] == inside]
        named.update(states)
        also = f" (also there: {_listed(states[1:])})" if len(states) > 1 else ""
        found.append(f'state under "{full_name(inside)}"{also}')
    names = {full_name(path[len(inside) :]): path for path in chosen if len(path) == len(inside) + 1}
    names, prefixes, pending = _without_prefixes(names, pending, found)
    if pending:
        options = {*_groups(paths, 0), *(name.partition(".")[0] for name in names if "." in name)}
        raise CheckpointError(f'{where} has no state "{pending}".{did_you_mean(pending, options)}')
    beside = sorted({path[0] for path in paths if inside and path[0] not in (*named, inside[0])})
    if beside:
        found.append(f"tensors beside it: {_listed(beside)}")
    if prefixes:
        found.append(f'prefix "{prefixes}" taken off')
        left = [name for name, path in names.items() if not path[-1].startswith(prefixes)]
        if left:
            found[-1] += f" (not there: {_listed(left)})"
    return names, found


def _entry(paths: list[Path], wanted: Path) -> Path | None:
    """Returns the shallowest entry that ends with `wanted` and holds tensors."""
    ends = {path[:i] for path in paths for i in range(1, len(path)) if path[:i][-len(wanted) :] == wanted}
    return min(ends, key=lambda path: (len(path), path), default=None)


def _groups(paths: Iterable[Path], depth: int) -> list[str]:
    """Returns the entries at a depth that hold tensors deeper down, in the order of the file."""
    return list(dict.fromkeys(path[depth] for path in paths if len(path) > depth + 1))


def _without_prefixes(
    names: dict[str, Path], pending: str | None, found: list[str]
) -> tuple[dict[str, Path], str, str | None]:
    """Takes off prefixes as long as there are any; `pending` is a prefix that was asked for."""
    prefixes = ""
    while True:
        if pending and (own := _under(names, pending)):
            prefix, pending = f"{pending}.", None
            found.append(f'only names that begin with "{prefixes}{prefix}" ({len(own)} of {len(names)})')
            names, prefixes = own, prefixes + prefix
            continue
        firsts = Counter(name.partition(".")[0] for name in names if "." in name)
        if not pending and firsts["teacher"] and firsts["student"]:
            found.append('names that begin with "teacher." (also there: "student.")')
            names, prefixes = _under(names, "teacher"), f"{prefixes}teacher."
            continue
        wrapper = next((word for word in PREFIXES if firsts[word] and _is_wrapper(names, word)), None)
        if wrapper is None:
            return names, prefixes, pending
        names = {name.removeprefix(f"{wrapper}."): path for name, path in names.items()}
        prefixes += f"{wrapper}."


def _under(names: dict[str, Path], prefix: str) -> dict[str, Path]:
    start = f"{prefix}."
    return {name.removeprefix(start): path for name, path in names.items() if name.startswith(start)}


def _is_wrapper(names: dict[str, Path], prefix: str) -> bool:
    start = f"{prefix}."
    others = [name for name in names if not name.startswith(start)]
    return all(ENDS.fullmatch(name.partition(".")[0]) for name in others) and not any(
        start + name in names for name in others
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(f'"{name}"' for name in names[:6]) + (f", … ({len(names)} in all)" if len(names) > 6 else "")
