"""Which part of which stored split is train, validation or test: one rule for all sources."""

import dataclasses
from collections.abc import Collection

from drep_jax.errors import ConfigError, DataError, did_you_mean

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Part:
    """The tenths [start, stop) of a stored split, and what the user should know about it."""

    stored: str
    start: int = 0
    stop: int = 10
    note: str | None = None


def check_split(split: str) -> None:
    """Raises ConfigError unless `split` is train, validation or test."""
    if split not in SPLITS:
        raise ConfigError(f'Unknown split "{split}".{did_you_mean(split, SPLITS)} Splits: {", ".join(SPLITS)}.')


def plan(stored: Collection[str], split: str, where: str, unlabeled: Collection[str] = ()) -> Part:
    """Returns the images that serve as `split`; the three parts of one data set never overlap.

    A missing test split is the stored validation split; so is one without labels, if train and
    validation have some: many data sets withhold the labels of their test split. A missing validation split (or one that had
    to serve as test) is a tenth of train. With train alone the parts are 80, 10 and 10 %.

    Args:
      stored: the splits that exist, among train, validation and test.
      split: the split that is wanted.
      where: the data set, for messages.
      unlabeled: the stored splits in which no image has a label.

    Raises:
      DataError: when there is no train split to take from.
    """
    check_split(split)
    if "test" in unlabeled and {"train", "validation"} <= set(stored) - set(unlabeled):
        part = plan([name for name in stored if name != "test"], split, where)
        remark = f"The test split of {where} has no labels: its validation split serves."
        return dataclasses.replace(part, note=remark if split == "test" else f"{remark} {part.note}")
    test_from = next((name for name in ("test", "validation") if name in stored), None)
    own_validation = {"validation", "test"} <= set(stored)
    if split == "test" and test_from:
        return Part(
            test_from, note=None if test_from == "test" else f"{where} has no test split: its validation split serves."
        )
    if split == "validation" and own_validation:
        return Part("validation")
    if "train" not in stored:
        serves = " (its validation split serves as test)" if test_from == "validation" else ""
        has = ", ".join(sorted(stored)) or "none"
        raise DataError(f'{where} has no train split to take "{split}" from; it has: {has}{serves}.')
    if own_validation:
        return Part("train")
    train_stop = 9 if test_from else 8
    start, stop = {"train": (0, train_stop), "validation": (train_stop, train_stop + 1), "test": (9, 10)}[split]
    shares = "90 % train, 10 % validation" if test_from else "80 % train, 10 % validation, 10 % test"
    return Part(
        "train", start, stop, f"{where} does not come in three splits: its train images are divided into {shares}."
    )
