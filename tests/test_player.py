"""player.py: log-probabilities of responses, micro-batches, rows that several responses share, and bf16."""

import contextlib

import pytest
import torch
from helpers import known_model, player_of, spy

import lora
import player as player_module
import sampling


def table_of(model, temperature: float = 1.0) -> torch.Tensor:
    """log p(next token | current token) of helpers.known_model, (current, next)."""
    wte = model.transformer["wte"].weight.detach()
    return (torch.nn.functional.layer_norm(wte, (8,)) @ wte.T / temperature).log_softmax(-1)


def test_each_response_token_is_predicted_from_the_token_before_it():
    """A model whose next-token table is known shows the one-token shift: lucidrains' spin.py gathered without it."""
    model = known_model()
    table, player = table_of(model), player_of(model, micro_tokens=12)
    items = [([3, 1, 4], [1, 5, 10]), ([9], [2, 6]), ([5, 3], [10])]
    expected = [[table[4, 1], table[1, 5], table[5, 10]], [table[9, 2], table[2, 6]], [table[3, 10]]]
    sums = torch.stack([torch.stack(row).sum() for row in expected])
    got = player.response_logps(items)
    assert got.shape == (1, 3)
    torch.testing.assert_close(got[0].detach(), sums, atol=1e-5, rtol=0)
    counts: list[int] = []
    by_token = player.logps(items, counts.append, by_token=True)
    assert sum(counts) == 3 and len(counts) > 1
    for row, numbers in zip(expected, by_token, strict=True):
        assert numbers == pytest.approx([number.item() for number in row], abs=1e-5)


@pytest.mark.parametrize("masked_tokens", [1024, 0])
def test_log_probabilities_at_a_temperature(monkeypatch, masked_tokens):
    """Log-probabilities are those of the logits divided by the temperature, on the model whose table is known."""
    monkeypatch.setattr(player_module.Player, "masked_tokens", masked_tokens)
    model = known_model()
    table = table_of(model, 0.1)
    items = [([3, 1, 4], [1, 5, 10], [2]), ([9], [2, 6], [6, 2])]
    expected = [[table[4, 1] + table[1, 5] + table[5, 10], table[9, 2] + table[2, 6]],
                [table[4, 2], table[9, 6] + table[6, 2]]]  # fmt: skip
    player = player_of(model, micro_tokens=20)
    torch.testing.assert_close(player.response_logps(items, 0.1).detach(), torch.tensor(expected), atol=1e-5, rtol=0)
    scored = torch.tensor(player.logps(items, temperature=0.1)).T
    torch.testing.assert_close(scored, torch.tensor(expected), atol=1e-5, rtol=0)
    if masked_tokens:  # `respond` samples from this table: 4,000 draws of a token agree within 5 standard errors.
        drawn = player.respond([[4]] * 4000, 0, temperature=0.1, max_new_tokens=1)
        shares = torch.bincount(torch.tensor([ids[0] for ids, _ in drawn]), minlength=11) / 4000
        p = player.response_logps([([4], *[[token] for token in range(11)])], 0.1)[:, 0].detach().exp()
        assert ((shares - p).abs() < 5 * (p * (1 - p) / 4000).sqrt()).all()
        assert (p - table.mul(0.1).softmax(-1)[4]).abs().max() > 0.05, "else temperature 1 would fit as well"


def test_sums_and_log_ratios_are_fp32_under_bf16():
    """Under bf16 autocast a response's log-probability is fp32, and 20 equal terms sum without bf16's 8 bits."""
    player = player_of(known_model(), torch.bfloat16, micro_tokens=20)
    one = player.response_logps([([7], [7])])
    total = player.response_logps([([3], [7] * 20)])
    first = player.response_logps([([3], [7])])
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx((first + 19 * one).item(), rel=1e-5)


def test_an_end_token_equal_to_the_padding_id_is_still_scored(monkeypatch):
    """Padding is known by length, never by id: a response that contains the filler, id 0, counts in full."""
    seen = []
    spy(monkeypatch, player_module, "linear_logprobs", lambda a, k: seen.append(a[2].tolist()))
    player_of(known_model()).response_logps([([5, 0, 0], [0, 0, 10]), ([7], [0])])
    assert seen == [[0, 0, 10, 0]]


def test_scoring_is_free_of_dropout_and_of_the_global_generator():
    player = player_of(known_model())
    lora.add_lora(player.model, 2, 4.0, dropout=0.5)
    for _, layer in lora.lora_layers(player.model):
        torch.nn.init.normal_(layer.lora_B)
    state = torch.random.get_rng_state()
    scored = []
    for _ in range(2):
        player.model.train()
        scored.append(player.logps([([1, 2], [3, 4, 10])]))
    assert scored[0] == scored[1]
    assert torch.equal(state, torch.random.get_rng_state())


def test_bf16_means_bf16_products_in_scoring(monkeypatch):
    """Under autocast the head multiplies bf16 factors although the weights are fp32; in fp32 it multiplies fp32."""
    dtypes = []

    def look(args, options):
        dtypes.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else args[0].dtype)

    spy(monkeypatch, player_module, "linear_logprobs", look)
    for dtype in (torch.bfloat16, torch.float32):
        player_of(known_model(), dtype).logps([([3], [1, 10])])
    assert dtypes == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_with_adapters_changes_no_gradient(dtype):
    """The backward pass recomputes blocks outside of the block of code that made the adapters' factors ready."""
    gradients = []
    for checkpointing in (False, True):
        model = known_model().to(dtype)
        model.checkpointing = checkpointing
        lora.add_lora(model, 2, 4.0, generator=torch.Generator().manual_seed(0))
        for i, (_, layer) in enumerate(lora.lora_layers(model)):
            torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(i))
        player_of(model, dtype).response_logps([([1, 2], [3, 4, 10], [5, 10])]).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0 and torch.equal(one, other)


@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_cast_while_a_player_responds_and_are_put_back(monkeypatch, fails):
    """In bf16 every weight is bf16 while responses are sampled; afterwards, even after an error, all are as before."""
    player = player_of(known_model(), torch.bfloat16)
    before = {name: (p.data_ptr(), p.dtype) for name, p in player.model.named_parameters()}
    seen = set()
    real = sampling.respond

    def spied(model, *args, **options):
        seen.update(p.dtype for p in model.parameters())
        if fails:
            raise FloatingPointError
        return real(model, *args, **options)

    monkeypatch.setattr(sampling, "respond", spied)
    with pytest.raises(FloatingPointError) if fails else contextlib.nullcontext():
        player.respond([[1], [2, 3]], 0, max_new_tokens=3)
    assert seen == {torch.bfloat16}
    assert {name: (p.data_ptr(), p.dtype) for name, p in player.model.named_parameters()} == before
