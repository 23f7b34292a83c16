"""Finding the state dict in a checkpoint: which entry of a wrapper holds it, and which prefix all of its names have."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

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
    "ema_params",
    "ema_weights",
    "averaged_model",
    "swa_model",
    "swa_state_dict",
    "shadow",
    "ema_shadow",
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
# Parts of names that only wrappers make, wherever they stand: compiling, checkpointing, sharding,
# engines of training, adapters.
WRAPPERS = (
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_forward_module",
    "_ddp_module",
    "base_layer",
)
PREFIXES = (
    "module",
    *WRAPPERS[:-1],
    "model",
    "base_model",
    "online_model",
    "backbone",
    "encoder",
    "base",
    "student",
    *AVERAGED,
)
_INSIDE = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(WRAPPERS)})\.")
# An adapter's two copies of a whole module: the trained one is in force, the original is not.
_TRAINED, _ORIGINAL = re.compile(r"(?:^|(?<=\.))modules_to_save\.\w+\."), re.compile(r"(?:^|(?<=\.))original_module\.")
_ITEM = re.compile(r"\[\d+\]")
# What training keeps beside a network and is no part of it: counters of averages, states of metrics
# and losses. Left out where no leaf asks for it.
BOOKKEEPING = re.compile(
    r"(.*\.)?(n_averaged|num_updates|initted|ema_decay)|((model_)?ema\.)?(steps?|decay|epoch|iteration|global_step)|"
    r"([^.]*_)?(criterion|loss|losses|loss_fn|metrics?|acc|accuracy|acc1|acc5|top1|top5|f1|f1_score|auroc|auc|precision|"
    r"recall|confmat|confusion_matrix|iou|miou|psnr|ssim|fid|perplexity)(_[^.]*)?(\..*)?"
)
# What may stand beside a prefixed network without belonging to it. Where anything else does, the
# prefix is the network's own: the blocks of torchvision's ViT are "encoder.layers…", beside
# "conv_proj" and "class_token".
ENDS = re.compile(
    r".*head.*|fc|classifier|.*decoder.*|neck.*|projector|predictor|projection|queue.*|criterion|loss.*|logit_scale|"
    r"mask_token|bottleneck.*|aux.*|pixel_mean|pixel_std|center"
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
    found: list[str] = []
    paths = _named(where, list(paths), found)
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
                f"{where} holds tensors under {_listed(nested)}; say which of them are the weights: "
                f"--config.backbone.init_state={nested[0]} (in Python, state=…)."
            )
        inside = (*inside, states[0])
        chosen = [path for path in chosen if path[: len(inside)] == inside]
        named.update(states)
        also = f" (also there: {_listed(states[1:])})" if len(states) > 1 else ""
        found.append(f'state under "{full_name(inside)}"{also}')
    names = {full_name(path[len(inside) :]): path for path in chosen if len(path) == len(inside) + 1}
    if pending is None:
        names = _without_copies(names, found)
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
    return _without_wrappers(names, found), found


def other_namings(stored: Mapping[str, str]) -> list[tuple[dict[str, str], str]]:
    """Returns further ways to name the tensors of a state, for networks whose own names look like wrappers'.

    Args:
      stored: {name as `find_state` gives it: name in its entry of the file}.

    Returns:
      [({name: the key in `stored`}, sentence that says how it is named)], without the first way.
    """
    ways: list[tuple[dict[str, str], str]] = []
    if any(name != own for name, own in stored.items()) and len(set(stored.values())) == len(stored):
        ways.append(({own: name for name, own in stored.items()}, "names taken as they stand in the file"))
    bare = {re.sub(r"(?<=\.)module\.", "", name): name for name in stored}
    if len(bare) == len(stored) and bare.keys() != stored.keys():
        count = sum(name != own for name, own in bare.items())
        ways.append((bare, f'wrapper "module" taken out of {count} names'))
    return ways


def prefixes_of(names: Iterable[str], least: int) -> list[str]:
    """Returns the beginnings of names, up to three parts, that at least so many of them have; the commonest first."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts.update(".".join(parts[: i + 1]) for i in range(min(3, len(parts) - 1)))
    return [prefix for prefix, count in counts.most_common(50) if count >= max(least, 1)]


def _named(where: str, paths: list[Path], found: list[str]) -> list[Path]:
    """Returns the tensors that have names: lists of averaged parameters, say, cannot be told apart."""
    named = [path for path in paths if not _ITEM.fullmatch(path[-1])]
    lists = list(dict.fromkeys(full_name(path[:-1]) for path in paths if _ITEM.fullmatch(path[-1])))
    if not paths:
        raise CheckpointError(
            f"{where} holds no tensors with names. Save the weights themselves: "
            'torch.save(model.state_dict(), "weights.pth").'
        )
    if not named:
        raise CheckpointError(
            f"{where} holds {len(paths)} tensors in a list, without names, so it cannot be told which is which. Load it in "
            'PyTorch into the model that it is of, and save that: torch.save(model.state_dict(), "weights.pth").'
        )
    weights = [entry for entry in lists if not any(BESIDES.fullmatch(part) for part in entry.split("/"))]
    if weights:
        found.append(f"tensors without names not used: {_listed(weights)}")
    return named


def _without_wrappers(names: dict[str, Path], found: list[str]) -> dict[str, Path]:
    """Takes the parts that wrappers make out of names, unless two names would become one."""
    bare: dict[str, Path] = {}
    seen: Counter[str] = Counter()
    trained = {_TRAINED.sub("", name) for name in names if _TRAINED.search(name)}
    replaced = 0
    for name, path in names.items():
        if _ORIGINAL.search(name) and _ORIGINAL.sub("", name) in trained:
            replaced += 1
            continue
        seen.update(set(_INSIDE.findall(name)))
        short = _TRAINED.sub("", _INSIDE.sub("", name))
        if short in bare or (short != name and short in names):
            return names
        bare[short] = path
    for wrapper, count in seen.items():
        found.append(f'wrapper "{wrapper[:-1]}" taken out of {count} names')
    if trained:
        found.append(f"{len(trained)} tensors trained beside adapters take the place of {replaced} originals")
    return bare


def _without_copies(names: dict[str, Path], found: list[str]) -> dict[str, Path]:
    """Leaves out averaged copies that stand beside the names they are of, with other signs in place of the dots."""
    matches = {name: re.fullmatch(r"(?:model_ema|ema)[._]([^.]+)", name) for name in names}
    cores = {_core(name) for name, match in matches.items() if not match}
    flat = {core.replace(".", sign) for core in cores for sign in ("_", "")}
    copies = {name: match[1] for name, match in matches.items() if match and match[1] in flat}
    if set(copies.values()) <= cores:  # averages of a network whose names have no dots: a prefix like any other
        return names
    found.append(f"copies beside the weights, not used: {_listed(copies)}")
    return {name: path for name, path in names.items() if name not in copies}


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
        if not pending and (pair := _averaged_and_plain(names, firsts)):
            averaged, plain = pair
            found.append(f'names that begin with "{averaged}." (also there: {plain})')
            names, prefixes = _under(names, averaged), f"{prefixes}{averaged}."
            continue
        wrapper = next((word for word in PREFIXES if firsts[word] and _is_wrapper(names, word)), None)
        if wrapper is None:
            return names, prefixes, pending
        names = {name.removeprefix(f"{wrapper}."): path for name, path in names.items()}
        prefixes += f"{wrapper}."


def _averaged_and_plain(names: dict[str, Path], firsts: Mapping[str, int]) -> tuple[str, str] | None:
    """Returns the prefix of averaged weights and what the plain ones beside them begin with, if both are there."""
    if firsts["teacher"] and firsts["student"]:
        return "teacher", '"student."'
    for word in AVERAGED:
        if not firsts[word]:
            continue
        averaged = {_core(name) for name in _under(names, word)}
        for other in firsts:
            if other != word and 2 * len({_core(name) for name in _under(names, other)} & averaged) > len(averaged):
                return word, f'"{other}."'
        if 2 * len({_core(name) for name in names if not name.startswith(f"{word}.")} & averaged) > len(averaged):
            return word, "the same without it"
    return None


def _core(name: str) -> str:
    """Returns a name without wrappers' parts and known prefixes."""
    parts = _INSIDE.sub("", name).split(".")
    while len(parts) > 1 and parts[0] in PREFIXES:
        del parts[0]
    return ".".join(parts)


def _under(names: dict[str, Path], prefix: str) -> dict[str, Path]:
    start = f"{prefix}."
    return {name.removeprefix(start): path for name, path in names.items() if name.startswith(start)}


def _is_wrapper(names: dict[str, Path], prefix: str) -> bool:
    start = f"{prefix}."
    others = [name for name in names if not name.startswith(start)]
    return all(ENDS.fullmatch(name.partition(".")[0]) or BOOKKEEPING.fullmatch(name) for name in others) and not any(
        start + name in names for name in others
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(f'"{name}"' for name in names[:6]) + (f", … ({len(names)} in all)" if len(names) > 6 else "")
