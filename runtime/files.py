"""Small text files that come with a model: checked before they are opened, and read whole."""

import json
from pathlib import Path
from typing import Any

from runtime.options import check_file

LARGEST_FILE = 2**26  # bytes of a tokenizer's file
DEEPEST = 50  # nesting of values in a JSON file


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an absent file is an empty one. Raises: ValueError naming the file."""
    if not path.is_file():
        return {}
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    if _nested_deeper(value, DEEPEST):  # writing it would exceed Python's limit
        raise ValueError(f"{path}: values are nested more than {DEEPEST} deep")
    return value


def _nested_deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (levels == 0 or any(_nested_deeper(item, levels - 1) for item in inner))


def token_text(token: Any) -> Any:
    """The text of a special token in tokenizer_config.json, where it is text or an object."""
    return token.get("content") if isinstance(token, dict) else token


def read_text(path: Path) -> str:
    """Line ends stay as they are. Raises: ValueError naming the file."""
    check_file(path, LARGEST_FILE)
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not readable as UTF-8") from None
