"""Log-probabilities of given tokens in little memory; and, in onednn.py, faster fp32 products on a CPU.

Importing this package registers four operators with torch.library, in the namespace "logprobs". They are registered
here and not on first use because torch.compile, which alone calls them, cannot trace a registration. The import
changes nothing else: triton is imported on first use, and onednn.py patches torch only inside `onednn.products()`.
"""

from .logprobs import linear_logprobs, token_logprobs

__all__ = ["linear_logprobs", "token_logprobs"]
