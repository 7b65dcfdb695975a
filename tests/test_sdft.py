"""methods/sdft.py against TRL, kernels/divergence.py against float64, what the teacher reads, and whole runs."""

import warnings

import pytest
import torch
from helpers import assert_resumes, begin, die_at, flags, refused, rows, spy, write_rows
from torch.nn import functional as F

import kernels.divergence
import spin
from data.examples import Example
from kernels.divergence import linear_kl
from llama import Llama, LlamaConfig
from methods import sdft
from model import GPTNeo
from player import Player
from runtime.training import Training

TEMPLATE = "{response}={prompt}"


def sdft_flags(start, data, out, **options) -> list[str]:
    return flags(start, data, out, **(dict(beta=None, teacher_template=TEMPLATE, save_minutes=0) | options))


# ---------------------------------------------------------------- the divergence


def exact_kl(hidden, weight, other_hidden, other_weight):
    logp, logq = ((h @ w.T).log_softmax(1) for h, w in ((hidden, weight), (other_hidden, other_weight)))
    return (logp.exp() * (logp - logq)).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows_per_tile", [1, 5, 100])
def test_the_divergence_and_its_gradients_equal_float64(monkeypatch, dtype, frozen, rows_per_tile):
    """Tiles have one row, leave a rest, or are one for all; logits are up to 50, so that probabilities underflow."""
    N, V, rng = 17, 41, torch.Generator().manual_seed(0)
    monkeypatch.setattr(kernels.divergence, "TILE_LOGITS", rows_per_tile * V)
    tensors = [torch.randn(n, d, generator=rng).mul(3).to(dtype) for n, d in ((N, 8), (V, 8), (N, 12), (V, 12))]
    upstream = torch.randn(N, generator=rng)
    ours = [t.clone().requires_grad_(i == 0 or (i == 1 and not frozen)) for i, t in enumerate(tensors)]
    exact = [t.double().requires_grad_() for t in tensors]
    kl, expected = linear_kl(*ours), exact_kl(*exact)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-5)
    assert kl.max() > 10
    kl.backward(upstream)
    expected.backward(upstream.double())
    # Logits of 50 are rounded by 4e-6; the gradient multiplies that by log-probabilities and weights.
    near = dict(rtol=1e-4, atol=1e-3) if dtype == torch.float32 else dict(rtol=2e-2, atol=0.1)
    torch.testing.assert_close(ours[0].grad.double(), exact[0].grad, **near)
    assert (ours[1].grad is None) == frozen
    if not frozen:
        torch.testing.assert_close(ours[1].grad.double(), exact[1].grad, **near)


def test_the_minimiser_is_the_teacher():
    """A softmax table of four prompts and five tokens is trained; the teacher's head gets no gradient."""
    p_teacher = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)).add(0.1)
    table, prompts = torch.zeros(5, 4, requires_grad=True), torch.eye(4)
    teacher = p_teacher.log().T.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([table], max_iter=500, tolerance_grad=1e-8, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = linear_kl(prompts, table, prompts, teacher).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(table.detach().T.softmax(1), F.normalize(p_teacher, 1), atol=1e-4, rtol=0)
    assert teacher.grad is None


# ---------------------------------------------------------------- ten steps


def losses_of_trl(model: Llama, prompts: list, demonstrations: list, answer_of: dict, folder) -> list[float]:
    """Losses of TRL's trainer, which begins at `model` and is given its responses. It works in `folder`."""
    from datasets import Dataset
    from generation_cases import in_transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    losses = []

    class Trainer(SDFTTrainer):
        def _generate(self, asked):
            return asked, [answer_of[tuple(prompt)] for prompt in asked]

        def compute_loss(self, *args, **kwargs):
            losses.append(super().compute_loss(*args, **kwargs))
            return losses[-1]

    in_transformers(model).save_pretrained(folder / "start")
    words = {"<pad>": 0, "<eos>": 96} | {f"w{i}": i for i in range(1, 96)}
    tokenizer = Tokenizer(models.WordLevel(words, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = [[" ".join(f"w{i}" for i in ids) for ids in column] for column in (prompts, demonstrations)]
    config = SDFTConfig(
        str(folder / "trl"), distillation_mode="full_logits", distillation_alpha=1.0, distillation_is_clip=None,
        teacher_model_kind="base", teacher_prompt_template="{privileged_context} {prompt}", num_generations=1,
        shuffle_dataset=False, per_device_train_batch_size=4, num_train_epochs=5, learning_rate=3e-3, warmup_steps=0,
        weight_decay=0, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            model=str(folder / "start"), args=config,
            train_dataset=Dataset.from_dict({"prompt": texts[0], "privileged_context": texts[1]}),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
        ).train()  # fmt: skip
    return [loss.item() for loss in losses]


def test_ten_losses_equal_trls(monkeypatch, tmp_path):
    """All parameters are trained with full logits, alpha 1 (reverse KL), the start as teacher, and given responses.
    The model is a Llama, since TRL pads prompts on the left, which shifts the positions of a GPT-Neo."""
    pytest.importorskip("trl")
    from training_cases import our_run

    rng = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 15, (24,), generator=rng).tolist()
    ids = [torch.randint(1, 96, (length,), generator=rng).tolist() for length in lengths]
    prompts, demonstrations, answers = ids[:8], ids[8:16], ids[16:]
    answer_of = {tuple(prompt): [*answer, 96] for prompt, answer in zip(prompts, answers)}
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, initializer_range=0.2)
    llama = LlamaConfig(model_type="llama", num_attention_heads=4, num_key_value_heads=2, eos_token_id=96, **sizes)
    model = Llama(llama).init_weights(torch.Generator().manual_seed(0)).eval()
    expected = losses_of_trl(model, prompts, demonstrations, answer_of, tmp_path)
    player, run = our_run(model, False, sdft.SdftOptions, batch=4, epochs=(5,), lr=(3e-3,), micro_tokens=60, rank=0)
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    monkeypatch.setattr(player, "respond", lambda asked, *_, **__: [(answer_of[tuple(p)], True) for p in asked])
    examples = [Example("", i, "", "", [], prompt_ids=p) for i, p in enumerate(prompts)]
    teacher = {i: d + p for i, (d, p) in enumerate(zip(demonstrations, prompts))}
    spin.optimize(player, examples, sdft.distillation(player, teacher, run), 0, run)
    ours = [row["loss"] for row in rows(run.folder.path / "steps-0.jsonl")]
    assert len(ours) == 10 and min(ours) < 0.8 * ours[0]
    assert ours == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------- the teacher, and whole runs


def test_the_teacher_reads_prompt_and_response_in_the_run_s_template(start, data, tmp_path):
    """Braces in the data stay as they are; of messages the user's last turn is rewritten."""
    records = [
        {"prompt": "a{response}", "response": "B{prompt}"},
        {"messages": [dict(role=r, content=c) for r, c in (("system", "S"), ("user", "u"), ("assistant", "V"))]},
    ]
    mixed = write_rows(tmp_path / "mixed.jsonl", records)
    options = dict(teacher_template=r"{response}\n{prompt}", template="<{prompt}>", eval_data=data, beta=None)
    _, examples, run = begin(start, mixed, tmp_path / "run", "sdft", **options)
    texts = [run.work.tokenizer.decode(e.prompt_ids) for e in sdft.teacher_prompts(examples, run)]
    assert texts == ["<B{prompt}\na{response}>", "S\n\n<V\nu>"]


def test_the_teacher_is_theta_t_and_every_step_draws_afresh(start, data, tmp_path, monkeypatch):
    """The first loss of iteration 1 is that of new responses of iterate-1, beside itself with the other prompts."""
    heads, seeds = [], []
    spy(monkeypatch, sdft, "linear_kl", lambda a, k: heads.append([a[1].detach().clone(), a[3].clone()]))
    spy(monkeypatch, Player, "respond", lambda a, k: seeds.append(a[2]) if a[0].model.training else None)
    out, options = tmp_path / "run", dict(rank=0, lr=3e-3, iterations=2, epochs=2, batch=32, eval_limit=4)
    assert sdft.main(sdft_flags(start, data, out, micro_tokens=10**6, **options)) == 0
    count = len(rows(out / "steps-0.jsonl"))
    assert len(heads) == len(set(seeds)) == 2 * count == 12
    models = [GPTNeo.from_pretrained(path) for path in (start, out / "iterate-1")]
    for i, (own, teacher) in enumerate(heads):
        assert teacher.equal(models[i // count].head_weight) and own.equal(teacher) == (i % count == 0)

    _, examples, run = begin(start, data, tmp_path / "again", "sdft", beta=None, teacher_template=TEMPLATE, **options)
    player = Player(models[1], run.work.eos_token_id, run.args)
    prompts = {e.line: e.prompt_ids for e in sdft.teacher_prompts(examples, run)}
    items, first = run.prompts(examples, 1), torch.Generator().manual_seed(run.seed(1, "shuffle"))
    batch = [items[i] for i in torch.randperm(len(items), generator=first)[:32]]
    answers = player.respond([e.prompt_ids for e in batch], seeds[count], rows=[e.line for e in batch])
    exact, losses = models[1].double(), []
    for e, (ids, _) in zip(batch, answers):
        hidden = [exact(torch.tensor([p + ids[:-1]]))[0, len(p) - 1 :] for p in (e.prompt_ids, prompts[e.line])]
        losses.append(exact_kl(hidden[0], exact.head_weight, hidden[1], exact.head_weight).mean().item())
    assert rows(out / "steps-1.jsonl")[0]["loss"] == pytest.approx(sum(losses) / 32, rel=1e-4)


def test_a_run_that_died_twice_ends_with_the_same_files(start, data, here):
    """The run dies amid the steps of both iterations."""
    options = dict(lora_dropout=0.1, precision="bf16", iterations=2, prompts=24, batch=8, eval_limit=4)
    argv = sdft_flags(start, data, "run", **options)
    for t in range(2):
        die_at(Training, "step", argv, lambda training, *_, t=t: (training.t, len(training.log)) == (t, 2), script=sdft)
    assert_resumes(argv, sdft)


def test_what_is_refused(start, data, tmp_path, capsys):
    out = tmp_path / "run"
    other = write_rows(tmp_path / "data.jsonl", [{"prompt": "a", "response": "B"}, {"prompt": "c"}])

    def error(**options) -> str:
        return refused(sdft_flags(start, options.pop("data", data), out, **options), out, capsys, script=sdft)

    assert "text with {prompt} and {response}" in error(teacher_template="{prompt}")
    assert "--fsdp is not for SDFT" in error(fsdp=True, rank=0)
    assert f"{data}:1: needs" in error(teacher_template="{prompt}{response}" + 60 * "-")
    assert "no example fits" in error(teacher_template="{prompt}{response}" + 60 * "-", overlong="skip")
    assert "--model is missing" in refused(["--out", out], out, capsys, script=sdft)
    assert f"{other}:2: field 'response' is missing" in error(data=other)
    assert sdft.main(sdft_flags(start, data, out, dry_run=True)) == 0
