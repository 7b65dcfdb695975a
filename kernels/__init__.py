"""Memory-lean token log-probabilities. Importing this package has no effect; triton is imported on first use only."""

from .logprobs import linear_logprobs, token_logprobs

__all__ = ["linear_logprobs", "token_logprobs"]
