"""Small helpers for files and for messages about them."""

import json
from pathlib import Path
from typing import Any


def shown(value: object, most: int = 100) -> str:
    """Returns a value for a message: control characters are escaped, and the middle is left out beyond `most`."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))
    return text if len(text) <= most else f"{text[: most // 2]}...{text[3 - most // 2 :]}"


def parse_json(text: str, where: str | Path, hint: str = "") -> Any:
    """Parses a text. A message of an error begins with `where`, the text's place, and ends with `hint`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # A RecursionError means that values are nested too deep.
        raise ValueError(f"{where}: not valid JSON ({error}){hint}") from None


def read_text(path: Path) -> str:
    """Reads a whole file and keeps its line ends."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not readable as UTF-8") from None


def read_object(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file; a file that does not exist counts as {}."""
    if not path.is_file():
        return {}
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def lfs_hint(path: Path) -> str:
    """Returns "; ..." if a file is the pointer that Git LFS keeps in place of a large file, or ""."""
    with open(path, "rb") as file:
        first = file.readline(100)
    pointer = first.startswith(b"version ") and b"git-lfs" in first
    return "; it is a pointer of Git LFS: run git lfs pull" if pointer else ""


def token_text(token: Any) -> Any:
    """Returns the text of a special token, which tokenizer_config.json writes as a text or as an object."""
    return token.get("content") if isinstance(token, dict) else token
