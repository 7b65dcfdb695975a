"""Log-probabilities of given tokens in little memory; onednn.py makes fp32 products on a CPU faster.

The import changes nothing: triton is imported on first use, and onednn.py patches torch only inside
`onednn.products()`. Inside a function that torch.compile compiles, these functions run uncompiled.

Hugging Face has a package of the same name, and transformers imports names from it if it is installed. This folder
comes first in sys.path and would hide it, so the names and modules of the other package can be imported from this one.
"""

import types
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import extend_path
from typing import Any

from .logprobs import linear_logprobs, token_logprobs

__all__ = ["linear_logprobs", "token_logprobs"]

# Further packages of this name in sys.path. This folder itself may be there again, through a link or as a copy.
_others = [
    folder
    for folder in extend_path(__path__, __name__)
    if Path(folder, "__init__.py").is_file() and not Path(folder, "logprobs.py").exists()
]
__path__ += _others
_other: types.ModuleType | None = None


def __getattr__(name: str) -> Any:
    """Returns a name of the other package, whose __init__.py runs when a name is first asked for."""
    global _other
    if not _others or (name.startswith("__") and name != "__version__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _other is None:
        spec = spec_from_file_location(__name__, Path(_others[0], "__init__.py"), submodule_search_locations=__path__)
        _other = module_from_spec(spec)  # assigned first, because its own modules may ask for its names
        spec.loader.exec_module(_other)
    return getattr(_other, name)
