#!/usr/bin/env python3
"""SEFT: Self-Evolution Fine-Tuning (Chen et al., 2024, arXiv 2406.10813): a reviser teaches the policy.

    python seft.py --out runs/reviser                               trains a reviser for the embedded task
    python seft.py --reviser runs/reviser --out runs/seft --lr 1e-4   evolves the policy by its revisions
    python seft.py --pairs F.jsonl --model DIR --out runs/reviser   trains the reviser on given pairs
    python seft.py --help                                        every option

1. The *reviser* is fine-tuned to turn (prompt, weaker response) into the better response. Weaker responses are those of
   the start to the prompts of --data, the pairs of SPIN's first iteration, or those of --pairs. Each real response is
   also its own revision, so that the reviser leaves good responses as they are.
2. The *policy* responds to prompts, the reviser revises the responses, and the policy is fine-tuned on the revisions,
   for --iterations rounds. The prompts need no answers; an answer in --data is not looked at.

Both phases are supervised (sft.py's loss). Held-out metrics of a reviser are those of its revisions of the start's
held-out responses; compare "sampled" with the policy's own.

Source: the paper's abstract and a published summary of it, which tell of a preliminary reviser trained as above and of
an adaptive one that improves low-quality responses and maintains high-quality ones. Simplified here: one reviser, which
learns to maintain from real -> real pairs, without an explicit decision on how much to revise, and one pass over all
prompts, which are not grouped by difficulty.

Cost: the reviser is a second model. It is read from disk when a round's responses are written and dropped before
training begins, so a round needs two models' weights while it generates, but no gradients or optimizer state then, and
one model's while it trains. It writes two responses a prompt, the second behind a prompt that holds the first.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import sft
from model import GPTNeo, GPTNeoConfig
from player import Player
from runtime import cli, record, storage
from runtime.data import Example, Pair, read_tokenizer
from runtime.evaluate import Row, mean
from runtime.options import Args, as_typed, is_utf8, option, shown, valid
from runtime.run import Run
from runtime.stopping import Stopped
from spin import optimize

PLACEHOLDERS = ("{prompt}", "{response}")


def play(player: Player, examples: list[Example], run: Run) -> None:
    """The phase that the options ask for."""
    (evolve if run.args.reviser else train_reviser)(player, examples, run)


# ---------------------------------------------------------------- the reviser


def train_reviser(player: Player, examples: list[Example], run: Run) -> None:
    """Fine-tunes the player on (prompt, weaker response) -> real and on (prompt, real) -> real."""
    to_revise = reviser_prompts(run)
    run.enter(0)  # the player is the start, whose responses are written now and found again by a resumed run
    add_weaker(player, run.heldout, "weaker-heldout", run)
    for t in range(run.args.iterations):
        add_weaker(player, run.prompts(examples, t), f"weaker-{t}", run)
    run.heldout = [to_revise(e, e.generated_ids) for e in run.heldout]
    for t in run.iterations(player):
        chosen = run.prompts(examples, t)
        lessons = [to_revise(e, ids) for e in chosen for ids in (e.generated_ids, e.real_ids)]
        signals = train(player, lessons, t, run)
        run.finish_iterate(player, run.evaluate(player) | {"pairs": len(lessons)} | signals)


def add_weaker(start: Player, examples: list[Example], name: str, run: Run) -> None:
    """The start responds to the examples that have no weaker response yet."""
    args = run.args
    missing = [e for e in examples if not e.generated_ids]
    responses = run.respond(start, missing, name, run.seed(0, name), args.temperature, args.top_k, args.top_p)
    for example, (ids, _) in zip(missing, responses):
        example.generated_ids = ids


def reviser_prompts(run: Run) -> Callable[[Example, list[int]], Example]:
    """The function that puts an example's prompt and a response to it into --revise-template, for both phases.

    {prompt} is the prompt as the policy reads it, with --template, and {response} its response without the
    end-of-sequence token. Ids are joined, so that the reviser reads the very ids that the policy sampled.
    """
    tokenizer, eos = run.tokenizer, run.eos_token_id
    tokenizer.encode_special_tokens = False  # those in the template count
    texts = re.split(r"(\{prompt\}|\{response\})", run.args.revise_template.replace(r"\n", "\n"))
    pieces = [t if t in PLACEHOLDERS else tokenizer.encode(t, add_special_tokens=False).ids for t in texts]

    def to_revise(example: Example, response_ids: list[int]) -> Example:
        bare = response_ids[:-1] if response_ids[-1] == eos else response_ids
        values = dict(zip(PLACEHOLDERS, (example.prompt_ids, bare)))
        prompt_ids = [token for piece in pieces for token in (values[piece] if isinstance(piece, str) else piece)]
        return replace(example, prompt_ids=prompt_ids, generated_ids=[])

    return to_revise


def train(player: Player, examples: list[Example], t: int, run: Run) -> Row:
    """Supervised fine-tuning on the examples' real responses."""
    return optimize(player, examples, sft.token_loss(player, examples), t, run)


# ---------------------------------------------------------------- the policy


def evolve(policy: Player, examples: list[Example], run: Run) -> None:
    """Rounds of: the policy responds, the reviser revises, the policy is fine-tuned on the revisions."""
    for t in run.iterations(policy):
        prompts = run.prompts(examples, t)
        pairs, counts = revise(generate(policy, prompts, t, run), prompts, t, run)
        targets = [Example("", 0, "", "", [], prompt_ids=p.prompt_ids, real_ids=p.real_ids) for p in pairs]
        signals = train(policy, targets, t, run)
        run.finish_iterate(policy, run.evaluate(policy) | counts | signals, pairs)


def generate(policy: Player, examples: list[Example], t: int, run: Run) -> list[tuple[list[int], bool]]:
    """The policy's response to every prompt: (ids, whether it ended)."""
    args = run.args
    return run.respond(policy, examples, "generate", run.seed(t, "generate"), args.temperature, args.top_k, args.top_p)


def revise(
    responses: list[tuple[list[int], bool]], examples: list[Example], t: int, run: Run
) -> tuple[list[Pair], Row]:
    """The reviser's revision of every response, as pairs whose real response is the revision; and counts.

    Revisions that reached the length limit are left out: the policy would learn from texts that do not end. Those that
    are equal to the response stay: the policy learns to repeat what the reviser finds good.

    Raises: Stopped where no revision is left, or the reviser has changed since the run began.
    """
    args, to_revise = run.args, reviser_prompts(run)
    asked = [to_revise(e, ids) for e, (ids, _) in zip(examples, responses)]
    reviser = load_reviser(run)
    revisions = run.respond(reviser, asked, "revise", run.seed(t, "revise"), args.temperature, args.top_k, args.top_p)
    pairs = [
        Pair(e.prompt_ids, revised, ids, finished, prompt=e.asked)
        for e, (ids, finished), (revised, ended) in zip(examples, responses, revisions)
        if ended
    ]
    if not pairs:
        raise Stopped(f"iteration {t}: all {len(revisions)} revisions reached --max-new-tokens {args.max_new_tokens}")
    return pairs, {
        "pairs": len(pairs),
        "generated": len(responses),
        "identical": sum(p.real_ids == p.generated_ids for p in pairs),
        "truncated": mean([not finished for _, finished in responses]),
        "real_length": mean([len(p.real_ids) for p in pairs]),
        "generated_length": mean([len(p.generated_ids) for p in pairs]),
    }


def load_reviser(run: Run) -> Player:
    """The reviser, read anew in every round, so that it takes no memory while the policy trains."""
    folder = Path(run.args.reviser, "final")
    if storage.digest_of_model(folder) != run.record["digests"]["reviser"]:
        raise Stopped(f"--reviser {run.args.reviser}: has changed since the run began; restore it")
    model = GPTNeo.from_pretrained(folder, dtype=run.dtype, device=run.device)
    return Player(model.eval(), run.eos_token_id, run.args, run.dtype)


# ---------------------------------------------------------------- options


@dataclass(frozen=True)
class SeftArgs(Args):
    """The options of sft.py that SEFT has, too, those of sampling, and its own."""

    reviser: str = option(
        "", "Folder of a finished run that trained a reviser; without it, this run trains one.",
        group="SEFT", changeable=True,
    )  # fmt: skip
    pairs: tuple[str, ...] = option(
        (), 'Given pairs to train a reviser on, in place of --data: records also hold a "generated" response.',
        changeable=True, repeated="PATH", **valid(bool, "a path"),
    )  # fmt: skip
    revise_template: str = option(
        r"{prompt}{response}\n\n### Revision: ", "The reviser's prompt; {prompt} is the policy's, with --template.",
        **valid(lambda text: is_utf8(text) and all(p in text for p in PLACEHOLDERS),
                "text in UTF-8 with {prompt} and {response}"),
    )  # fmt: skip

    def check_together(self) -> None:
        super().check_together()
        self.require("pairs", not (self.pairs and self.data), "no --data with it: it takes its place")
        self.require("pairs", not (self.pairs and self.reviser), "no --reviser with it: pairs train a reviser")

    @property
    def source(self) -> tuple[str, tuple[str, ...], str]:
        if self.pairs:
            return "pairs", self.pairs, "pairs"
        return "data", self.data, "prompts" if self.reviser else "responses"

    @property
    def responses_per_prompt(self) -> int:
        return 2 if self.reviser else 0 if self.pairs else 1

    @property
    def items_per_prompt(self) -> int:
        return 1 if self.reviser else 2

    @property
    def models(self) -> int:
        return 2 if self.reviser else 1

    scoring_passes = 0

    def digests(self) -> dict[str, str]:
        """Refuses a folder without a finished reviser, or one that was trained on other prompts."""
        if not self.reviser:
            return {}
        folder = Path(self.reviser)
        found = record.read(folder) or {}
        args = found.get("args", {})
        if found.get("command") != "seft" or args["reviser"] or not found.get("finished"):
            raise ValueError(f"--reviser {shown(folder)}: expected the folder of a finished run that trained a reviser")
        record.check_finished(folder, found)
        for name in ("template", "revise_template"):
            asked = f"{as_typed(name, args[name])}, with which {shown(folder)} was trained"
            self.require(name, getattr(self, name) == args[name], asked)
        return {"reviser": storage.digest_of_model(folder / "final")}

    def prepare(self, model: GPTNeo, examples: list[Example], run: Run) -> None:
        """Checks that the reviser reads the policy's tokens, and that prompt, response and revision fit its context."""
        context = model.config.max_position_embeddings
        if self.reviser:
            folder = Path(self.reviser, "final")
            context = GPTNeoConfig.from_json(folder / "config.json").max_position_embeddings
            if read_tokenizer(folder)[0].get_vocab() != run.tokenizer.get_vocab():
                raise ValueError(f"--reviser {shown(self.reviser)}: its tokenizer is not that of --model")
            if unanswered := next((e for e in run.heldout if not e.real_ids), None):
                raise ValueError(
                    f"{unanswered.where}: held out, and has no response; expected --eval-data with answers"
                )
        to_revise = reviser_prompts(run)
        for group in [examples] if self.reviser else [examples, run.heldout]:
            kept = []
            for example in group:
                given = [] if self.reviser else [len(example.real_ids), len(example.generated_ids)]
                longest = max([self.max_new_tokens, *given])
                need = len(to_revise(example, [-1] * longest).prompt_ids) + longest
                if need <= context:
                    kept.append(example)
                elif self.overlong == "error":
                    raise ValueError(
                        f"{example.where}: needs {need} tokens for prompt, response and revision but the reviser's "
                        f"context is {context}; --overlong skip leaves such examples out"
                    )
            if not kept:
                raise ValueError(f"{group[0].path}: no example fits the reviser's context of {context} tokens")
            if len(kept) < len(group):
                print(f"left out {len(group) - len(kept)} of {len(group)} examples that no revision fits", flush=True)
            group[:] = kept


def main(argv: list[str] | None = None) -> int:
    return cli.main("seft", play, Player, SeftArgs, argv, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
