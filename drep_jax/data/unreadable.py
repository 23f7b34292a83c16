"""Images that cannot be read: counted, named and skipped up to a limit, then refused."""

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from drep_jax.data.source import Source, fit_of, image_size_of, original_size_of, pass_on, raw_item, size_of
from drep_jax.errors import ConfigError, DataError, UnreadableError

RECORD = "unreadable.jsonl"
SHOWN = 10


class Tolerant:
    """A source of which some images may be unreadable.

    In training the loader takes the next readable image of the source instead, so that what a run
    sees depends on the files alone. In evaluation it masks the image out.

    Args:
      source: the images.
      limit: number of images that may be unreadable; the next one is refused.
    """

    def __init__(self, source: Source, limit: int) -> None:
        self.name, self.note = source.name, source.note
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.in_memory = getattr(source, "in_memory", False)
        self.image_size, self.resize = image_size_of(source), fit_of(source)
        self.limit = limit
        self.reasons: dict[str, str] = {}
        self._source = source
        self._places: set[int] = set()
        self._lock = threading.Lock()
        self._record: tuple[str, str] | None = None
        pass_on(source, self)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[index]

    def raw(self, index: int) -> dict[str, Any]:
        """Returns an item as it is stored."""
        return raw_item(self._source, index)

    def size_of(self, index: int) -> tuple[int, int]:
        """Returns (height, width) of an image without decoding it; (0, 0) if it cannot be read."""
        return self._size(size_of, index)

    def original_size_of(self, index: int) -> tuple[int, int]:
        """Returns (height, width) of an image as it is stored; (0, 0) if it cannot be read."""
        return self._size(original_size_of, index)

    def _size(self, size: Callable[[Source, int], tuple[int, int]], index: int) -> tuple[int, int]:
        try:
            return (0, 0) if self.known(index) else size(self._source, index)
        except UnreadableError as error:
            self.skip(index, error)
            return 0, 0

    def known(self, index: int) -> bool:
        """Returns whether this image is known to be unreadable."""
        return index in self._places

    def skip(self, index: int, error: UnreadableError) -> None:
        """Notes that an image is unreadable.

        Raises:
          DataError: if there are more of them than the limit; it lists them.
        """
        with self._lock:
            new = error.where not in self.reasons
            self.reasons.setdefault(error.where, str(error))
            if len(self.reasons) > self.limit:
                raise DataError(self._refusal()) from error  # from now on at each one, in any thread
            self._places.add(index)
            if new and self._record:
                path, part = self._record
                with open(path, "a", encoding="utf-8") as file:
                    # On a new line, since a kill may have cut the last one short.
                    file.write("\n" + json.dumps({"part": part, "where": error.where, "why": str(error)}) + "\n")

    def keep_record(self, path: str, part: str) -> None:
        """Reads the unreadable images of a part from a file of JSON lines, and appends new ones."""
        self._record = (path, part)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                for line in file:
                    entry = _parsed(line)
                    if entry.get("part") == part:
                        self.reasons.setdefault(entry["where"], entry["why"])

    def _refusal(self) -> str:
        first = "\n".join(f"  {reason}" for reason in list(self.reasons.values())[:SHOWN])
        more = f"\n  and {len(self.reasons) - SHOWN} more" if len(self.reasons) > SHOWN else ""
        return (
            f"{len(self.reasons)} of the {len(self)} images of {self.name} cannot be read, more than the {self.limit} that "
            f"data.max_unreadable allows:\n{first}{more}"
        )


def tolerating(source: Source, allowed: float) -> Source:
    """Returns the source with the unreadable images that `config.data.max_unreadable` allows.

    Args:
      source: the images.
      allowed: a whole number of images, or a fraction of them below 1; 0 refuses the first.

    Raises:
      ConfigError: for anything else.
    """
    if not isinstance(allowed, int | float) or not (0 <= allowed < 1 or (allowed >= 1 and allowed == int(allowed))):
        raise ConfigError(
            f"data.max_unreadable={allowed!r}: expected a whole number of images, or a fraction of them below 1."
        )
    return Tolerant(source, int(allowed * len(source) if allowed < 1 else allowed)) if allowed else source


def keep_records(directory: str, parts: Mapping[str, Source | None]) -> None:
    """Makes tolerant sources append skipped images to the record of a run, which resuming reads."""
    for part, source in parts.items():
        if isinstance(source, Tolerant):
            source.keep_record(os.path.join(directory, RECORD), part)


def summary(parts: Mapping[str, Source | None]) -> dict[str, Any] | None:
    """Returns the report's `unreadable`: by part, counts and the first ten; or None."""
    return {part: _counted(source) for part, source in parts.items() if isinstance(source, Tolerant)} or None


def _parsed(line: str) -> dict[str, str]:
    """Returns a line of the record; an empty dict for one that a kill has cut short."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _counted(source: Tolerant) -> dict[str, Any]:
    names: Sequence[str] = list(source.reasons)
    return {"count": len(names), "limit": source.limit, "images": len(source), "first": list(names[:SHOWN])}
