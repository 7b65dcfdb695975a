"""Before the first token: everything that a run needs is checked and loaded. Bad input costs seconds, not a night."""

import dataclasses
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

import lora
import plan
import resume
from data import Example, as_decoded, digest, encode, fit_context, load_examples, load_tokenizer, split
from model import GPTNeo, GPTNeoConfig, weight_files
from options import CHANGEABLE, Args

GENERATE_SHARD = {"cpu": 16, "cuda": 64}  # batches of responses that are generated, then kept


class Stopped(RuntimeError):
    """The run cannot go on; the message says where and why."""


class Finished(Exception):
    """The run that --out holds has nothing left to do."""


class Run(NamedTuple):
    """What every phase needs besides the player."""

    args: Args
    tokenizer: Tokenizer
    eos_token_id: int
    device: torch.device
    dtype: torch.dtype  # of the player's products
    start: Path  # directory of theta_0
    out: Path
    record: dict[str, Any] = {}  # what run.json says  # noqa: RUF012
    shard: int = 1024  # responses that are kept together: as many as when the run began, or they would not be found
    needs: plan.Needs | None = None
    scorer: Callable[[str, list[str]], Sequence[float]] | None = None  # of --scorer

    @property
    def micro_tokens(self) -> int:
        return self.args.micro_tokens or (8192 if self.device.type == "cuda" else 2048)

    def kept(self, iterate: int) -> Path:
        """Folder of what is finished on the way to an iterate: shards of responses and scores, state of training."""
        return self.out / "resume" / f"iterate-{iterate}"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def seed_of(seed: int, t: int, purpose: str) -> int:
    """A seed for one purpose in one iteration: no phase disturbs the random numbers of another."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{t}/{purpose}".encode()).digest()[:8], "big") >> 1


def generator(seed: int, t: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(seed, t, purpose))


def resolve_model(name: str, revision: str | None = None) -> tuple[Path, str | None]:
    """(directory, revision) of a model: `name` itself, or the snapshot of a hub id, owner/name or owner/name@revision.

    The revision returned is the hub's commit: a run that goes on asks for the very one that it began with.
    """
    if Path(name).is_dir():
        return Path(name), None
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", name):
        raise FileNotFoundError(f"--model {name}: neither a directory nor a hub id of the form owner/name[@revision]")
    from huggingface_hub import snapshot_download

    repository, _, asked = name.partition("@")
    common = ["config.json", "tokenizer.json", "vocab.json", "merges.txt"]
    try:
        wanted = [*common, "model*.safetensors*"]
        path = Path(snapshot_download(repository, revision=revision or asked or None, allow_patterns=wanted))
        revision = path.name  # a snapshot's folder bears the commit's name
        if not any(path.glob("model*.safetensors")):
            wanted = [*common, "pytorch_model*.bin*"]
            path = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except Exception as error:  # whatever the hub or the network answers
        raise ValueError(f"--model {name}: no such directory, and the hub says: {error}") from None
    return path, revision


def setup(args: Args, command: str) -> tuple[GPTNeo, list[Example], list[Example], Run]:
    """Checks and loads everything before the first token is generated; writes nothing.

    Raises: ValueError and OSError; Finished where there is nothing left to do.
    """
    if not args.model or not (args.data or args.pairs):
        missing, expected = ("--data", "a JSON Lines file") if args.model else ("--model", "a directory or a hub id")
        raise ValueError(f"{missing} is missing: expected {expected}")
    if args.from_scratch and args.rank:
        raise ValueError(f"--rank {args.rank}: expected 0 with --from-scratch, adapters on random weights learn little")
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {args.device}: this machine has {torch.cuda.device_count()} CUDA devices")
    bf16 = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda")
    out = Path(args.out)
    settings = dataclasses.asdict(args) | {"precision": "bf16" if bf16 else "fp32"}
    record: dict[str, Any] = {"command": command, "args": settings}
    earlier = resume.read_record(out)
    if earlier:
        resume.check_same(out, earlier, record, CHANGEABLE)
    path, revision = resolve_model(args.model, earlier and earlier.get("revision"))
    config = GPTNeoConfig.from_json(path / "config.json")
    if args.rank > config.hidden_size:
        raise ValueError(f"--rank {args.rank}: expected at most the model's hidden_size, {config.hidden_size}")
    if config.eos_token_id is None:
        raise ValueError(f"{path / 'config.json'}: eos_token_id is missing, and responses could not end")
    tokenizer = load_tokenizer(path, config.eos_token_id, config.vocab_size)
    train_set, heldout = load_data(args, tokenizer, config)
    scorer = load_function(args.scorer) if args.scorer else None
    needs, args = needs_of(config, args, train_set + heldout, bf16)
    source = "pairs" if args.pairs else "data"
    digests = {"model": digest_of_model(path, args), source: digest(train_set), "eval-data": digest(heldout)}
    if args.adapter:
        digests["adapter"] = resume.digest_of_files(sorted(Path(args.adapter).glob("adapter_*")))
    if scorer:
        file, _, name = args.scorer.rpartition(":")
        digests["scorer"] = hashlib.sha256(Path(file).read_bytes() + name.encode()).hexdigest()
    if earlier:
        resume.check_same_inputs(out, earlier["digests"], digests)
        if earlier.get("finished"):
            raise Finished(f"{out}: this run is finished; its metrics are in metrics.jsonl, its last iterate in final")
    plan.check(needs, path, device, out)
    player = load_player(path, args, device, bf16)
    record |= {"revision": revision, "digests": digests, "torch": torch.__version__, "finished": False}
    record["shard"] = GENERATE_SHARD[device.type] * args.gen_batch
    record = earlier or record
    dtype = torch.bfloat16 if bf16 else torch.float32
    run = Run(args, tokenizer, config.eos_token_id, device, dtype, path, out, record, record["shard"], needs, scorer)
    return player, train_set, heldout, run


def needs_of(config: GPTNeoConfig, args: Args, examples: list[Example], bf16: bool) -> tuple[plan.Needs, Args]:
    """Memory and disk, from a model without storage, and the options as --adapter has them.

    Raises: ValueError where --lora-targets or --adapter do not fit the model.
    """
    with torch.device("meta"):
        outline = GPTNeo(config)
        add_adapters(outline, args, None)
    if args.adapter:
        _, layer = next(lora.lora_layers(outline))
        args = dataclasses.replace(args, rank=layer.rank, lora_alpha=layer.alpha, lora_dropout=layer.dropout)
    prompts = min(args.prompts or len(examples), len(examples))
    needs = plan.needs(
        outline,
        optimizer_slots=2 if args.optimizer == "adamw" else 1,
        bf16=bf16,
        cache_tokens=args.gen_tokens,
        batch_size=min(args.gen_batch, len(examples)),
        row_tokens=max(len(e.prompt_ids) for e in examples) + args.max_new_tokens,
        iterations=args.iterations,
        pair_tokens=prompts * (args.max_new_tokens + sum(e.tokens for e in examples) // len(examples)),
        history=args.history != "1",
        swapped=bool(args.alpha and not args.rank),
    )
    return needs, args


def add_adapters(player: GPTNeo, args: Args, rng: torch.Generator | None) -> None:
    if args.adapter:
        lora.load_adapter(player, args.adapter)
    elif args.rank:
        lora.add_lora(player, args.rank, args.lora_alpha, args.lora_dropout, args.lora_targets, rng)


def load_function(name: str) -> Callable:
    """FILE.py:NAME to the function. It is the user's own code: nothing that comes with a model is run."""
    file, _, attribute = name.rpartition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"--scorer {name}: no such file, expected FILE.py:NAME")
    try:
        spec = importlib.util.spec_from_file_location("scorer", file)
        sys.modules["scorer"] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(module)
        function = getattr(module, attribute)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise ValueError(f"--scorer {name}: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise ValueError(f"--scorer {name}: {type(function).__name__}, expected a function")
    return function


def digest_of_model(path: Path, args: Args) -> str:
    """sha256 of config, tokenizer and the weights that are read; what is random is told by --seed."""
    files = [path / name for name in ("config.json", "tokenizer.json", "vocab.json", "merges.txt")]
    weights = [] if args.from_scratch else weight_files(path)
    return resume.digest_of_files([*(file for file in files if file.is_file()), *weights])


def load_data(args: Args, tokenizer: Tokenizer, config: GPTNeoConfig) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples, encoded and checked against the context."""
    source = args.pairs or args.data
    train_set = load_examples(source, pairs=bool(args.pairs), prompts_only=args.reinforce)
    if args.eval_data:
        heldout = load_examples(args.eval_data)
    else:
        train_set, heldout = split(train_set, args.eval_share)
        if not train_set or not heldout:
            raise ValueError(f"{source}: too few records to hold out a share of {args.eval_share}; use --eval-data")
    heldout = heldout[: args.eval_limit or None]
    result = []
    for examples in (train_set, heldout):
        encode(examples, tokenizer, args.template.replace(r"\n", "\n"), config.eos_token_id)
        if examples is heldout:
            as_decoded(examples, tokenizer, config.eos_token_id)
        generated = 0 if args.pairs and examples is train_set else args.max_new_tokens
        kept, skipped = fit_context(examples, config.max_position_embeddings, generated, args.overlong)
        if skipped:
            print(f"left out {skipped} of {len(examples)} examples that do not fit the context", flush=True)
        result.append(kept)
    return result[0], result[1]


def load_player(path: Path, args: Args, device: torch.device, bf16: bool) -> GPTNeo:
    """The start, with adapters where --rank asks for them.

    Under LoRA a bf16 run keeps the frozen base in bf16 and the adapters in fp32; in full-parameter training the
    weights stay fp32 and the products are bf16 (autocast), since bf16's 8 bits would lose the small updates.
    """
    if args.from_scratch:
        player = GPTNeo(GPTNeoConfig.from_json(path / "config.json"))
        player.init_weights(generator(args.seed, 0, "weights")).to(device)
    else:
        dtype = torch.bfloat16 if bf16 and args.rank else torch.float32
        player = GPTNeo.from_pretrained(path, dtype=dtype, device=device)
    add_adapters(player, args, generator(args.seed, 0, "lora"))
    player.checkpointing = args.checkpoint
    if args.compile:
        for block in player.transformer["h"]:
            block.compile(dynamic=True)  # every micro-batch has a shape of its own
    return player
