#!/usr/bin/env python3
"""Talk to what a run made: any iterate, final/, another directory with a model, or a hub id.

    python respond.py runs/spin                                 a loop of prompts, answered by the run's last iterate
    python respond.py runs/spin --prompt "HELLO" "BYE"          one answer per prompt
    python respond.py runs/spin/iterate-2 --prompts F.jsonl     every prompt of a file, in any layout of --data
    python respond.py runs/spin --compare runs/spin/iterate-0   two models; iterate-0 is the start of the run

A prompt is written by the template that the run used, which --template overrides. Responses are the likeliest ones
unless --temperature asks for samples.
"""

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lora
from data.examples import Example, decode, encode, load_examples, load_tokenizer
from data.files import read_object
from data.templates import choose, read_chat
from kernels import onednn
from player import Player
from runtime.cli import fail, streams
from runtime.folder import Folder, write_rows
from runtime.options import RunOptions, check_fields, option, parse
from runtime.setup import choose_device, end_token, resolve_model
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
    prompt: tuple[str, ...] = option((), "Prompts. Without any, prompts are read from the terminal.", metavar="TEXT",
                                     group="prompts", check=str.strip, expected="a text")
    prompts: tuple[str, ...] = option((), "Files, directories or hub data sets with prompts.", metavar="PATH")
    fields: tuple[str, ...] = RUN["fields"]
    template: str = option("auto", "Prompt template; auto: that of the run, or of the model.",
                           check=RUN["template"].metadata["check"], expected=RUN["template"].metadata["expected"])
    special_tokens: bool = RUN["special_tokens"]
    chat: bool = option(False, "Typed prompts continue a conversation; an empty line begins a new one.")
    max_new_tokens: int = option(0, "Length limit of responses, in tokens; 0: that of the run, or 256.",
                                 within="[0, inf)", group="sampling")
    temperature: float = option(0.0, "Temperature of responses; 0: the likeliest.", within="0 or [0.001, inf)")
    top_k: int = SPIN["top_k"]
    top_p: float = SPIN["top_p"]
    seed: int = RUN["seed"]
    out: str = option("", "Write responses to this new file, as JSON Lines.", group="output")
    device: str = RUN["device"]
    precision: str = RUN["precision"]
    gen_batch: int = RUN["gen_batch"]
    gen_tokens: int = RUN["gen_tokens"]
    micro_tokens: int = RUN["micro_tokens"]
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)
        if self.out and os.path.lexists(self.out):
            raise ValueError(f"--out {self.out}: exists, expected a new file")


class Responder:
    """A model that answers, with its tokenizer and the template of its prompts, which is `fallback` if it has none."""

    def __init__(self, name: str, args: RespondOptions, fallback: str = "") -> None:
        self.name = name
        self.answered = 0  # The number of prompts so far: each has random numbers of its own.
        folder, record = find(name)
        settings = record.get("args", {})
        adapter = settings.get("adapter") if folder is None else folder
        if folder is None or Path(folder, "adapter_config.json").exists():
            base = args.base or settings.get("model")
            base = base or read_object(Path(adapter, "adapter_config.json")).get("base_model_name_or_path")
            if not base:
                raise ValueError(f"{adapter}/adapter_config.json: names no base model; --base names it")
            path, _ = resolve_model(str(base), None if args.base else record.get("revision"))
        else:
            (path, _), adapter = resolve_model(folder, flag=""), None
        model_class = Player.class_of(path)
        config = model_class.config_class.from_json(path / "config.json")
        wanted = args.eos or settings.get("eos", "")
        self.context = config.max_position_embeddings
        self.tokenizer = load_tokenizer(path, end_token(path, config.eos_token_id, wanted), config.vocab_size)
        self.own = record.get("template", "") or ("chat" if read_chat(path)[0] else fallback)
        special = args.special_tokens or settings.get("special_tokens", False)
        asked = args.template if args.template != "auto" else self.own or "auto"
        self.template = choose(asked, path, self.tokenizer, messages=False, special_tokens=special)
        self.eos = end_token(path, config.eos_token_id, wanted, self.template)
        device = choose_device(args.device)
        model = model_class.from_pretrained(path, dtype=torch.float32, device=device).eval()
        if adapter:
            lora.load_adapter(model, adapter)
        length = args.max_new_tokens or settings.get("max_new_tokens", 256)
        self.args = dataclasses.replace(args, out="", max_new_tokens=length)
        bf16 = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda")
        self.player = Player(model, self.eos, self.args, torch.bfloat16 if bf16 else torch.float32)

    def respond(self, examples: list[Example]) -> list[tuple[str, bool]]:
        """(text, whether it ended by itself) for the prompt of each example."""
        encode(examples, self.tokenizer, self.template, self.eos)
        longest = max(examples, key=lambda example: len(example.prompt_ids))
        room = self.context - len(longest.prompt_ids)
        if room < 1:
            size = f"{len(longest.prompt_ids)} tokens with the template, the context of {self.name} is {self.context}"
            raise ValueError(f"{longest.where}: the prompt has {size}")
        rows = range(self.answered, self.answered + len(examples))
        self.answered = rows.stop
        options = {name: getattr(self.args, name) for name in ("seed", "temperature", "top_k", "top_p")}
        length = min(self.args.max_new_tokens, room)
        prompts = [example.prompt_ids for example in examples]
        responses = self.player.respond(prompts, rows=rows, max_new_tokens=length, **options)
        return [(decode(ids, self.tokenizer, *self.player.ends), finished) for ids, finished in responses]


def find(name: str) -> tuple[str | None, dict[str, Any]]:
    """(directory or hub id, record of its run or {}) of what a name stands for; None in place of a run's start.

    A run stands for its last iterate. Raises: ValueError if the run has no such iterate.
    """
    path = Path(name)
    run = next((folder for folder in (path, path.parent) if (folder / "run.json").is_file()), None)
    if run is None:
        return name, {}
    record = Folder(run).record()
    iterates = ["final", *(f"iterate-{t}" for t in range(record["args"]["iterations"], 0, -1)), "best"]
    made = [iterate for iterate in iterates if (run / iterate).is_dir()]
    if run == path and made:
        path = run / made[0]
    if path.name == "iterate-0":
        return None, record
    if run == path or not path.is_dir():
        raise ValueError(f"{name}: no such iterate; there are {', '.join(['iterate-0', *made])}")
    return str(path), record


# ---------------------------------------------------------------- responses


def typed_prompts(chat: bool) -> Iterator[Example]:
    """Prompts from a terminal or a pipe, one per line. With `chat` the caller fills in `response`, the next turn."""
    terminal = sys.stdin.isatty()
    if terminal:
        print("Type a prompt; Ctrl-D ends." + (" An empty line begins a new conversation." if chat else ""))
    turns: tuple[tuple[str, str], ...] = ()
    for number in itertools.count(1):
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        example = Example(f"stdin:{number}", number, line, "", [], turns=(*turns, ("user", line)))
        if line:
            yield example
        turns = (*example.turns, ("assistant", example.response or " ")) if line and chat else ()


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
        example.response = answers[0][0]
    return rows


def respond(responders: list[Responder], args: RespondOptions) -> list[dict[str, Any]]:
    """Answers the prompts of the command line, of files or of the terminal, and prints the answers."""
    examples = [Example(f"--prompt:{i}", i, text, "", []) for i, text in enumerate(args.prompt, 1)]
    examples += load_examples(args.prompts, "prompts", args.fields, quiet=True) if args.prompts else []
    batches = [examples[first : first + args.gen_batch] for first in range(0, len(examples), args.gen_batch)]
    rows = []
    for batch in batches or ([example] for example in typed_prompts(args.chat)):
        rows += answer(responders, batch, with_prompt=len(examples) > 1)
    return rows


def main(argv: list[str] | None = None) -> int:
    try:
        with streams(), onednn.products(), torch.no_grad():
            args = parse(RespondOptions, sys.argv[1:] if argv is None else argv, "respond.py", __doc__ or "")
            responders = [Responder(args.model, args)]
            for name in args.compare:
                responders.append(Responder(name, args, responders[0].own))
            rows = respond(responders, args)
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
