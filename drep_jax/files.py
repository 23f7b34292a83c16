"""Files that are written whole or not at all."""

import json
import os
from typing import Any


def write_json(path: str, value: Any) -> None:
    """Writes JSON whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
    os.replace(f"{path}.tmp", path)
