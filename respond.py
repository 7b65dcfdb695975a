#!/usr/bin/env python3
"""Talk to what a run made: any iterate, final/, another directory with a model, or a hub id.

    python respond.py runs/spin                                 a loop of prompts, answered by the run's last iterate
    python respond.py runs/spin --prompt "HELLO" "BYE"          one answer per prompt
    python respond.py runs/spin/iterate-2 --prompts F.jsonl     every prompt of a file, in any layout of --data
    python respond.py runs/spin --compare runs/spin/iterate-0   two models; iterate-0 is the start of the run
    python respond.py runs/spin --eval-data F.jsonl             held-out metrics instead of responses

A prompt is written by the template that the run used, which --template overrides. Responses are the likeliest ones
unless --temperature asks for samples.
"""

import dataclasses
import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lora
from data.examples import Example, as_decoded, decode, draw, encode, fit_context, load_examples, load_tokenizer
from data.files import read_object
from data.templates import choose, read_chat
from evaluate import evaluate, sample_start
from kernels import onednn
from player import Player
from report.tables import metrics_of, table_of
from runtime.cli import fail, streams
from runtime.folder import Folder, write_rows
from runtime.functions import load_metrics
from runtime.options import RunOptions, check_fields, option, parse
from runtime.setup import choose_device, end_token, resolve_model
from runtime.work import Work
from spin import SpinOptions

RUN, SPIN = RunOptions.__dataclass_fields__, SpinOptions.__dataclass_fields__


@dataclass(frozen=True)
class RespondOptions:
    """The options of respond.py."""

    # fmt: off
    model: str = option("", "A run, an iterate, a model's directory or a hub id.", positional=True, metavar="MODEL")
    compare: tuple[str, ...] = option((), "Other iterates or models to show below the first.", metavar="MODEL")
    base: str = option("", "Base model of an adapter; default: the one that its run began with.")
    eos: str = RUN["eos"]
    prompt: tuple[str, ...] = option((), "Prompts; default: they are read from the terminal.", metavar="TEXT",
                                     group="prompts", check=str.strip, expected="a text")
    prompts: tuple[str, ...] = option((), "Files, directories or hub data sets with prompts.", metavar="PATH")
    fields: tuple[str, ...] = RUN["fields"]
    template: str = option("auto", "Prompt template; auto: that of the run, or of the model.",
                           check=RUN["template"].metadata["check"], expected=RUN["template"].metadata["expected"])
    special_tokens: bool = RUN["special_tokens"]
    chat: bool = option(False, "Typed prompts continue a conversation; an empty line begins a new one.")
    eval_data: tuple[str, ...] = option((), "Print metrics on this data instead of responses.", metavar="PATH")
    metric: tuple[str, ...] = RUN["metric"]
    eval_limit: int = option(0, "Largest number of examples to evaluate on; 0: all.", within="[0, inf)")
    max_new_tokens: int = option(0, "Length limit of responses, in tokens; 0: that of the run, or 256.",
                                 within="[0, inf)", group="sampling")
    temperature: float = option(0.0, "Temperature of responses; 0: the likeliest.", within="0 or [0.001, inf)")
    top_k: int = SPIN["top_k"]
    top_p: float = SPIN["top_p"]
    seed: int = RUN["seed"]
    out: str = option("", "Write responses, or metrics, to this new file, as JSON Lines.", group="output")
    device: str = RUN["device"]
    precision: str = RUN["precision"]
    gen_batch: int = RUN["gen_batch"]
    gen_tokens: int = RUN["gen_tokens"]
    micro_tokens: int = RUN["micro_tokens"]
    # fmt: on

    shard = 0  # the default size

    def __post_init__(self) -> None:
        check_fields(self)
        if self.out and os.path.lexists(self.out):
            raise ValueError(f"--out {self.out}: exists, expected a new file")


class Responder:
    """A model that answers, with its tokenizer and the template of its prompts.

    `name` is a run, an iterate, a directory with a model, or a hub id. `fallback` is the template of a model that
    brings none of its own.
    """

    def __init__(self, name: str, args: RespondOptions, fallback: str = "") -> None:
        self.name = name
        self.answered = 0  # The number of prompts so far: each has random numbers of its own.
        path, adapter, record = find(name, args.base)
        began = record.get("args", {})  # the options of the run
        self.args = args = dataclasses.replace(
            args,
            out="",
            eos=args.eos or began.get("eos", ""),
            special_tokens=args.special_tokens or began.get("special_tokens", False),
            max_new_tokens=args.max_new_tokens or began.get("max_new_tokens", 256),
        )
        model_class = Player.class_of(path)
        config = model_class.config_class.from_json(path / "config.json")
        self.context = config.max_position_embeddings
        self.tokenizer = load_tokenizer(path, end_token(path, config.eos_token_id, args.eos), config.vocab_size)
        self.own = record.get("template", "") or ("chat" if read_chat(path)[0] else fallback)
        asked = args.template if args.template != "auto" else self.own or "auto"
        self.template = choose(asked, path, self.tokenizer, messages=False, special_tokens=args.special_tokens)
        self.eos = end_token(path, config.eos_token_id, args.eos, self.template)
        device = choose_device(args.device)
        model = model_class.from_pretrained(path, dtype=torch.float32, device=device).eval()
        if adapter:
            lora.load_adapter(model, adapter)
        bf16 = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda")
        self.player = Player(model, self.eos, args, torch.bfloat16 if bf16 else torch.float32)

    def respond(self, examples: list[Example]) -> list[tuple[str, bool]]:
        """(text, whether it ended by itself) for the prompt of each example."""
        encode(examples, self.tokenizer, self.template, self.eos)
        longest = max(examples, key=lambda example: len(example.prompt_ids))
        room = self.context - len(longest.prompt_ids)
        if room < 1:
            size = f"{len(longest.prompt_ids)} tokens with the template, the context of {self.name} is {self.context}"
            raise ValueError(f"{longest.where}: the prompt has {size}")
        args, rows = self.args, range(self.answered, self.answered + len(examples))
        self.answered = rows.stop
        sampling = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
        limit = min(args.max_new_tokens, room)
        prompts = [example.prompt_ids for example in examples]
        responses = self.player.respond(prompts, args.seed, rows=rows, max_new_tokens=limit, **sampling)
        return [(decode(ids, self.tokenizer, *self.player.ends), finished) for ids, finished in responses]


def find(name: str, base: str = "") -> tuple[Path, str, dict[str, Any]]:
    """(directory of the model, adapter on top of it or "", record of its run or {}) of what a name stands for.

    A run stands for its last iterate. `base` replaces the model below an adapter.
    """
    path = Path(name)
    run = next((folder for folder in (path, path.parent) if (folder / "run.json").is_file()), None)
    record: dict[str, Any] = (run and Folder(run).record()) or {}
    if run:
        iterates = ["final", *(f"iterate-{t}" for t in range(record["args"]["iterations"], 0, -1)), "best"]
        made = [iterate for iterate in iterates if (run / iterate).is_dir()]
        path = run / made[0] if run == path and made else path
        if path.name != "iterate-0" and (run == path or not path.is_dir()):
            raise ValueError(f"{name}: no such iterate; there are {', '.join(['iterate-0', *made])}")
    began = record.get("args", {})
    if run and path.name == "iterate-0":
        adapter = began["adapter"]
    elif (path / "adapter_config.json").exists():
        adapter = str(path)
    else:
        return resolve_model(str(path), flag="")[0], "", record
    config = Path(adapter, "adapter_config.json")
    below = base or began.get("model") or read_object(config).get("base_model_name_or_path")
    if not below:
        raise ValueError(f"{config}: names no base model; --base names it")
    return resolve_model(str(below), None if base else record.get("revision"))[0], adapter, record


# ---------------------------------------------------------------- responses, or metrics


def answer(responders: list[Responder], examples: list[Example], with_prompt: bool) -> list[dict[str, Any]]:
    """Prints every model's response to each prompt. Returns them as rows of --out, which --data can read."""
    rows = []
    for example, *answers in zip(examples, *(responder.respond(examples) for responder in responders)):
        if with_prompt:
            print(f"> {example.prompt}")
        for responder, (text, finished) in zip(responders, answers):
            title = f"[{responder.name}]\n" if len(responders) > 1 else ""
            print(title + (text if finished else f"{text} [...]"), flush=True)  # Otherwise the length limit cut it.
            row = {"model": responder.name, "prompt": example.prompt, "response": text, "finished": finished}
            rows.append(row | ({"references": example.references} if example.references else {}))
        if with_prompt:
            print()
    return rows


def talk(responders: list[Responder], chat: bool) -> list[dict[str, Any]]:
    """Answers prompts from a terminal or a pipe, one per line. With `chat` they continue a conversation."""
    terminal = sys.stdin.isatty()
    if terminal:
        print("Type a prompt; Ctrl-D ends." + (" An empty line begins a new conversation." if chat else ""))
    rows, turns = [], ()
    for number in itertools.count(1):
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return rows
        if line:
            turns = (*(turns if chat else ()), ("user", line))
            answers = answer(responders, [Example(f"stdin:{number}", number, line, "", [], turns=turns)], False)
            turns, rows = (*turns, ("assistant", answers[0]["response"] or " ")), rows + answers
        else:
            turns = ()


def respond(responders: list[Responder], args: RespondOptions) -> list[dict[str, Any]]:
    """Answers the prompts of the command line, of files or of the terminal, and prints the answers."""
    examples = [Example(f"--prompt:{i}", i, text, "", []) for i, text in enumerate(args.prompt, 1)]
    examples += load_examples(args.prompts, "prompts", args.fields, quiet=True) if args.prompts else []
    if not examples:
        return talk(responders, args.chat)
    batches = [examples[first : first + args.gen_batch] for first in range(0, len(examples), args.gen_batch)]
    return [row for batch in batches for row in answer(responders, batch, with_prompt=len(examples) > 1)]


def metrics(responders: list[Responder], args: RespondOptions) -> list[dict[str, Any]]:
    """Held-out metrics of every model, on the examples that fit the contexts of all; KL is KL(first, model)."""
    for other in responders[1:]:
        if other.tokenizer.get_vocab() != responders[0].tokenizer.get_vocab():
            same = f"its vocabulary is not that of {args.model}; metrics need the same"
            raise ValueError(f"--compare {other.name}: {same}")
    examples = draw(load_examples(args.eval_data, fields=args.fields), args.eval_limit)
    context = min(responder.context for responder in responders)
    length, skipped = max(responder.args.max_new_tokens for responder in responders), 0
    for responder in responders:
        encode(examples, responder.tokenizer, responder.template, responder.eos)
        examples, count = fit_context(examples, context, length, "skip")
        skipped += count
    if skipped:
        print(f"left out {skipped} examples that do not fit a context of {context} tokens", flush=True)
    rows, start = [], None
    for responder in responders:
        encode(examples, responder.tokenizer, responder.template, responder.eos)
        as_decoded(examples, responder.tokenizer, responder.eos)
        functions = load_metrics(args.metric)
        work = Work(responder.args, responder.tokenizer, responder.eos, examples, functions, args.gen_batch)
        start = start or sample_start(responder.player, work)
        rows.append({"model": responder.name} | evaluate(responder.player, start, work))
    print(table_of("", rows, ["model", *metrics_of(rows)]).text())
    return rows


def main(argv: list[str] | None = None) -> int:
    with streams():
        try:
            args = parse(RespondOptions, sys.argv[1:] if argv is None else argv, "respond.py", __doc__ or "")
            with onednn.products(), torch.no_grad():
                responders = [Responder(args.model, args)]
                for name in args.compare:
                    responders.append(Responder(name, args, responders[0].own))
                rows = metrics(responders, args) if args.eval_data else respond(responders, args)
            if args.out:
                write_rows(Path(args.out), rows)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            return fail("respond.py", error, 2)
        except KeyboardInterrupt:
            print()
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
