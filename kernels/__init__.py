"""Log-probabilities of given tokens in little memory; onednn.py: faster fp32 products on a CPU; triton_attention.py:
attention of one new token per row, for generation.

Importing this package registers four operators with torch.library, in the namespace "logprobs". They are registered
here and not on first use because torch.compile, which alone calls them, cannot trace a registration. The import
changes nothing else: triton is imported on first use, and onednn.py patches torch only inside `onednn.products()`.

Hugging Face has a package of the same name, which transformers imports where it is installed. This folder, which comes
first in sys.path, would hide it. So its modules are found beside ours, and its names here, when somebody asks for them.
"""

import types
from pathlib import Path
from pkgutil import extend_path
from typing import Any

from .logprobs import linear_logprobs, token_logprobs

__all__ = ["linear_logprobs", "token_logprobs"]
__path__ = extend_path(__path__, __name__)  # other packages of this name, behind this one
_other: types.ModuleType | None = None


def __getattr__(name: str) -> Any:
    """A name of the other package: its __init__.py is run, once, when it is first asked for one."""
    global _other
    file = next((file for folder in __path__[1:] if (file := Path(folder, "__init__.py")).is_file()), None)
    if file is None or (name.startswith("__") and name != "__version__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _other is None:
        module = types.ModuleType(__name__)
        module.__file__, module.__path__, module.__package__ = str(file), __path__, __name__
        _other = module  # first, since its own modules may ask for its names
        try:
            exec(compile(file.read_bytes(), file, "exec"), module.__dict__)
        except BaseException:
            _other = None
            raise
    return getattr(_other, name)
