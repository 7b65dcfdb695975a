"""Before the first token: everything that a run needs is checked and loaded. Bad input costs seconds, not a night."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

import lora
from model import GPTNeo, GPTNeoConfig, GPTNeoSelfAttention, check_weights
from runtime import fsdp, functions, parallel, plan, record, storage, trackers
from runtime.data import (
    Example,
    as_decoded,
    digest,
    draw,
    encode,
    fit_context,
    load_examples,
    load_tokenizer,
    read_tokenizer,
    split,
)
from runtime.export import side_files
from runtime.files import read_object, token_text
from runtime.options import Args, changeable, near_files, shown
from runtime.run import Run, seed_of
from runtime.stopping import Finished
from runtime.template import Template, choose


def setup(args: Args, command: str = "spin") -> tuple[GPTNeo, list[Example], Run]:
    """Checks and loads everything before the first token is generated. Writes nothing.

    Args:
        command: the method, "spin", "sft" or "family": a run is resumed by the one that began it.

    Returns: the start, with adapters if it has any; the training examples; the run, with the held-out examples.
    Raises: ValueError and OSError; Finished where there is nothing left to do. All ranks raise the same.
    """
    device = parallel.on_all(lambda: choose_device(args))
    earlier = parallel.on_writer(lambda: record.read(Path(args.out)))
    examples, run = parallel.on_all(lambda: prepare(args, command, device, earlier))
    parallel.on_writer(lambda: check_unfinished(run, earlier))
    parallel.on_writer(lambda: trackers.check(args.log))
    digests = parallel.on_writer(lambda: run.record["digests"])
    parallel.on_all(lambda: record.check_same_inputs("on rank 0", digests, run.record["digests"]))
    parallel.on_all(lambda: plan.check(run.needs, run.start, device, run.out))
    model = parallel.on_all(lambda: load_model(run.start, run.args, device, run.dtype))
    parallel.on_all(lambda: args.prepare(model, examples, run))
    if args.fsdp:
        run.sharded = fsdp.Sharded(model, device, run.dtype)
    return model, examples, run


def prepare(
    args: Args, command: str, device: torch.device, earlier: dict[str, Any] | None
) -> tuple[list[Example], Run]:
    """All of `setup` but the weights, on one rank. `earlier` is the record of the run to resume."""
    flag, source, _ = args.source
    if not args.model or not source:
        places = ("--data", "a file, a directory or a hub data set"), ("--model", "a directory or a hub id")
        missing, expected = places[0 if args.model else 1]
        raise ValueError(f"{missing} is missing: expected {expected}")
    bf16 = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda")
    out = Path(args.out)
    new: dict[str, Any] = {"command": command, "args": dataclasses.asdict(args)}
    new["args"]["precision"] = "bf16" if bf16 else "fp32"
    if earlier:
        record.check_same(out, earlier, new, changeable(type(args)))
    if args.adapter and not Path(args.adapter).is_dir():
        near = near_files(Path(args.adapter), directories=True)
        raise FileNotFoundError(f"--adapter {args.adapter}: no such directory{near}")
    path, revision = resolve_model(args.model, earlier and earlier.get("revision"))
    config = load_config(path, args)
    tokenizer = load_tokenizer(path, config.eos_token_id, config.vocab_size)
    side_files(path, config, tokenizer, config.eos_token_id)  # a damaged file must not end the run at its last step
    metrics = functions.load_metrics(args.metric)
    examples, heldout, template = load_data(args, tokenizer, config, path)
    for measure in metrics.values() if heldout[0].references else ():  # it should fail now, not after a night
        measure(heldout[0].prompt, heldout[0].response, heldout[0].references)
    needs, args = needs_of(config, args, examples + heldout, bf16)
    if earlier and (args.dropout or args.lora_dropout):  # which numbers dropout draws depends on how a batch is cut
        fixed = {"micro_tokens", "device"}
        record.check_same(out, earlier, new, [name for name in changeable(type(args)) if name not in fixed])
        record.check_ranks(out, earlier, parallel.world_size())
    if not args.from_scratch:
        check_weights(path, config)  # headers before contents: a sparse file of a terabyte would be hashed whole
    digests = {"model": storage.digest_of_model(path, with_weights=not args.from_scratch)}
    digests |= {flag: digest(examples), "eval-data": digest(heldout)}
    if args.adapter:
        digests["adapter"] = storage.digest_of_adapter(Path(args.adapter))
    if args.metric:
        digests["metric"] = functions.digest(args.metric)
    digests |= args.digests()
    if earlier:
        record.check_same_inputs(f"that the run in {out} began with", earlier["digests"], digests)
    new |= {"revision": revision, "digests": digests, "torch": torch.__version__, "finished": False}
    new |= {"shard_batch": args.gen_batch, "ranks": parallel.world_size()}
    new |= {"template": "chat" if template.chat else template.source}
    dtype = torch.bfloat16 if bf16 else torch.float32
    kept = record.continued(earlier, new)
    run = Run(args, tokenizer, config.eos_token_id, device, out, path, dtype, heldout, kept, earlier, needs)
    run.metrics = metrics
    return examples, run


def check_unfinished(run: Run, earlier: dict[str, Any] | None) -> None:
    """Raises: Finished where the run has ended; Stopped where one of its files is damaged."""
    if earlier and run.record["finished"]:
        record.check_finished(run.out, earlier)
        raise Finished(f"{run.out}: this run is finished; its metrics are in metrics.jsonl, its last iterate in final")


def choose_device(args: Args) -> torch.device:
    """--device as a device of this machine. With several ranks on a host, each has a GPU of its own."""
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        count, several = torch.cuda.device_count(), parallel.world_size() > 1
        if several and device.index is not None:
            raise ValueError(f"--device {args.device}: expected cuda, of which every rank takes one")
        number = parallel.local_rank() if several else device.index or 0
        if number >= count:
            ranks = f" for {number + 1} ranks or more" if several else ""
            raise ValueError(f"--device {args.device}: this machine has {count} CUDA devices{ranks}")
        if several:
            device = torch.device("cuda", number)
            torch.cuda.set_device(device)
    return device


def resolve_model(name: str, revision: str | None = None, flag: str = "--model ") -> tuple[Path, str | None]:
    """(directory, revision) of a model: `name` itself, or the snapshot of a hub id, owner/name or owner/name@revision.

    The revision returned is the hub's commit: a resumed run asks for the very one that it began with. `flag` is what
    messages call the name.
    """
    if Path(name).is_dir():
        if Path(name, "adapter_config.json").exists() and not Path(name, "config.json").exists():
            raise ValueError(f"{flag}{name}: this is an adapter: give it as --adapter and its base as --model")
        return Path(name), None
    near = near_files(Path(name), directories=True)
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", name):
        expected = "neither a directory nor a hub id of the form owner/name[@revision]"
        raise FileNotFoundError(f"{flag}{shown(name)}: {expected}{near}")
    from huggingface_hub import snapshot_download

    repository, _, asked = name.partition("@")
    common = list(storage.MODEL_FILES)
    try:
        wanted = [*common, "model*.safetensors*"]
        path = Path(snapshot_download(repository, revision=revision or asked or None, allow_patterns=wanted))
        revision = path.name  # a snapshot's folder bears the commit's name
        if not any(path.glob("model*.safetensors")):
            wanted = [*common, "pytorch_model*.bin*"]
            path = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub and the network raise many kinds
        raise ValueError(f"{flag}{name}: no such directory{near}, and the hub says: {error}") from None
    return path, revision


def load_config(path: Path, args: Args) -> GPTNeoConfig:
    """The model's config.json, checked against the options."""
    config = GPTNeoConfig.from_json(path / "config.json")
    if args.rank > config.hidden_size:
        raise ValueError(f"--rank {args.rank}: expected at most the model's hidden_size, {config.hidden_size}")
    return dataclasses.replace(config, eos_token_id=end_token(path, config.eos_token_id, args.eos))


def end_token(path: Path, eos_token_id: int | None, wanted: str) -> int:
    """Id of the token that ends responses: --eos, otherwise that of config.json.

    Prints a line where tokenizer_config.json names another one, as those of chat models do.
    """
    if re.fullmatch("[0-9]{1,9}", wanted):
        return int(wanted)
    if wanted:
        tokenizer, source = read_tokenizer(path)
        if tokenizer.token_to_id(wanted) is None:
            raise ValueError(f"--eos {shown(wanted)}: {source} has no such token")
        return tokenizer.token_to_id(wanted)
    if eos_token_id is None:
        missing = "eos_token_id is missing, and responses could not end"
        raise ValueError(f"{path / 'config.json'}: {missing}; --eos names the end token")
    other = token_text(read_object(path / "tokenizer_config.json").get("eos_token"))
    used = other and read_tokenizer(path)[0].id_to_token(eos_token_id)
    if other != used:
        print(
            f"{path}: tokenizer_config.json ends responses with {shown(other)}, config.json with {shown(used)}, "
            "which is used; --eos chooses another",
            flush=True,
        )
    return eos_token_id


def load_data(
    args: Args, tokenizer: Tokenizer, config: GPTNeoConfig, path: Path
) -> tuple[list[Example], list[Example], Template]:
    """(training, held-out) examples, encoded and checked against the context, and the template of their prompts.

    `path` is the model's directory, which may hold a chat template.
    """
    _, source, layout = args.source
    train_set = load_examples(source, layout, args.fields)
    if args.eval_data:
        heldout = load_examples(args.eval_data, fields=args.fields)
    else:
        train_set, heldout = split(train_set, args.eval_share)
        if not train_set or not heldout:
            raise ValueError(
                f"{', '.join(source)}: too few records to hold out a share of {args.eval_share}; use --eval-data"
            )
    heldout = draw(heldout, args.eval_limit)
    if common := len({e.prompt for e in train_set} & {e.prompt for e in heldout}):
        print(f"held-out data: {common} of its prompts are training prompts, too; metrics may flatter", flush=True)
    messages = any(e.turns for e in (*train_set, *heldout))
    template = choose(args.template, path, tokenizer, messages, args.special_tokens)
    result = []
    for examples in (train_set, heldout):
        encode(examples, tokenizer, template, config.eos_token_id)
        if examples is heldout:
            as_decoded(examples, tokenizer, config.eos_token_id)
        # No response is generated to the prompt of a given pair, so it needs no room for one.
        generated = 0 if layout == "pairs" and examples is train_set else args.max_new_tokens
        kept, skipped = fit_context(examples, config.max_position_embeddings, generated, args.overlong)
        if skipped:
            print(f"left out {skipped} of {len(examples)} examples that do not fit the context", flush=True)
        result.append(kept)
    return result[0], result[1], template


def needs_of(config: GPTNeoConfig, args: Args, examples: list[Example], bf16: bool) -> tuple[plan.Needs, Args]:
    """Memory and disk, computed from a model without storage, and the options with --adapter's rank and alpha.

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
        pair_tokens=prompts
        * (args.max_new_tokens * args.generated_in_pair + sum(e.tokens for e in examples) // len(examples)),
        keeps_responses=args.keeps_responses,
        swaps_weights=args.swaps_weights,
        cut=parallel.world_size() if args.fsdp else 0,
        models=args.models,
    )
    return needs, args


def load_model(path: Path, args: Args, device: torch.device, dtype: torch.dtype) -> GPTNeo:
    """The start, with adapters where --rank or --adapter ask for them.

    With LoRA a bf16 run holds the frozen base in bf16 and the adapters in fp32. When all parameters are trained they
    stay fp32 and autocast makes the products bf16, since bf16's 8 bits would lose small updates. With --fsdp, rank 0
    holds the model on its CPU and the others an outline without storage.
    """
    if args.fsdp:
        device = torch.device("cpu" if parallel.is_writer() else "meta")
    if device.type == "meta":
        with device:
            model = GPTNeo(GPTNeoConfig.from_json(path / "config.json")).eval()
    elif args.from_scratch:
        model = GPTNeo(GPTNeoConfig.from_json(path / "config.json"))
        model.init_weights(torch.Generator().manual_seed(seed_of(args.seed, 0, "weights"))).to(device)
    else:
        model = GPTNeo.from_pretrained(path, dtype=dtype if args.rank else torch.float32, device=device)
    if not args.dropout:
        switch_off_dropout(model)
    add_adapters(model, args, torch.Generator().manual_seed(seed_of(args.seed, 0, "lora")))
    model.checkpointing = args.checkpoint
    return model


def switch_off_dropout(model: GPTNeo) -> None:
    """The opponent's log-probabilities are computed without dropout; with it, the player would not begin as p_t."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, GPTNeoSelfAttention):
            module.dropout = 0.0


def add_adapters(model: GPTNeo, args: Args, rng: torch.Generator | None) -> None:
    if args.adapter:
        lora.load_adapter(model, args.adapter)
    elif args.rank:
        lora.add_lora(model, args.rank, args.lora_alpha, args.lora_dropout, args.lora_targets, rng)
