"""player.py: log-probabilities of responses, micro-batches, rows that several responses share, numbers in bf16."""

import contextlib
import inspect
import itertools

import pytest
import torch
from helpers import begin, known_model, player_of, spy
from torch.nn.attention import varlen

import player as player_module
import sampling
import spin


def test_each_response_token_is_predicted_from_the_token_before_it():
    """The one-token shift, on a model whose next-token table is known: lucidrains' spin.py gathered without it."""
    model = known_model()
    wte = model.transformer["wte"].weight.detach()
    table = (torch.nn.functional.layer_norm(wte, (8,)) @ wte.T).log_softmax(-1)  # (current, next)
    sequences = [([3, 1, 4], [1, 5, 10]), ([9], [2, 6]), ([5, 3], [10])]
    expected = [table[4, 1] + table[1, 5] + table[5, 10], table[9, 2] + table[2, 6], table[3, 10]]
    got = player_of(model, micro_tokens=20).response_logps(sequences)
    assert got.shape == (1, 3)
    torch.testing.assert_close(got[0].detach(), torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("masked_tokens", [1024, 20])
def test_a_prompt_shared_by_two_responses(start, data, tmp_path, monkeypatch, masked_tokens):
    """Both in one row, or, beyond MASKED_TOKENS, a row each: the same log-probabilities and gradients as one by one."""
    monkeypatch.setattr(player_module, "MASKED_TOKENS", masked_tokens)
    player, examples, run = begin(start, data, tmp_path / "run", rank=0)
    pairs, _ = spin.generate(player, examples[:7], 0, run)
    items = [(p.prompt_ids, p.real_ids, p.generated_ids) for p in pairs]
    items[0] = (items[0][0][:1], items[0][1][-1:], items[0][2])  # a prompt of one token, a response of one
    params = [p for p in player.model.parameters() if p.requires_grad]
    together = player.response_logps(items)
    apart = torch.stack([torch.cat([player.response_logps([(i[0], i[n])])[0] for i in items]) for n in (1, 2)])
    assert together.shape == (2, len(items))
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=0)
    weights = torch.randn(apart.shape, generator=torch.Generator().manual_seed(0))
    for a, b in zip(*(torch.autograd.grad((logps * weights).sum(), params) for logps in (together, apart))):
        assert (a - b).norm() <= 1e-4 * b.norm()
    assert torch.tensor(player.logps(items)).flatten().tolist() == pytest.approx(apart.T.flatten().tolist(), abs=2e-5)


REAL_VARLEN = varlen.varlen_attn


def varlen_by_definition(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """What torch documents of varlen_attn, sequence by sequence in plain torch: the last query is at the last key."""
    left, right = window_size
    assert right == 0
    lengths = cu_seq_q.diff(), cu_seq_k.diff()
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key))
    assert [int(n.max()) for n in lengths] == [max_q, max_k]
    outputs = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_seq_q.tolist()), itertools.pairwise(cu_seq_k.tolist())):
        q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))  # (H, n, K)
        distance = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        seen = (distance >= 0) & ((distance <= left) | (left < 0))
        weights = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("responses", [1, 2, 3])
def test_packed_rows_have_the_log_probabilities_of_padded_ones(start, data, tmp_path, monkeypatch, responses):
    """Player.packed, with torch's definition of varlen_attn in its place: values and gradients; no token is padding.

    The model has global and local layers, with a window of 4; one item has a prompt and a response of one token each.
    """
    player, examples, _ = begin(start, data, tmp_path / "run", rank=0)
    items = [(e.prompt_ids, *(examples[i + n].real_ids for n in range(responses))) for i, e in enumerate(examples[:7])]
    items[2] = (items[2][0][:1], items[2][1][-1:], *items[2][2:])
    params = [p for p in player.model.parameters() if p.requires_grad]
    weights = torch.randn(responses, len(items), generator=torch.Generator().manual_seed(0))
    padded = player.response_logps(items)
    expected = torch.autograd.grad((padded * weights).sum(), params)
    tokens = []
    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_definition)
    spy(monkeypatch, player.model, "forward", lambda a, k: tokens.append(a[0].numel()))
    monkeypatch.setattr(player_module, "MASKED_TOKENS", 0)
    player.packed = True
    packed = player.response_logps(items)
    torch.testing.assert_close(packed, padded, atol=2e-5, rtol=0)
    for a, b in zip(torch.autograd.grad((packed * weights).sum(), params), expected):
        assert (a - b).norm() <= 1e-4 * b.norm()
    assert tokens == [sum(len(ids) for item in items for ids in item) - responses * len(items)]


def test_torchs_variable_length_attention_takes_what_packed_rows_pass(start, data, tmp_path, monkeypatch):
    """Its own shape function accepts the arguments, with LoRA in bf16: no fp32 tensor reaches flash attention."""
    player, examples, _ = begin(start, data, tmp_path / "run", precision="bf16")
    calls = []

    def call(q, k, v, *args, **options):
        calls.append({x.dtype for x in (q, k, v)})
        on_meta = inspect.signature(REAL_VARLEN).bind(q, k, v, *args, **options)
        on_meta.arguments |= {n: x.to("meta") for n, x in on_meta.arguments.items() if isinstance(x, torch.Tensor)}
        assert REAL_VARLEN(*on_meta.args, **on_meta.kwargs).shape == q.shape
        return varlen_by_definition(q, k, v, *args, **options)

    monkeypatch.setattr(varlen, "varlen_attn", call)
    items = [(e.prompt_ids, e.real_ids, e.real_ids) for e in examples[:3]]
    padded = player.response_logps(items)
    assert not calls
    player.packed = True
    torch.testing.assert_close(player.response_logps(items), padded, atol=0, rtol=0.02)
    assert calls == [{torch.bfloat16}] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's own attention has no CPU form")
@pytest.mark.parametrize("responses", [1, 2])
def test_packed_rows_on_a_gpu(start, data, tmp_path, responses):
    """By torch's varlen_attn in bf16: log-probabilities and gradients of padded rows."""
    player, examples, _ = begin(start, data, tmp_path / "run", rank=0, precision="bf16", device="cuda")
    items = [(e.prompt_ids, *(examples[i + n].real_ids for n in range(responses))) for i, e in enumerate(examples[:7])]
    params = [p for p in player.model.parameters() if p.requires_grad]
    found = []
    for player.packed in (False, True):
        logps = player.response_logps(items)
        found.append((logps.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(logps.sum(), params)])))
    torch.testing.assert_close(found[1][0], found[0][0], atol=0, rtol=0.02)
    assert (found[1][1] - found[0][1]).norm() <= 0.05 * found[0][1].norm()


@pytest.mark.parametrize("masked_tokens", [1024, 0])
def test_log_probabilities_at_a_temperature(monkeypatch, masked_tokens):
    """Each token's are those of the logits over the temperature; on the model whose table is known."""
    monkeypatch.setattr(player_module, "MASKED_TOKENS", masked_tokens)
    model = known_model()
    wte = model.transformer["wte"].weight.detach()
    table = (torch.nn.functional.layer_norm(wte, (8,)) @ wte.T / 0.1).log_softmax(-1)  # (current, next)
    items = [([3, 1, 4], [1, 5, 10], [2]), ([9], [2, 6], [6, 2])]
    expected = [[table[4, 1] + table[1, 5] + table[5, 10], table[9, 2] + table[2, 6]],
                [table[4, 2], table[9, 6] + table[6, 2]]]  # fmt: skip
    player = player_of(model, micro_tokens=20)
    torch.testing.assert_close(player.response_logps(items, 0.1).detach(), torch.tensor(expected), atol=1e-5, rtol=0)
    scored = torch.tensor(player.logps(items, temperature=0.1)).T
    torch.testing.assert_close(scored, torch.tensor(expected), atol=1e-5, rtol=0)
    if masked_tokens:  # and they are what is sampled from: 4,000 draws of a token, within 5 standard errors
        drawn = player.respond([[4]] * 4000, 0, temperature=0.1, max_new_tokens=1)
        shares = torch.bincount(torch.tensor([ids[0] for ids, _ in drawn]), minlength=11) / 4000
        p = player.response_logps([([4], *[[token] for token in range(11)])], 0.1)[:, 0].detach().exp()
        assert ((shares - p).abs() < 5 * (p * (1 - p) / 4000).sqrt()).all()
        assert (p - table.mul(0.1).softmax(-1)[4]).abs().max() > 0.05, "else temperature 1 would fit as well"


def test_logps_do_not_depend_on_batch_or_padding(start, tmp_path, data):
    player, examples, _ = begin(start, data, tmp_path / "run", rank=0)
    sequences = [(e.prompt_ids, e.real_ids) for e in examples[:9]]
    alone = torch.cat([player.response_logps([s]) for s in sequences], dim=1)
    torch.testing.assert_close(player.response_logps(sequences), alone, atol=2e-5, rtol=0)
    assert [logp for (logp,) in player.logps(sequences)] == pytest.approx(alone[0].tolist(), abs=2e-5)


def test_sums_and_log_ratios_are_fp32_under_bf16():
    """Under bf16 autocast a response's log-probability is fp32, and 20 equal terms sum without bf16's 8 bits."""
    player = player_of(known_model(), torch.bfloat16, micro_tokens=20)
    one = player.response_logps([([7], [7])])
    total = player.response_logps([([3], [7] * 20)])
    first = player.response_logps([([3], [7])])
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx((first + 19 * one).item(), rel=1e-5)


def test_an_end_token_equal_to_the_padding_id_is_still_scored(start, data, tmp_path, monkeypatch):
    """Padding is told by length, never by id: a response that holds the id 0 used as filler counts in full."""
    player, _, run = begin(start, data, tmp_path / "run", rank=0)
    seen = []
    spy(monkeypatch, player_module, "linear_logprobs", lambda a, k: seen.append(a[2].tolist()))
    player.response_logps([([5, 0, 0], [0, 0, run.eos_token_id]), ([7], [0])])
    assert seen == [[0, 0, run.eos_token_id, 0]]


def test_scoring_is_free_of_dropout_and_of_the_global_generator(start, data, tmp_path):
    player, examples, _ = begin(start, data, tmp_path / "run", lora_dropout=0.5)
    for parameter in player.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    sequences = [(e.prompt_ids, e.real_ids) for e in examples[:4]]
    state = torch.random.get_rng_state()
    scored = []
    for _ in range(2):
        player.model.train()
        scored.append(player.logps(sequences))
    assert scored[0] == scored[1]
    assert torch.equal(state, torch.random.get_rng_state())


def test_micro_batches_hold_rows_of_like_length_within_the_budget():
    tokens = [5, 30, 7, 6, 100, 9, 8, 31]
    player = player_of(known_model(), micro_tokens=30)
    chunks = list(player.micro_batches(tokens))
    assert sorted(i for chunk in chunks for i in chunk) == list(range(8))
    assert [[tokens[i] for i in chunk] for chunk in chunks] == [[5, 6, 7], [8, 9], [30], [31], [100]]
    assert list(player.micro_batches([])) == []


def test_bf16_means_bf16_products_in_scoring(monkeypatch):
    """Under autocast the head multiplies bf16 factors, though the weights are fp32; a player in fp32 has fp32 ones."""
    dtypes = []
    real = player_module.linear_logprobs

    def spied(hidden, weight, targets, **options):
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        dtypes.append(autocast or hidden.dtype)
        return real(hidden, weight, targets, **options)

    monkeypatch.setattr(player_module, "linear_logprobs", spied)
    for dtype in (torch.bfloat16, torch.float32):
        player_of(known_model(), dtype).logps([([3], [1, 10])])
    assert dtypes == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_cast_while_a_player_responds_and_are_put_back(monkeypatch, fails):
    """In bf16 every weight is bf16 while responses are sampled; afterwards, also after an error, they are the same."""
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
