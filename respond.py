#!/usr/bin/env python3
"""Talk to what a run made: any iterate, final/, another directory with a model, or a hub id.

    python respond.py runs/spin                                 a loop of prompts, answered by the run's last iterate
    python respond.py runs/spin --prompt "HELLO"                one answer; --prompt may be repeated
    python respond.py runs/spin/iterate-2 --prompts F.jsonl     every prompt of a file, in any layout of --data
    python respond.py runs/spin --compare runs/spin/iterate-0   two side by side; iterate-0 is the start of the run
    python respond.py runs/spin --eval-data F.jsonl             held-out metrics instead of responses

A prompt is written by the template that the run used, which --template overrides. Responses are the likeliest ones
unless --temperature asks for samples.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lora
from kernels import onednn
from model import GPTNeo
from player import Player
from runtime import cli, record, report, storage
from runtime.data import Example, as_decoded, draw, encode, fit_context, load_examples, load_tokenizer
from runtime.evaluate import evaluate, sample_start
from runtime.functions import load_metrics
from runtime.options import Args, CommandLine, as_typed, at_least, check_file, checked, help_text, option
from runtime.run import Run
from runtime.setup import choose_device, end_token, load_config, resolve_model
from runtime.template import Template, choose, read_chat


def same(name: str, default: Any = None, **changes: Any) -> Any:
    """The option of the same name of spin.py."""
    (field,) = (field for field in dataclasses.fields(Args) if field.name == name)
    facts = dict(field.metadata) | dict(scripts=("respond",), group="") | changes
    return dataclasses.field(default=field.default if default is None else default, metadata=facts)


def own(default: Any, help: str, **facts: Any) -> Any:
    return option(default, help, scripts=("respond",), **facts)


@dataclass(frozen=True)
class RespondArgs:
    """The options of respond.py."""

    compare: tuple[str, ...] = own(
        (), "Another iterate or model, to show beside the first.", repeated="PATH", group="model"
    )
    base: str = own("", "Model below an adapter; default: the one that the run began with.")
    eos: str = same("eos")
    prompt: tuple[str, ...] = own((), "A prompt; repeated, it adds. Without any, prompts are read from stdin.",
                                  repeated="TEXT", group="prompts")  # fmt: skip
    prompts: tuple[str, ...] = own((), "Prompts from a file, a directory or a hub data set.", repeated="PATH")
    fields: tuple[str, ...] = same("fields")
    template: str = same(
        "template", "auto", help="Prompt template, as in spin.py; auto: that of the run, or of the model."
    )
    special_tokens: bool = same("special_tokens")
    chat: bool = own(False, "In the loop, earlier turns stay a part of the prompt; an empty line begins anew.")
    eval_data: tuple[str, ...] = same("eval_data", help="Evaluate on this data: metrics in place of responses.")
    metric: tuple[str, ...] = same("metric", help="Adds a metric to --eval-data, as in spin.py.")
    eval_limit: int = same("eval_limit", 0, help="Number of examples of --eval-data, drawn as in spin.py; 0: all.")
    max_new_tokens: int = own(0, "Length limit of responses, in tokens; 0: that of the run, or 256.", group="sampling",
                              **at_least(0))  # fmt: skip
    temperature: float = same("temperature", 0.0, help="Temperature of sampling; 0: greedy.")
    top_k: int = same("top_k", help="Sample from the k likeliest tokens; 0: all.")
    top_p: float = same("top_p", help="Sample from the likeliest tokens with this total probability; 1: all.")
    seed: int = same("seed")
    out: str = own("", "Write responses, or metrics, to this new file, as JSON Lines.", group="output")
    device: str = same("device")
    precision: str = same("precision", help="bf16, fp32 or auto; auto: bf16 on a GPU, else fp32.")
    gen_batch: int = same("gen_batch")
    gen_tokens: int = same("gen_tokens")
    micro_tokens: int = same("micro_tokens")
    shard = 0  # of a run: its default

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))
        if self.out and os.path.lexists(self.out):
            raise ValueError(f"{as_typed('out', self.out)}: exists, expected a new file")


class Responder:
    """A model that answers, with its tokenizer and the template of its prompts.

    Args:
        name: a run, an iterate, a directory with a model, or a hub id.
        fallback: the template of a model that brings none of its own.

    Raises: ValueError, FileNotFoundError.
    """

    def __init__(self, name: str, args: RespondArgs, fallback: str = "") -> None:
        self.name = name
        folder, run = find(name)
        settings = run.get("args", {}) if run else {}
        adapter = folder if folder and Path(folder, "adapter_config.json").exists() else None
        if adapter or folder is None:  # an adapter, or a run's start
            base = args.base or settings.get("model") or read_base(adapter)
            adapter = adapter or settings.get("adapter") or None
            path, _ = resolve_model(str(base), None if args.base else run and run.get("revision"))
        else:
            path, _ = resolve_model(str(folder), flag="")
        full = Args(rank=0, eos=args.eos or settings.get("eos", ""))
        config = load_config(path, full)
        self.eos = end_token(path, config.eos_token_id, full.eos)
        self.tokenizer = load_tokenizer(path, self.eos, config.vocab_size)
        self.context = config.max_position_embeddings
        self.device = choose_device(args)
        bf16 = args.precision == "bf16" or (args.precision == "auto" and self.device.type == "cuda")
        model = GPTNeo.from_pretrained(path, dtype=torch.float32, device=self.device).eval()
        if adapter:
            lora.load_adapter(model, adapter)
        self.args = dataclasses.replace(args, max_new_tokens=args.max_new_tokens or settings.get("max_new_tokens", 256))
        self.player = Player(model, self.eos, self.args, torch.bfloat16 if bf16 else torch.float32)
        own = (run or {}).get("template", "") or ("chat" if read_chat(path)[0] else fallback) or "auto"
        special = args.special_tokens or settings.get("special_tokens", False)
        asked = args.template if args.template != "auto" else own
        self.template: Template = choose(asked, path, self.tokenizer, messages=False, special_tokens=special)
        self.own = "" if own == "auto" else own

    def respond(self, examples: list[Example]) -> list[tuple[str, bool]]:
        """(text, whether it ended by itself) for the prompt of each example."""
        encode(examples, self.tokenizer, self.template, self.eos)
        longest = max(examples, key=lambda example: len(example.prompt_ids))
        room = self.context - len(longest.prompt_ids)
        if room < 1:
            size = f"{len(longest.prompt_ids)} tokens with the template, the context of {self.name} is {self.context}"
            raise ValueError(f"{longest.where}: the prompt has {size}")
        responses = self.player.respond(
            [example.prompt_ids for example in examples],
            self.args.seed,
            temperature=self.args.temperature,
            top_k=self.args.top_k,
            top_p=self.args.top_p,
            max_new_tokens=min(self.args.max_new_tokens, room),
        )
        run = self.as_run([])
        return [(run.text(ids), finished) for ids, finished in responses]

    def as_run(self, heldout: list[Example]) -> Run:
        """What evaluation asks for. Nothing is written."""
        metrics = load_metrics(self.args.metric)
        return Run(
            self.args, self.tokenizer, self.eos, self.device, Path("."), Path("."), heldout=heldout, metrics=metrics
        )


def find(name: str) -> tuple[str | None, dict[str, Any] | None]:
    """(directory or hub id, record of its run) of what a name stands for; None in place of a run's start.

    A run stands for its last iterate. Raises: ValueError where it has none yet.
    """
    path = Path(name)
    if Path(path, "run.json").is_file():
        run = record.read(path)
        made = [path / "final", *(path / f"iterate-{t}" for t in range(run["args"]["iterations"], 0, -1))]
        there = next((folder for folder in made if folder.is_dir()), None)
        if there is None:
            raise ValueError(f"{name}: the run has no iterate yet; {name}/iterate-0 is its start")
        return str(there), run
    run = record.read(path.parent) if Path(path.parent, "run.json").is_file() else None
    if run and path.name == "iterate-0":
        return None, run
    if run and not path.is_dir():
        made = sorted(folder.name for folder in path.parent.iterdir() if Path(folder, "model.safetensors").exists()
                      or Path(folder, "adapter_config.json").exists())  # fmt: skip
        raise ValueError(f"{name}: no such iterate; there are {', '.join(['iterate-0', *made])}")
    return name, run


def read_base(adapter: str | None) -> str:
    """The base model that an adapter names."""
    file = Path(adapter or "", "adapter_config.json")
    check_file(file, lora.CONFIG_BYTES)
    base = json.loads(file.read_bytes()).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{file}: names no base model; --base names it")
    return base


# ---------------------------------------------------------------- prompts


def examples_of(args: RespondArgs) -> list[Example]:
    """The prompts of --prompt and --prompts."""
    typed = [Example("--prompt", i, text, "", []) for i, text in enumerate(args.prompt, 1)]
    if any(not example.prompt.strip() for example in typed):
        raise ValueError("--prompt '': expected a text")
    read = load_examples(args.prompts, "prompts", args.fields) if args.prompts else []
    return typed + read


def typed_prompts(chat: bool) -> Iterator[Example]:
    """Prompts from a terminal or a pipe, one a line. With `chat` the caller appends to `turns` what was answered."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then knows the arrow keys
        print("Type a prompt; Ctrl-D ends." + (" An empty line begins a new conversation." if chat else ""))
    turns: list[tuple[str, str]] = []
    number = 0
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        number += 1
        if not line:
            turns.clear()
            continue
        turns = [*turns, ("user", line)] if chat else [("user", line)]
        example = Example("stdin", number, line, "", [], turns=tuple(turns))
        yield example
        if chat:
            turns.append(("assistant", example.response or " "))


# ---------------------------------------------------------------- output


def show(example: Example, answers: list[tuple[str, bool]], names: list[str], with_prompt: bool) -> None:
    """Prints a response as it is, or several side by side."""
    texts = [text if finished else f"{text} [...]" for text, finished in answers]  # cut at the length limit
    if with_prompt:
        print(f"> {example.prompt}")
    if len(texts) == 1:
        print(texts[0], flush=True)
    else:
        print(side_by_side(names, texts, shutil.get_terminal_size().columns), flush=True)
    if with_prompt:
        print()


def side_by_side(titles: list[str], texts: list[str], width: int) -> str:
    """Texts in columns under their titles, wrapped to the width of the terminal."""
    column = max(20, (width - 3 * (len(texts) - 1)) // len(texts))
    cells = [[title[-column:], "-" * column, *wrapped(text, column)] for title, text in zip(titles, texts)]
    rows = max(map(len, cells))
    padded = [cell + [""] * (rows - len(cell)) for cell in cells]
    return "\n".join(" | ".join(line.ljust(column) for line in row).rstrip() for row in zip(*padded))


def wrapped(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]]


def rows_of(example: Example, answers: list[tuple[str, bool]], names: list[str]) -> list[dict[str, Any]]:
    """A row of --out for each model: "prompt" and "response" as --data reads them."""
    rows = []
    for name, (text, finished) in zip(names, answers):
        row = {"model": name, "prompt": example.prompt, "response": text, "finished": finished}
        rows.append(row | ({"references": example.references} if example.references else {}))
    return rows


# ---------------------------------------------------------------- the three ways to use it


def respond(responders: list[Responder], args: RespondArgs) -> list[dict[str, Any]]:
    """Answers the prompts of the command line, of files or of stdin, and prints the answers."""
    names = [responder.name for responder in responders]
    rows = []
    examples = examples_of(args)
    if not examples:
        for example in typed_prompts(args.chat):
            answers = [responder.respond([example])[0] for responder in responders]
            show(example, answers, names, with_prompt=False)
            example.response = answers[0][0]
            rows += rows_of(example, answers, names)
        return rows
    for first in range(0, len(examples), args.gen_batch):
        some = examples[first : first + args.gen_batch]
        for example, *answers in zip(some, *(responder.respond(some) for responder in responders)):
            show(example, answers, names, with_prompt=len(examples) > 1)
            rows += rows_of(example, answers, names)
    return rows


def metrics(responders: list[Responder], args: RespondArgs) -> list[dict[str, Any]]:
    """Held-out metrics of every model; KL is KL(first, model)."""
    rows, start = [], None
    for responder in responders:
        examples = draw(load_examples(args.eval_data, fields=args.fields), args.eval_limit)
        encode(examples, responder.tokenizer, responder.template, responder.eos)
        as_decoded(examples, responder.tokenizer, responder.eos)
        examples, skipped = fit_context(examples, responder.context, responder.args.max_new_tokens, "skip")
        if skipped:
            print(f"{responder.name}: left out {skipped} examples that do not fit the context", flush=True)
        run = responder.as_run(examples)
        start = start or sample_start(responder.player, run)
        rows.append({"model": responder.name} | evaluate(responder.player, start, run))
    print(report.table(rows, {"model": ""} | report.columns_of(rows)))
    return rows


def main(argv: list[str] | None = None) -> int:
    cli.prepare_streams()
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        usage = "%(prog)s MODEL [--flag VALUE ...]"
        print(help_text("respond", RespondArgs, __doc__ or "", usage), end="")
        return 0
    try:
        if not argv or argv[0].startswith("--"):
            raise ValueError("expected a run, an iterate, a model's directory or a hub id before the flags")
        given = CommandLine("respond", RespondArgs).read([(word, "") for word in argv[1:]])
        args = RespondArgs(**{name: value for name, (value, _) in given.items()})
        with onednn.products(), torch.no_grad():
            responders = [Responder(argv[0], args)]
            for name in args.compare:
                responders.append(Responder(name, args, responders[0].own))
            rows = metrics(responders, args) if args.eval_data else respond(responders, args)
        if args.out:
            storage.write_rows(Path(args.out), rows)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        return cli.fail("respond.py", cli.as_text(error), 2)
    except KeyboardInterrupt:
        print()
        return 130
    finally:
        cli.flush_streams()
    return 0


if __name__ == "__main__":
    sys.exit(main())
