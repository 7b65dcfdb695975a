#!/usr/bin/env python3
"""SEFT: Self-Evolution Fine-Tuning (Chen et al., 2024, arXiv 2406.10813): a reviser teaches the policy.

    python examples/seft.py --out runs/reviser                                 trains a reviser for the embedded task
    python examples/seft.py --reviser runs/reviser --out runs/seft --lr 1e-4   evolves the policy by its revisions
    python examples/seft.py --pairs F.jsonl --model DIR --out runs/reviser     trains the reviser on given pairs
    python examples/seft.py --help                                             every option

1. The *reviser* is fine-tuned to turn (prompt, weaker response) into the better response. Weaker responses are those of
   the start to the prompts of --data, the pairs of SPIN's first iteration, or those of --pairs. Each real response is
   also its own revision, so that the reviser leaves good responses as they are.
2. The *policy* responds to prompts, the reviser revises the responses, and the policy is fine-tuned on the revisions,
   for --iterations rounds. The prompts need no answers; an answer in --data is not looked at.

Both phases are supervised (sft.py's loss). Held-out metrics of a reviser are those of its revisions of the start's
held-out responses; compare "sampled" with the policy's own. The reviser is a second model, in memory only while a
round's responses are revised.

Source: the paper's abstract and a published summary of it. Simplified here: one reviser, which learns to maintain good
responses from real -> real pairs, without an explicit decision on how much to revise, and one pass over all prompts,
which are not grouped by difficulty.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.examples import Example, fit_context, read_tokenizer
from data.files import shown
from player import Player
from runtime import cli
from runtime.folder import Folder
from runtime.options import as_typed, option
from runtime.resume import digest_of_model
from runtime.run import Run
from runtime.stopping import Stopped
from sft import token_loss
from spin import Pair, Row, SpinOptions, TrainingOptions, optimize, select

PLACEHOLDERS = ("{prompt}", "{response}")
SPIN = SpinOptions.__dataclass_fields__


def play(player: Player, examples: list[Example], run: Run) -> None:
    """The phase that the options ask for."""
    (evolve if run.args.reviser else train_reviser)(player, examples, run)


def train_reviser(player: Player, examples: list[Example], run: Run) -> None:
    """Fine-tunes the player on (prompt, weaker response) -> real and on (prompt, real) -> real."""
    to_revise = reviser_prompts(run)
    run.enter(0)  # The player is the start: a resumed run finds again what it writes now.
    add_weaker(player, run.work.heldout, "weaker-heldout", run)
    for t in range(run.args.iterations):
        add_weaker(player, run.prompts(examples, t), f"weaker-{t}", run)
    run.work.heldout = [to_revise(e, e.generated_ids) for e in run.work.heldout]
    for t in run.iterations(player):
        chosen = run.prompts(examples, t)
        lessons = [to_revise(e, ids) for e in chosen for ids in (e.generated_ids, e.real_ids)]
        signals = train(player, lessons, t, run)
        run.finish_iterate(player, run.evaluate(player) | {"pairs": len(lessons)} | signals)


def train(player: Player, examples: list, t: int, run: Run) -> Row:
    """Supervised fine-tuning on the real responses of examples or pairs."""
    return optimize(player, examples, token_loss(player, examples), t, run)


def add_weaker(start: Player, examples: list[Example], name: str, run: Run) -> None:
    """The start responds to the examples that have no weaker response yet."""
    missing = [e for e in examples if not e.generated_ids]
    for example, (ids, _) in zip(missing, run.sample(start, missing, 0, name)):
        example.generated_ids = ids


def reviser_prompts(run: Run) -> Callable[[Example, list[int]], Example]:
    """The function that puts an example's prompt and a response to it into --revise-template, for both phases.

    {prompt} is the prompt as the policy reads it, with --template, and {response} its response without the
    end-of-sequence token. Ids are joined, so that the reviser reads the very ids that the policy sampled.
    """
    tokenizer, eos = run.work.tokenizer, run.work.eos_token_id
    tokenizer.encode_special_tokens = False  # those in the template count
    texts = re.split(r"(\{prompt\}|\{response\})", run.args.revise_template.replace(r"\n", "\n"))
    pieces = [t if t in PLACEHOLDERS else tokenizer.encode(t, add_special_tokens=False).ids for t in texts]

    def to_revise(example: Example, response_ids: list[int]) -> Example:
        bare = response_ids[:-1] if response_ids[-1] == eos else response_ids
        values = dict(zip(PLACEHOLDERS, (example.prompt_ids, bare)))
        prompt_ids = [token for piece in pieces for token in (values[piece] if isinstance(piece, str) else piece)]
        return replace(example, prompt_ids=prompt_ids, generated_ids=[])

    return to_revise


def evolve(policy: Player, examples: list[Example], run: Run) -> None:
    """Rounds of: the policy responds, the reviser revises, the policy is fine-tuned on the revisions."""
    for t in run.iterations(policy):
        prompts = run.prompts(examples, t)
        responses = run.sample(policy, prompts, t, "generate")
        pairs, counts = revise(responses, prompts, t, run)
        signals = train(policy, [replace(pair, generated_ids=[]) for pair in pairs], t, run)
        run.finish_iterate(policy, run.evaluate(policy) | counts | signals, pairs)


def revise(responses: list[tuple], examples: list[Example], t: int, run: Run) -> tuple[list[Pair], Row]:
    """The reviser's revision of every response, as the real one of a pair, and counts.

    Revisions that reached the length limit are left out: the policy would learn from texts that do not end. Those that
    are equal to the response stay: the policy learns to repeat what the reviser finds good.

    Raises: Stopped if no revision is left, or the reviser has changed since the run began.
    """
    to_revise = reviser_prompts(run)
    asked = [to_revise(e, ids) for e, (ids, _) in zip(examples, responses)]
    found = zip(examples, responses, run.sample(load_reviser(run), asked, t, "revise"))
    pairs = [Pair(e.prompt_ids, new, [ids], ended, e.asked) for e, (ids, ended), (new, new_ended) in found if new_ended]
    if not pairs:
        raise Stopped(f"iteration {t}: all {len(asked)} revisions reached --max-new-tokens {run.args.max_new_tokens}")
    counts = {"generated": len(responses), "truncated": fmean(not ended for _, ended in responses)}
    return pairs, select(pairs, "keep", drop_identical=False)[1] | counts


def load_reviser(run: Run) -> Player:
    """The reviser, read anew in every round, so that it takes no memory while the policy trains."""
    path = Path(run.args.reviser, "final")
    if digest_of_model(path) != run.record["digests"]["reviser"]:
        raise Stopped(f"--reviser {run.args.reviser}: has changed since the run began; restore it")
    model = Player.class_of(path).from_pretrained(path, dtype=run.weights.dtype, device=run.device)
    return Player(model.eval(), run.work.eos_token_id, run.args, run.weights.dtype)


# ---------------------------------------------------------------- options


@dataclass(frozen=True)
class SeftOptions(TrainingOptions):
    """The options of SEFT."""

    temperature: float = SPIN["temperature"]
    top_k: int = SPIN["top_k"]
    top_p: float = SPIN["top_p"]
    # fmt: off
    reviser: str = option("", "Folder of a finished run that trained a reviser; default: this run trains one.",
                          changeable=True)
    pairs: tuple[str, ...] = option(
        (), 'Given pairs to train a reviser on, in place of --data: records also hold a "generated" response.',
        changeable=True, metavar="PATH")
    revise_template: str = option(
        r"{prompt}{response}\n\n### Revision: ", "The reviser's prompt; {prompt} is the policy's in its --template.",
        check=lambda text: all(p in text for p in PLACEHOLDERS), expected="text with {prompt} and {response}")
    # fmt: on

    def check_together(self) -> None:
        super().check_together()
        self.require(not (self.pairs and self.data), "--pairs replaces --data: give only one of them")
        self.require(not (self.pairs and self.reviser), "--pairs is for training a reviser: leave out --reviser")

    @property
    def source(self) -> tuple[str, tuple[str, ...], str]:
        if self.pairs:
            return "pairs", self.pairs, "pairs"
        return "data", self.data, "prompts" if self.reviser else "responses"

    def digests(self) -> dict[str, str]:
        """Refuses a folder without a finished reviser, or one that was trained on other prompts."""
        if not self.reviser:
            return {}
        path = Path(self.reviser)
        found = Folder(path).record() or {}
        args = found.get("args", {})
        if found.get("command") != "seft" or args["reviser"] or not found.get("finished"):
            raise ValueError(f"--reviser {shown(path)}: expected the folder of a finished run that trained a reviser")
        Folder(path).check()
        for name in ("template", "revise_template"):
            asked = f"{as_typed(name, args[name])}, with which {shown(path)} was trained"
            self.require(getattr(self, name) == args[name], f"{as_typed(name, getattr(self, name))}: expected {asked}")
        return {"reviser": digest_of_model(path / "final")}

    def prepare(self, model: Any, examples: list[Example], run: Run) -> None:
        """Checks that the reviser reads the policy's tokens, and that prompt, response and revision fit its context."""
        context = model.config.max_position_embeddings
        if self.reviser:
            path = Path(self.reviser, "final")
            context = Player.class_of(path).config_class.from_json(path / "config.json").max_position_embeddings
            if read_tokenizer(path)[0].get_vocab() != run.work.tokenizer.get_vocab():
                raise ValueError(f"--reviser {shown(self.reviser)}: its tokenizer is not that of --model")
            if unanswered := next((e for e in run.work.heldout if not e.real_ids), None):
                expected = "held out, and has no response; expected --eval-data with answers"
                raise ValueError(f"{unanswered.where}: {expected}")
            examples[:] = [replace(e, real_ids=[], generated_ids=[]) for e in examples]  # Their answers are not read.
        to_revise = reviser_prompts(run)
        for group in [examples] if self.reviser else [examples, run.work.heldout]:
            longest = [[-1] * max(self.max_new_tokens, len(e.real_ids), len(e.generated_ids)) for e in group]
            revised = [replace(to_revise(e, ids), real_ids=ids) for e, ids in zip(group, longest)]
            group[:], left_out = fit_context(group, context, self.max_new_tokens, self.overlong, revised)
            if left_out:
                print(f"left out {left_out} examples that no revision fits", flush=True)


def main(argv: list[str] | None = None) -> int:
    return cli.main("seft", play, Player, SeftOptions, argv, about=__doc__, recipe="pronounce-seft.args")


if __name__ == "__main__":
    sys.exit(main())
