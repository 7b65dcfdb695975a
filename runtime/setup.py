"""Before the first token: everything that a run needs is checked and loaded. Bad input costs seconds, not a night."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

import lora
from data.examples import (
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
from data.files import read_object, shown
from data.templates import Template, choose
from runtime import fsdp, functions, parallel, plan, resume
from runtime.export import side_files
from runtime.folder import Folder
from runtime.options import settings
from runtime.run import Run
from runtime.weights import Weights
from runtime.work import Work


def setup(args: Any, command: str, class_of: Callable[[Path], type]) -> tuple[nn.Module | None, list[Example], Run]:
    """Checks and loads everything before the first token is generated. Writes nothing.

    Args:
        command: the script, "spin" say: a run is resumed by the script that began it.
        class_of: returns the class of the model in a directory, with `config_class`, `from_pretrained` and constructor.

    Returns: the start, with adapters if it has any, or None if the run is finished; the training examples; the run.
    Raises: ValueError and OSError. All ranks raise the same.
    """
    found = parallel.on_writer(Folder(Path(args.out)).record)
    examples, run = parallel.on_all(lambda: prepare(args, command, class_of, found))
    digests = parallel.on_writer(lambda: run.record["digests"])
    parallel.on_all(lambda: resume.check_same_inputs("on rank 0", digests, run.record["digests"]))
    if run.record["finished"]:
        return None, examples, run
    model = parallel.on_all(lambda: load_model(run))
    parallel.on_all(lambda: args.prepare(model, examples, run))
    if args.fsdp:
        run.weights.sharded = fsdp.Sharded(model, run.device, run.weights.dtype)
    return model, examples, run


def prepare(args: Any, command: str, class_of: Callable, found: dict[str, Any] | None) -> tuple[list[Example], Run]:
    """All of `setup` but the weights, on one rank. `found` is the record of the run to resume."""
    args.require(args.model, "--model is missing: expected a directory or a hub id")
    args.require(args.source[1], "--data is missing: expected a file, a directory or a hub data set")
    device = choose_device(args.device)
    if args.precision == "auto":
        args = dataclasses.replace(args, precision="bf16" if device.type == "cuda" else "fp32")
    options = json.loads(json.dumps(dataclasses.asdict(args)))  # with lists in place of tuples, as run.json has them
    record: dict[str, Any] = {"command": command, "args": options, "ranks": parallel.world_size()}
    if found:
        resume.check_same(args, found, record)
    path, revision = resolve_model(args.model, found and found.get("revision"))
    model_class = class_of(path)
    config = model_class.config_class.from_json(path / "config.json")
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else []
    config = dataclasses.replace(config, eos_token_id=end_token(path, config.eos_token_id, args.eos))
    tokenizer = load_tokenizer(path, config.eos_token_id, config.vocab_size)
    side_files(path, config, tokenizer)  # A damaged file must not end the run at its last step.
    metrics = functions.load_metrics(args.metric)
    examples, heldout, template, config = load_data(args, tokenizer, config, path)
    for measure in metrics.values() if heldout[0].references else ():  # It should fail now, not after a night.
        measure(heldout[0].prompt, heldout[0].response, heldout[0].references)
    outline, args = outline_of(model_class, config, args)
    plan.check(outline, args, examples + heldout, device, path)
    digests = digests_of(args, path, examples, heldout)
    if found:
        resume.check_same_inputs(f"that the run in {args.out} began with", found["digests"], digests)
    record |= {"revision": revision, "digests": digests, "torch": torch.__version__, "finished": False}
    record |= {"gen_batch": args.gen_batch, "template": "chat" if template.chat else template.source}
    record = resume.continued(found, record | {"parameters": list(plan.count(outline))}) | {"settings": settings(args)}
    folder, dtype = Folder(Path(args.out)), torch.bfloat16 if args.precision == "bf16" else torch.float32
    work = Work(args, tokenizer, config.eos_token_id, heldout, metrics, record["gen_batch"], ends)
    weights = Weights(args, model_class, config, path, tokenizer, record, folder, dtype)
    return examples, Run(args, work, folder, weights, device, record, found)


def digests_of(args: Any, path: Path, examples: list[Example], heldout: list[Example]) -> dict[str, str]:
    """The sha256 of all inputs, by the name of the option."""
    digests = {"model": resume.digest_of_model(path, with_weights=not args.from_scratch)}
    digests |= {args.source[0]: digest(examples), "eval-data": digest(heldout)} | args.digests()
    if args.adapter:
        digests["adapter"] = resume.digest_of_adapter(Path(args.adapter))
    if args.metric:
        digests["metric"] = functions.digest(args.metric)
    return digests


def choose_device(name: str) -> torch.device:
    """--device as a device of this machine. With several ranks on a host, each has a GPU of its own."""
    device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        return device
    if parallel.world_size() > 1:
        if device.index is not None:
            raise ValueError(f"--device {name}: with several ranks expected cuda, since every rank takes a GPU")
        device = torch.device("cuda", parallel.local_rank())
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: expected cpu or one of {torch.cuda.device_count()} CUDA devices")
    torch.cuda.set_device(device.index or 0)
    return device


def resolve_model(name: str, revision: str | None = None, flag: str = "--model ") -> tuple[Path, str | None]:
    """(directory, revision) of a model: `name` itself, or the snapshot of a hub id, owner/name or owner/name@revision.

    The revision is the hub's commit, for which a resumed run asks again. `flag` is what messages call the name.
    """
    path = Path(name)
    if path.is_dir():
        if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
            raise ValueError(f"{flag}{name}: this is an adapter: give it as --adapter and its base as --model")
        return path, None
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", name):
        gguf = "; smollm2/convert.py makes a directory of a Llama's GGUF file" if name.endswith(".gguf") else ""
        expected = "neither a directory nor a hub id of the form owner/name[@revision]"
        raise FileNotFoundError(f"{flag}{shown(name)}: {expected}{gguf}")
    from huggingface_hub import snapshot_download

    repository, _, asked = name.partition("@")
    revision = revision or asked or None
    try:
        for weights in ("model*.safetensors*", "pytorch_model*.bin*"):
            files = [*resume.MODEL_FILES, weights]
            path = Path(snapshot_download(repository, revision=revision, allow_patterns=files))
            revision = path.name  # A snapshot's folder bears the commit's name.
            if any(path.glob("model*.safetensors")):
                break
    except Exception as error:  # The hub and the network raise many kinds.
        raise ValueError(f"{flag}{name}: no such directory, and the hub says: {error}") from None
    return path, revision


def end_token(path: Path, eos_token_id: Any, wanted: str, template: Template | None = None) -> int:
    """Id of the token that ends responses: --eos, else the end of a turn of a chat template, else that of config.json.

    Of several in config.json it is the first. Raises: ValueError if there is none.
    """
    if re.fullmatch("[0-9]{1,9}", wanted):
        return int(wanted)
    if wanted:
        tokenizer, source = read_tokenizer(path)
        if tokenizer.token_to_id(wanted) is None:
            raise ValueError(f"--eos {shown(wanted)}: {source} has no such token")
        return tokenizer.token_to_id(wanted)
    if template is not None and (end := template.turn_end()) is not None:
        return end
    if eos_token_id is None:
        eos_token_id = read_object(path / "generation_config.json").get("eos_token_id")
    first = eos_token_id[0] if isinstance(eos_token_id, list) and eos_token_id else eos_token_id
    if type(first) is not int:
        missing = "eos_token_id is missing, and responses could not end"
        raise ValueError(f"{path / 'config.json'}: {missing}; --eos names the end token")
    return first


def load_data(
    args: Any, tokenizer: Tokenizer, config: Any, path: Path
) -> tuple[list[Example], list[Example], Template, Any]:
    """Encoded (training, held-out) examples that fit the context, their template, and the config with the end token."""
    _, source, layout = args.source
    train_set = load_examples(source, layout, args.fields, needs_fields=True)
    if args.eval_data:
        heldout = load_examples(args.eval_data, fields=args.fields)
    else:
        train_set, heldout = split(train_set, args.eval_share)
        if not train_set or not heldout:
            too_few = f"too few records to hold out a share of {args.eval_share}; use --eval-data"
            raise ValueError(f"{', '.join(source)}: {too_few}")
    heldout = draw(heldout, args.eval_limit)
    if common := len({e.prompt for e in train_set} & {e.prompt for e in heldout}):
        print(f"held-out data: {common} of its prompts are training prompts, too; metrics may flatter", flush=True)
    template = choose(args.template, path, tokenizer, any(e.turns for e in train_set + heldout), args.special_tokens)
    config = dataclasses.replace(config, eos_token_id=end_token(path, config.eos_token_id, args.eos, template))
    encode(train_set + heldout, tokenizer, template, config.eos_token_id)
    as_decoded(heldout, tokenizer, config.eos_token_id)

    context, room = config.max_position_embeddings, args.max_new_tokens
    heldout, skipped = fit_context(heldout, context, room, args.overlong)
    # No response is generated to the prompt of a given pair, so it needs no room for one.
    train_set, more = fit_context(train_set, context, 0 if layout == "pairs" else room, args.overlong)
    if skipped + more:
        print(f"left out {skipped + more} examples that do not fit the context", flush=True)
    first = train_set[0]
    for name, ids in (("prompt", first.prompt_ids), ("response", first.real_ids)):
        print(f'first {name}: "{shown(tokenizer.decode(ids, skip_special_tokens=False), 300)}"', flush=True)
    return train_set, heldout, template, config


def outline_of(model_class: Any, config: Any, args: Any) -> tuple[nn.Module, Any]:
    """The model without storage, and the options with the settings of --adapter, which must fit the model."""
    if args.adapter and not Path(args.adapter).is_dir():
        raise FileNotFoundError(f"--adapter {args.adapter}: no such directory")
    with torch.device("meta"):
        try:
            outline = model_class(config)
        except (TypeError, RuntimeError, OverflowError) as error:  # a size that is no number, or absurd
            text = str(error).partition("\n")[0]
            raise ValueError(f"{args.model}/config.json: no model can be made of it ({shown(text)})") from None
        add_adapters(outline, args, None)
    if args.adapter:
        _, layer = next(lora.lora_layers(outline))
        args = dataclasses.replace(args, rank=layer.rank, lora_alpha=layer.alpha, lora_dropout=layer.dropout)
    return outline, args


def load_model(run: Run) -> nn.Module:
    """The start, with adapters if --rank or --adapter ask for them.

    With LoRA a bf16 run holds the frozen base in bf16 and the adapters in fp32. When all parameters are trained they
    stay fp32, and autocast makes the products bf16. With --fsdp rank 0 holds the model on its CPU, the others have no
    storage.
    """
    args, model_class, path = run.args, run.weights.model_class, run.weights.start
    device = run.device if not args.fsdp else torch.device("cpu" if parallel.is_writer() else "meta")
    if device.type == "meta" or args.from_scratch:
        with torch.device("meta" if device.type == "meta" else "cpu"):
            model = model_class(model_class.config_class.from_json(path / "config.json")).eval()
        if args.from_scratch:
            model.init_weights(run.generator(0, "weights")).to(device)
    else:
        dtype = run.weights.dtype if args.rank else torch.float32
        model = model_class.from_pretrained(path, dtype=dtype, device=device)
    if not args.dropout:  # The opponent is scored without dropout; with dropout the player would not begin as p_t.
        switch_off_dropout(model)
    add_adapters(model, args, run.generator(0, "lora"))
    model.checkpointing = args.checkpoint
    return model


def switch_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in vars(module).items():
            if (name == "p" and isinstance(module, nn.Dropout)) or ("dropout" in name and isinstance(value, float)):
                setattr(module, name, 0.0)


def add_adapters(model: nn.Module, args: Any, rng: torch.Generator | None) -> None:
    if args.adapter:
        lora.load_adapter(model, args.adapter)
    elif args.rank:
        targets = args.lora_targets or tuple(lora.linear_names(model))
        try:
            lora.add_lora(model, args.rank, args.lora_alpha, args.lora_dropout, targets, rng)
        except ValueError as error:
            raise ValueError(f"--lora-targets: {error}") from None
