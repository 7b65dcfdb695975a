"""What evidence.py runs: every start, and every setting of self-play with the controls that stand beside it.

The settings were written down before any of them was run, except for those that say otherwise, and all are reported.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Start:
    """A model that self-play starts from, by supervised training with `flags`. Files are those of write_data."""

    data: str = ""  # what it is trained on; "": it is the shipped start
    flags: str = ""
    origin: str = ""  # another start, whose weights training goes on from; "": from scratch
    width: int = 64
    model: str = "pronounce/start"  # whose config and tokenizer a start from scratch has
    play: str = "words"  # what self-play and its control are given
    prompts: int = 5000  # an iteration
    iterations: int = 2
    test: str = "test"  # what they are measured on
    limit: str = "--max-new-tokens 32"
    measure: str = "sampled_error"  # what cases are judged by
    control: str = "--epochs 2"  # flags with which supervised training costs about as much as self-play
    draws: int = 0  # of its frontier at the temperatures of GRID, whose mean then stands for it at equal entropy


SHIPPED = Start()
FEW = Start("few", "--epochs 20 --batch 64 --lr 3e-3 --weight-decay 0.3", play="few", prompts=8000, iterations=1)
# Many definitions are good ones, and short ones have a low edit distance, so they are judged by words that they share
# with a reference: by all of them at first ("sampled"), later by those that are not the most frequent ones ("content").
GLOSSES = Start(
    "glosses", "--epochs 6 --lr 3e-3 --batch 64 --weight-decay 0.1", width=96, model="glosses/start", play="glosses",
    prompts=2500, test="test-glosses", limit="--max-new-tokens 48", measure="sampled",
)  # fmt: skip
STARTS = {
    "underfitted": SHIPPED,
    "converged": Start("all", "--epochs 10 --lr 3e-3 --weight-decay 0.1"),
    "narrow": Start("all", "--epochs 4 --lr 5e-3 --weight-decay 0.1", width=32),
    "wide": Start("all", "--epochs 4 --lr 3e-3 --weight-decay 0.1", width=96),
    "few words": FEW,
    "few words, other words": replace(FEW, play="other", prompts=5000, iterations=2),  # words that are new to it
    "glosses": GLOSSES,
    # Prompts that are new to all settings.
    "glosses, other prompts": replace(GLOSSES, test="test-glosses-again", measure="content", draws=4),
    "long": Start(
        "long", "--epochs 4 --batch 64 --lr 3e-3 --weight-decay 0.1", "underfitted", play="long", prompts=2000,
        test="test-long", limit="--max-new-tokens 64",
    ),
}  # fmt: skip
# Each again, for the greedy opponent, whose cases were added when the weights of the other runs were gone.
STARTS |= {f"{name}, again": start for name, start in STARTS.items()}
STARTS["glosses, again"] = replace(GLOSSES, measure="content")
STARTS["glosses, four draws"] = replace(GLOSSES, draws=4)
STARTS |= {  # of the ways to learn from demonstrations alone: the shipped start twice, and one that SDFT can teach
    "shipped": replace(SHIPPED, prompts=2500),
    "reads answers": Start("answers", "--epochs 2 --lr 3e-3", "underfitted", prompts=2500),
    "eight words": replace(SHIPPED, play="eight", prompts=40, iterations=3, control="--epochs 18 --batch 8"),
}


@dataclass(frozen=True)
class Case:
    """One setting of a script, over several seeds. A later flag replaces an earlier one."""

    regime: str  # the table that it stands in
    start: str
    name: str
    flags: str
    script: str
    prompts: int
    iterations: int
    iterates: tuple[int, ...]  # that are measured
    seeds: int = 3
    first_seed: int = 0

    @property
    def is_control(self) -> bool:
        return self.name.startswith("supervised")

    @property
    def group(self) -> tuple:
        """Cases that share a control."""
        return self.start, self.prompts, self.iterations, self.first_seed

    @property
    def key(self) -> str:
        return " | ".join([self.start, self.script, self.flags, f"{self.iterations} x {self.prompts}"])

    @property
    def runs(self) -> dict[str, int]:
        """The seed of each run, by the run's key."""
        return {f"{self.key} | {seed}": seed for seed in range(self.first_seed, self.first_seed + self.seeds)}


SCRIPTS = {"--loss dft": "sft", "--teacher-template": "sdft", "--placebo": ""}  # by how flags begin; otherwise spin
FAMILY = ("--alpha", "--history", "--loss", "--nll-weight", "--samples", "--reference", "--ditto")
SCRIPTS |= dict.fromkeys(FAMILY, "family")
CASES: list[Case] = []  # in the order of the runs: if the time is short, the last are left out


def add(regime: str, start: str, rates: str, *settings: str, **facts) -> None:
    """Adds "NAME: FLAGS" or "FLAGS" of self-play, and continued supervised training at these rates as their control."""
    facts = dict(prompts=STARTS[start].prompts, iterations=STARTS[start].iterations) | facts
    facts.setdefault("iterates", (facts["iterations"],))
    for setting in settings:
        name, _, flags = setting.rpartition(": ")
        script = next((script for flag, script in SCRIPTS.items() if flags.startswith(flag)), "spin")
        CASES.append(Case(regime, start, name or f"SPIN, {flags.replace('--', '')}", flags, script, **facts))
    for rate in rates.split():
        flags = f"{STARTS[start].control} --lr {rate}"
        CASES.append(Case(regime, start, f"supervised, lr {rate}", flags, "sft", **facts))


# ---------------------------------------------------------------- the settings

# fmt: off
add("temperature and beta", "converged", "3e-5 3e-4", "SPIN: ")
add("temperature and beta", "converged", "",
    "SPIN, T 0.8, beta 1: --temperature 0.8 --beta 1", "SPIN, T 1.2, beta 1: --temperature 1.2 --beta 1",
    "SPIN, T 1.5, beta 1: --temperature 1.5 --beta 1", "SPIN, T 1.5, beta 3: --temperature 1.5 --beta 3",
    "SPIN, T 1, beta 0.3: --temperature 1 --beta 0.3", "SPIN, T 1, beta 3: --temperature 1 --beta 3")
add("learning rate", "converged", "", "--lr 3e-5", "--lr 3e-4")
add("few words", "few words", "1e-5 1e-4", "--lr 1e-5", "--lr 3e-5", "--lr 1e-4")
add("few words", "few words", "",
    "alpha-SPIN 0.3, lr 3e-5: --alpha 0.3 --lr 3e-5", "SPIN, NLL term, lr 3e-5: --nll-weight 1 --lr 3e-5",
    "alpha-SPIN 0.3, lr 1e-4: --alpha 0.3 --lr 1e-4", "SPIN, NLL term, lr 1e-4: --nll-weight 1 --lr 1e-4",
    "SPIN, LoRA 16, lr 1e-4: --rank 16 --lr 1e-4", "SPIN, LoRA 16, lr 3e-4: --rank 16 --lr 3e-4")
add("few words", "few words", "1e-5", "SPIN, lr 1e-5, four iterations: --lr 1e-5", iterations=4)
for start in ("underfitted", "narrow", "wide", "few words, other words"):
    add("start", start, "1e-4 3e-4", "--lr 1e-4", "--lr 3e-4")
add("long responses", "long", "1e-4 3e-4", "--temperature 1", "--temperature 1.2", "--lr 3e-4")
add("definitions", "glosses", "3e-5 1e-4 3e-4", "--temperature 1", "--temperature 1.2", "--lr 3e-4")
# Chosen after those of "definitions" were run.
add("hot definitions", "glosses", "", "--temperature 1.5", "--temperature 1.5 --beta 3", "--temperature 2 --beta 3",
    "--temperature 1.2 --lr 3e-5", "--temperature 1.5 --lr 3e-5")
# Chosen after those, and measured on other prompts, by content words: a hot opponent teaches to write more frequent
# words than people do, for which F1 has points.
add("definitions again", "glosses, other prompts", "3e-5", "--temperature 1.5", "--temperature 1.2 --lr 3e-5",
    "--temperature 2 --beta 3", seeds=5, first_seed=10)
# A hot opponent, iteration by iteration, as theory has it.
add("hot opponent", "converged", "1e-4", "SPIN, T 1.5, beta 1: --temperature 1.5 --beta 1",
    "SPIN, T 1.5, beta 3: --temperature 1.5 --beta 3", seeds=2, iterations=4, iterates=(1, 2, 3, 4))
add("pairs", "converged", "1e-4", "SPIN, 625 prompts: ", prompts=625)
add("pairs", "converged", "1e-4", "SPIN, 10000 prompts: ", prompts=10_000)
add("iterations", "converged", "1e-4", "SPIN: ", prompts=2500, iterations=6, iterates=(1, 2, 4, 6))
add("iterations", "converged", "", "SPIN, previous pairs: --mix-previous", prompts=2500, iterations=6,
    iterates=(2, 4, 6))
add("adapters", "converged", "", "SPIN, LoRA 4, lr 3e-4: --rank 4 --lr 3e-4",
    "SPIN, LoRA 32, lr 3e-4: --rank 32 --lr 3e-4")
add("methods", "converged", "",  # each at SPIN's settings but for its beta
    "alpha-SPIN 0.3: --alpha 0.3", "fictitious play: --history 0", "hinge: --loss hinge", "IPO: --loss ipo",
    "SPPO: --loss sppo", "SPACE: --loss space", "T-SPIN: --loss tspin --beta 0.1", "SPIF: --loss spif",
    "IRIS: --loss iris", "SPIN, NLL term: --nll-weight 1", "SPIN, four responses: --samples 4",
    "SPIN, T 1.5, beta 3, sampled reference: --reference sampled --temperature 1.5 --beta 3", seeds=2)
# All that follows was added after the others had been run. First the opponent of the official script: one response per
# prompt, the likeliest.
for start, rate in {
    "underfitted": "1e-4", "few words": "1e-5", "converged": "3e-5", "glosses": "3e-5",
    "few words, other words": "3e-4", "long": "3e-5", "narrow": "3e-5", "wide": "3e-5",
}.items():
    add("greedy opponent", f"{start}, again", rate, "--temperature 0", "--temperature 0 --lr 1e-5")
# The start itself, with other samples: what the noise of a start's frontier looks like.
for start in ("glosses, again", "glosses, four draws"):
    add("placebo", start, "", "the start itself: --placebo", iterations=1, first_seed=10)
# Ways to learn from demonstrations alone.
add("demonstrations", "shipped", "1e-4", "SPIN: ", "GSIL: --loss gsil", "DFT: --loss dft --epochs 2 --lr 1e-4",
    "SDFT: --teacher-template {response}={prompt}", seeds=2)
add("demonstrations", "reads answers", "1e-4", "SDFT: --teacher-template {response}={prompt}", "SPIN: ", seeds=2)
add("demonstrations", "eight words", "1e-4", "DITTO: --ditto --samples 10 --alpha 1 --batch 8",
    "SPIN: --samples 10 --epochs 3 --batch 8", seeds=2)
