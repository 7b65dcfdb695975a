"""What a player is asked for: responses, log-probabilities and values of metrics, in shards that survive a crash."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from data.examples import Example, decode
from evaluate import DECODINGS, Metric, Row
from runtime.folder import Folder, in_shards
from runtime.progress import Bar, Progress
from runtime.stopping import SIGNALS, Stopped

SHARDS = 32  # Aim for 32 shards per phase, within the limits below.
SHARD_BATCHES = 4, 64  # fewest and most batches of responses per shard
SCORE_SHARD = 256, 1024  # fewest and most items per shard of log-probabilities
VALUE_SHARD = 1, 1024  # fewest and most values per shard of a function of the user's, which may be slow


def seed_of(seed: int, t: int, purpose: str) -> int:
    """A seed for one purpose in one iteration: no phase disturbs the random numbers of another."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{t}/{purpose}".encode()).digest()[:8], "big") >> 1


@dataclass
class Work:
    """Asks a player, in shards that ranks share and that a resumed run finds again; evaluate.py asks through it."""

    args: Any  # the options
    tokenizer: Tokenizer
    eos_token_id: int  # This token ends the real responses.
    heldout: list[Example]
    metrics: dict[str, Metric] = field(default_factory=dict)  # the functions of --metric by name
    batch: int = 64  # --gen-batch as the run began: it decides the size of a shard
    ends: Sequence[int] = ()  # Further tokens end generated responses if the model lists several.
    folder: Folder | None = None  # where shards are kept; None outside the iterations of a run
    progress: Progress = field(default_factory=Progress)

    def respond(
        self, player: Any, examples: list[Example], name: str, seed: int, temperature: float = 1.0, **options: Any
    ) -> list[tuple]:
        """The player's response to each example's prompt: (ids, whether it ended). `name` names the shards.

        `options` are those of Player.respond: top_k, top_p and with_logps, which adds log p of every token, in nats.
        """
        options |= {"temperature": temperature}

        def work(part: range, advance: Callable[[int], None]) -> list[tuple]:
            prompts = [examples[i].prompt_ids for i in part]
            return player.respond(prompts, seed, rows=part, progress=lambda rows, tokens: advance(rows), **options)

        try:
            return self._work(name, len(examples), [n * self.batch for n in SHARD_BATCHES], work)
        except FloatingPointError as error:
            raise Stopped(f"responses for '{name}': {error}") from None

    def logps(
        self, player: Any, items: Sequence[tuple], name: str, temperature: float = 1.0, by_token: bool = False
    ) -> list[list[float]]:
        """log p(response | prompt), nats, of every response of every item (prompt ids, response ids, ...).

        `by_token` requires one response per item, and gives one number per token of it.
        """

        def work(part: range, advance: Callable[[int], None]) -> list[list[float]]:
            return player.logps(items[part.start : part.stop], advance, temperature, by_token)

        return self._work(name, len(items), SCORE_SHARD, work)

    def measure(
        self, name: str, rows: Sequence[Row], decodings: Iterable[str] = DECODINGS, where: str = ""
    ) -> list[list[float]]:
        """What a function of --metric gives each row of `evaluate.answers`: one number for each of `decodings`."""

        def values(row: Row) -> list[float]:
            return [self.metrics[name](row["prompt"], row[decoding], row["references"]) for decoding in decodings]

        return self.each(f"metric-{name}{where}", rows, values)

    def each(self, name: str, items: Sequence[Any], function: Callable[[Any], Any]) -> list[Any]:
        """function(item) for every item, JSON values: for functions of the user's, which may be slow."""

        def work(part: range, advance: Callable[[int], None]) -> list[Any]:
            values = []
            for item in items[part.start : part.stop]:
                values.append(function(item))
                advance(1)
            return values

        return self._work(name, len(items), VALUE_SHARD, work)

    def _work(self, name: str, count: int, limits: Sequence[int], work: Callable[..., Sequence[Any]]) -> list[Any]:
        """work(part, advance) for items 0 to count - 1, in shards of --shard items, or of a number within `limits`.

        The size does not depend on the number of ranks, so neither do the results. `work` calls advance(n) for every n
        items: it moves the progress bar and ends the run if a signal has arrived.
        """
        least, most = limits
        size = self.args.shard or min(most, -(-max(count, 1) // (SHARDS * least)) * least)
        bar = Bar(self.progress, name, count)

        def advance(items: int) -> None:
            bar.update(items)
            SIGNALS.check()

        def shard(part: range) -> Sequence[Any]:
            bar.at(part.start)
            return work(part, advance)

        with bar, self.progress.timed(name):
            return in_shards(self.folder, name, count, size, shard)

    def seed(self, t: int, purpose: str) -> int:
        return seed_of(self.args.seed, t, purpose)

    def text(self, ids: list[int]) -> str:
        """The text of a response, without trailing end-of-sequence tokens and surrounding white space."""
        return decode(ids, self.tokenizer, self.eos_token_id, *self.ends)

    def pieces(self, ids: list[int], logps: Sequence[float]) -> list[tuple[str, float]]:
        """A response as (text, log-probability) per token, rounded; tokens that are no whole character are joined."""
        pieces: list[tuple[str, float]] = []
        waiting: list[int] = []
        total = 0.0
        for token, logp in zip(ids, logps):
            waiting, total = [*waiting, token], total + logp
            text = "" if waiting == [self.eos_token_id] else self.tokenizer.decode(waiting, skip_special_tokens=False)
            if not text.endswith("\ufffd") or len(waiting) == 4:  # a character has at most 4 bytes in UTF-8
                pieces.append((text, round(total, 3)))
                waiting, total = [], 0.0
        return pieces
