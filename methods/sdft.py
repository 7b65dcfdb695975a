"""SDFT: self-distillation fine-tuning (Shenfeld et al., 2026, arXiv 2601.19897): the model's better self teaches it.

    python -m methods.sdft --model DIR --data F.jsonl --out runs/sdft   learns from the responses of your data

In every step the player responds to the prompts of the batch. The *teacher* is the same model, but it reads the real
response in its prompt (--teacher-template). At each token of its own response the player is drawn to what the teacher
would say there. No token of the data is a target; by this the paper explains that the player forgets less than in
supervised training. It learns only what the model can learn from an example in its prompt.

Loss: the mean over the tokens of y' ~ p_theta of KL(p_theta(.|x, y'_<i) || p_teacher(.|x, y, y'_<i)), over the whole
vocabulary, with y from the data. No gradient passes through the draw of y'. Optimum: the teacher.

Deviation: the paper's teacher is a moving average of the player. Here it is the player at the beginning of the
iteration, which a resumed run knows; more --iterations renew it more often. Responses depend on the number of ranks.
"""

import copy
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data.examples import Example, encode, fit_context
from data.templates import choose
from kernels.divergence import linear_kl
from player import Player
from runtime import cli
from runtime.run import Run
from spin import SpinOptions, TrainingOptions, optimize, option


def play(player: Player, examples: list[Example], run: Run) -> None:
    """Distils the teacher into the player, for --iterations rounds of --epochs each."""
    prompts = {e.line: e.prompt_ids for e in teacher_prompts(examples, run)}
    for t in run.iterations(player):
        signals = optimize(player, run.prompts(examples, t), distillation(player, prompts, run), t, run)
        run.finish_iterate(player, run.evaluate(player) | signals)


def distillation(player: Player, prompts: dict[int, list[int]], run: Run) -> Callable[[list], dict[str, Tensor]]:
    """Returns the loss for `optimize`, of a teacher with the player's present weights and these prompts by line."""
    frozen = {id(p): p for p in player.model.parameters() if not p.requires_grad}
    teacher = copy.copy(player)
    teacher.model = copy.deepcopy(player.model, frozen).eval()  # Both share what is frozen; the teacher has no dropout.

    def loss_of(batch: list[Example]) -> dict[str, Tensor]:
        asked, lines = [e.prompt_ids for e in batch], [e.line for e in batch]
        seed = torch.initial_seed()  # A step of training has a seed of its own.
        answers = [ids for ids, _ in player.respond(asked, seed, rows=lines, temperature=run.args.temperature)]
        with torch.no_grad():
            target = teacher.predictions(list(zip(map(prompts.get, lines), answers)))
        kl = linear_kl(*player.predictions(list(zip(asked, answers))), *target)
        return {"loss": torch.stack([tokens.mean() for tokens in kl.split(list(map(len, answers)))])}

    return loss_of


def teacher_prompts(examples: list[Example], run: Run) -> list[Example]:
    """Copies of the examples, in which --teacher-template has written the user's last turn."""
    parts = re.split(r"(\{prompt\}|\{response\})", run.args.teacher_template.replace(r"\n", "\n"))
    written, tokenizer = [], run.work.tokenizer
    for e in examples:
        texts = {"{prompt}": e.turns[-1][1] if e.turns else e.prompt, "{response}": e.response}
        text = "".join(texts.get(part, part) for part in parts)
        written.append(replace(e, prompt=text, turns=e.turns and (*e.turns[:-1], ("user", text))))
    template = choose(run.record["template"], run.weights.start, tokenizer, False, run.args.special_tokens)
    encode(written, tokenizer, template, run.work.eos_token_id)
    return written


@dataclass(frozen=True)
class SdftOptions(TrainingOptions):
    """The options of SDFT."""

    # fmt: off
    temperature: float = SpinOptions.__dataclass_fields__["temperature"]
    teacher_template: str = option(
        r"{prompt}\n\nThis is a good answer:\n{response}\n\nNow give an answer of your own.",
        "The teacher's prompt, around which --template is then put, as around any prompt.",
        check=lambda text: "{prompt}" in text and "{response}" in text, expected="text with {prompt} and {response}")
    # fmt: on

    def check_together(self) -> None:
        super().check_together()
        self.require(not self.fsdp, "--fsdp is not for SDFT: the player responds while it is trained")

    def prepare(self, model: Any, examples: list[Example], run: Run) -> None:
        """Refuses or leaves out examples if the teacher's prompt and a response do not fit the context."""
        room, longer = self.max_new_tokens, teacher_prompts(examples, run)
        context = model.config.max_position_embeddings
        examples[:], skipped = fit_context(examples, context, room, self.overlong, longer)
        if skipped:
            print(f"left out {skipped} examples that the teacher's prompt does not fit", flush=True)


def main(argv: list[str] | None = None) -> int:
    return cli.main("sdft", play, Player, SdftOptions, argv, about=__doc__, recipe="", program="python -m methods.sdft")


if __name__ == "__main__":
    sys.exit(main())
