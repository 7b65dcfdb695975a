"""What several test files need: the project's root, tiny runs, and looks at what they left."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import sampling
import sft
import spin
from data.examples import Example
from examples import seft
from methods import family, sdft
from model import GPTNeo, GPTNeoConfig
from player import Player
from runtime.options import combined, parse
from runtime.run import Run
from runtime.setup import setup

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"spin": spin, "sft": sft, "family": family, "seft": seft, "sdft": sdft}
OPTIONS = {
    "spin": combined(spin.SpinOptions), "sft": combined(sft.SftOptions), "family": combined(family.FamilyOptions),
    "seft": combined(seft.SeftOptions), "sdft": combined(sdft.SdftOptions),
}  # fmt: skip
# A world of five responses: their probabilities in the data and under the opponent.
TABLES = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05], [0.1, 0.2, 0.3, 0.15, 0.25]], dtype=torch.float64)


def flags(start, data, out, **options) -> list[str]:
    """A command line for a run of seconds; `options` override its own, and None leaves a flag out."""
    defaults = {
        "model": start, "data": data, "out": out, "eval_share": 0.2, "eval_temperatures": 0.8,
        "iterations": 1, "max_new_tokens": 8, "rank": 4,
        "lr": 1e-2, "epochs": 1, "batch": 16, "micro_tokens": 800, "beta": 1.0, "device": "cpu", "precision": "fp32",
    }  # fmt: skip
    argv = []
    for name, value in (defaults | options).items():
        if value is not None:
            values = [] if value is True else value if isinstance(value, list | tuple) else [value]
            argv += [f"--{name.replace('_', '-')}", *map(str, values)]
    return argv


def small(start, data, **options) -> list[str]:
    """A command line for a run in ./run, of two iterations, with dropout, previous pairs and many checkpoints.

    They have 24 pairs in three shards and three steps, and then three more steps on the same pairs.
    """
    defaults = dict(iterations=2, lora_dropout=0.1, mix_previous=True, save_minutes=0)
    defaults |= dict(prompts=24, eval_limit=6, batch=8, gen_batch=8, shard=8)
    return flags(start, data, options.pop("out", "run"), **(defaults | options))


def small_sft(start, data, **options) -> list[str]:
    """The command line of `small` for sft.py, which has no self-play options."""
    return small(start, data, **(dict(beta=None, mix_previous=None) | options))


def begin(start, data, out, command="spin", **options) -> tuple[Player, list[Example], Run]:
    """(player, training examples, run) of a tiny run that has not begun: nothing is written."""
    args = parse(OPTIONS[command], flags(start, data, out, **options), f"{command}.py")
    model, examples, run = setup(args, command, Player.class_of)
    return Player(model, run.work.eos_token_id, run.args, run.weights.dtype), examples, run


def spy(monkeypatch, where, name, look) -> None:
    """Replaces where.name by itself, after a look at its arguments."""
    original = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *a, **k: (look(a, k), original(*a, **k))[1])


def assert_same_logits_and_gradients(ours, theirs, ids: torch.Tensor, least: float) -> None:
    """Our model and that of transformers, within 1e-4: a gradient relative to its largest number, or to `least`."""
    logits, expected = ours.logits(ours(ids)), theirs(ids).logits
    assert (logits - expected).abs().max() <= 1e-4
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)) / logits.numel() ** 0.5
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    own, reference = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert own.keys() == reference.keys() - ({"lm_head.weight"} if ours.config.tie_word_embeddings else set())
    for key, parameter in own.items():
        gradient = reference[key].grad
        scale = gradient.abs().max().clamp(min=least)
        assert (parameter.grad - gradient).abs().max() <= 1e-4 * scale, key


def exact_logps(model: GPTNeo, items: list[tuple[list[int], ...]], temperature: float = 1.0) -> torch.Tensor:
    """log p, (R, B), in float64, each response in a row of its own, by a plain log-softmax over all tokens."""
    texts = [(prompt, response) for prompt, *responses in items for response in responses]
    ids = pad_sequence([torch.tensor(prompt + response) for prompt, response in texts], batch_first=True)
    logps = (model(ids) @ model.head_weight.T / temperature).log_softmax(-1)
    spans = [range(len(prompt) - 1, len(prompt + response) - 1) for prompt, response in texts]
    sums = [logps[i, span, response].sum() for i, (span, (_, response)) in enumerate(zip(spans, texts))]
    return torch.stack(sums).view(len(items), -1).T


class Died(Exception):
    """What ends a run in a test: an error that no code expects."""


def die_at(where, name, argv, fatal=lambda *args: True, script=spin) -> None:
    """Runs the script until it calls where.name(*args) such that fatal(*args): it dies there, before the call."""
    original = getattr(where, name)

    def call(*args, **kwargs):
        if fatal(*args):
            raise Died
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        patch.setattr(where, name, call)
        script.main(argv)


def assert_resumes(argv, script=spin) -> None:
    """A run in ./run that died ends with the same files as one that was never stopped."""
    assert script.main(argv) == 0
    resumed = tree(Path("run"))
    shutil.rmtree("run")
    assert script.main(argv) == 0
    assert tree(Path("run")) == resumed


def rows(path) -> list[Any]:
    """The values of a file of JSON Lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, values: Iterable[Any]) -> Path:
    """Writes a file of JSON Lines, and returns its path."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def tree(folder) -> dict[str, bytes]:
    """All files below a folder, by their relative paths, but those that hold times: no two runs agree in them."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("times.jsonl", "report.html")]
    found = {str(p.relative_to(folder)): p.read_bytes() for p in files}
    for name in [name for name in found if name.endswith("checksums")]:
        # The last line of a file counts; a process that was killed may leave an older one, or another order.
        lines = {line[66:]: line for line in found[name].splitlines()}
        found[name] = b"\n".join(sorted(lines.values()))
    return found


def failed(argv, capsys, code=2, script=spin) -> str:
    """The one line on stderr of a command that ends with this exit code."""
    assert script.main([str(a) for a in argv]) == code
    error = capsys.readouterr().err
    folder, _, name = script.__name__.rpartition(".")
    program = f"python -m methods.{name}" if folder == "methods" else f"{name}.py"
    assert error.startswith(f"{program}: error: ") and error.count("\n") == 1, error
    return error


def refused(argv, out, capsys, script=spin) -> str:
    """The one line that a refused command prints; checks that no file was written."""
    error = failed(argv, capsys, script=script)
    assert not out.exists() or not any(out.iterdir())
    return error


def random_model(vocab_size: int, end: int, **changes) -> GPTNeo:
    """A GPT-Neo of a few thousand random weights, with a global and a local layer. `end` is its end token."""
    like = dict(max_position_embeddings=64, hidden_size=16, num_layers=2, num_heads=2, window_size=4)
    like |= dict(attention_types=((("global", "local"), 1),), initializer_range=0.2, bos_token_id=end, eos_token_id=end)
    config = GPTNeoConfig(vocab_size=vocab_size, **(like | changes))
    return GPTNeo(config).init_weights(torch.Generator().manual_seed(0)).eval()


def known_model() -> GPTNeo:
    """A model without attention, MLP and positions: a known table gives the next token from the current one alone."""
    kinds = ((("global",), 1),)
    model = random_model(11, 10, hidden_size=8, num_layers=1, attention_types=kinds, initializer_range=0.02)
    with torch.no_grad():
        model.transformer["wpe"].weight.zero_()
        for module in (model.transformer["h"][0].attn.attention.out_proj, model.transformer["h"][0].mlp.c_proj):
            module.weight.zero_()
    return model


def player_of(model: GPTNeo, dtype: torch.dtype = torch.float32, **options) -> Player:
    """A model as a player outside any run."""
    return Player(model, model.config.eos_token_id, OPTIONS["spin"](**options), dtype)


@torch.no_grad()
def set_temperature(player: Player, temperature: float) -> None:
    """Divides the logits by the temperature: the head has no bias, so the final norm's output may be scaled."""
    for parameter in player.model.transformer["ln_f"].parameters():
        parameter /= temperature


def script_responses(monkeypatch, ids: list[list[int]], finished: list[bool]) -> None:
    """Every model now responds with these ids, whatever it is asked, and says that each has the log-probability -1."""
    responses = sampling.Responses(ids, finished, [[-1.0] * len(i) for i in ids])
    monkeypatch.setattr(sampling, "respond", lambda *a, **k: responses)
