"""kernels/triton_attention.py: against float64, and generation with it against generation under masks.

Runs on CUDA where there is a GPU, and in a second process in Triton's interpreter, as test_kernels.py does.

Tolerances: fp32 sums of up to 100 terms near 1 are off by a few 2^-24 each. bf16 is rounded to 2^-9 by a GPU and
truncated to 2^-8 by the interpreter; the inputs are exact.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sampling
from model import GPTNeo, GPTNeoConfig

triton_attention = pytest.importorskip("kernels.triton_attention")
decode_attention, BLOCK = triton_attention.decode_attention, triton_attention.BLOCK

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs_triton = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or Triton's interpreter")
dtypes = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])


def inputs(B: int, H: int, S: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as the model passes them, and the front part of a longer cache: none of them is contiguous."""
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(B, 1, 3 * H, K, generator=rng)[:, :, H : 2 * H].transpose(1, 2)
    k, v = (torch.randn(B, H, S + 9, K, generator=rng)[:, :, :S] for _ in range(2))
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype), v.to(DEVICE, dtype)


def exact(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Masked attention in float64."""
    mask = torch.arange(k.shape[2], device=lengths.device) < lengths[:, None]
    return F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), mask[:, None, None], scale=1.0)


@runs_triton
@dtypes
@pytest.mark.parametrize("K", [8, 64, 80, 128])
def test_each_row_attends_to_its_own_entries(K, dtype, rtol):
    """Lengths around the blocks' ends and beyond S, as in a full ring buffer; what is not an entry is nan."""
    S = 2 * BLOCK + 6
    counts = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, S - 1, S, S + 1, 10 * S]
    lengths = torch.tensor(counts, device=DEVICE)
    q, k, v = inputs(len(counts), 2, S, K, dtype)
    expected = exact(q, k, v, lengths)
    for row, count in enumerate(counts):
        k[row, :, count:] = v[row, :, count:] = torch.nan
    got = decode_attention(q, k, v, lengths)
    assert got.dtype == dtype and got.shape == q.shape
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=rtol)
    for row in (0, 4, 9):  # and does not depend on the rows beside it
        alone = decode_attention(*(x[row : row + 1] for x in (q, k, v, lengths)))
        assert torch.equal(alone[0], got[row])


@runs_triton
@pytest.mark.parametrize("factor", [0.0, 100.0, -1e4])
def test_scores_of_any_size(factor):
    """GPT-Neo does not scale them, so they are large: equal ones, and ones whose exponential would overflow."""
    q, k, v = inputs(3, 1, BLOCK + 3, 16, torch.float32)
    lengths = torch.tensor([1, 5, BLOCK + 3], device=DEVICE)
    torch.testing.assert_close(
        decode_attention(factor * q, k, v, lengths).double(), exact(factor * q, k, v, lengths), rtol=1e-4, atol=1e-4
    )


@runs_triton
def test_generation_is_that_under_masks():
    """The same ids and log-probabilities, with ring buffers that overflow, slots that are refilled and a batch that
    shrinks. A step has one shape for all lengths, so that on CUDA one graph serves all of them."""
    config = GPTNeoConfig(
        vocab_size=51, max_position_embeddings=128, hidden_size=32, num_layers=2, num_heads=4,
        attention_types=((("global", "local"), 1),), window_size=4, initializer_range=0.2,
        bos_token_id=50, eos_token_id=50,
    )  # fmt: skip
    model = GPTNeo(config).init_weights(torch.Generator().manual_seed(0)).eval().to(DEVICE)
    rng = torch.Generator().manual_seed(1)
    prompts = [torch.randint(50, (1 + 7 * i % 60,), generator=rng).tolist() for i in range(5)]
    settings = dict(max_new_tokens=12, eos_token_id=50, batch_size=3, top_p=0.9)
    masked = sampling.respond(model, prompts, **settings)
    widths = set()

    def attend(q, k, v, lengths):
        widths.add(k.shape[2])
        return decode_attention(q, k, v, lengths)

    own = sampling.respond(model, prompts, attend=attend, **settings)
    assert widths == {max(map(len, prompts)) + 12, 4}
    assert own.ids == masked.ids and own.finished == masked.finished
    for a, b in zip(own.logps, masked.logps):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, n: (q, k, v[:, :, 1:], n), "expected (B, H, 1, K), twice (B, H, S, K), (B,)"),
        (lambda q, k, v, n: (q[:, :1], k, v, n), "expected (B, H, 1, K)"),
        (lambda q, k, v, n: (q, k, v, n[1:]), "expected (B, H, 1, K)"),
        (lambda q, k, v, n: (q, k.mT.contiguous().mT, v, n), "consecutive"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match="expected") as error:
        decode_attention(*change(*inputs(2, 2, 5, 8, torch.float32), torch.ones(2, dtype=torch.long, device=DEVICE)))
    assert message in str(error.value)


@pytest.mark.skipif(INTERPRETED, reason="runs this file once more, with this variable set")
def test_everything_under_the_triton_interpreter():
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0 and "1 skipped" in run.stdout, run.stdout + run.stderr
