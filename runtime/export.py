"""A model as a directory that other tools load: weights, config, tokenizer, and what else came with the start."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from model import GPTNeo, GPTNeoConfig
from runtime import panels, report
from runtime.files import read_object, read_text, token_text
from runtime.options import as_typed, flag_of
from runtime.storage import write_text
from runtime.template import jinja_of, read_chat

# Files of the start that are not weights: as they are, and with our end token.
COPIED = ("added_tokens.json", "chat_template.jinja", "merges.txt", "vocab.json")
CHANGED = ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json")
# Fields of JSON files that do not hold for an exported model: it is fp32 and has no code of its own.
STALE = ("_name_or_path", "auto_map", "dtype", "quantization_config", "torch_dtype")


def export(
    model: GPTNeo, folder: Path, start: Path, tokenizer: Tokenizer, eos_token_id: int, template: str = ""
) -> None:
    """Writes `model` into `folder` as a plain model whose responses end with `eos_token_id`.

    Args:
        model: without adapters.
        start: directory of the model that the run began with; its files beside the weights are written, too.
        tokenizer: the one that the run used.
        template: of the prompts, "chat" or a text, which is written as a chat template where the start has none.

    Raises: OSError; ValueError as `side_files`.
    """
    texts = side_files(start, model.config, tokenizer, eos_token_id)
    if template not in ("", "chat") and not read_chat(start)[0]:
        texts["chat_template.jinja"] = jinja_of(template)
    model.save_pretrained(folder)
    for name, text in texts.items():
        write_text(folder / name, text)


def side_files(start: Path, config: GPTNeoConfig, tokenizer: Tokenizer, eos_token_id: int) -> dict[str, str]:
    """The texts of all files beside the weights, by name. `setup` calls it, too, to find damaged files early.

    Raises: ValueError naming a file that is damaged or too large.
    """
    texts = {name: read_text(start / name) for name in COPIED if (start / name).is_file()}
    texts["tokenizer.json"] = tokenizer.to_str(pretty=True)
    values = {name: read_object(start / name) for name in CHANGED}
    eos = tokenizer.id_to_token(eos_token_id)
    # transformers takes GPT-2's class for GPT-Neo, which replaces the pre-tokenizer of tokenizer.json by GPT-2's. The
    # generic class takes tokenizer.json as it is.
    defaults = {"clean_up_tokenization_spaces": False, "model_max_length": config.max_position_embeddings}
    values["tokenizer_config.json"] = (
        defaults | values["tokenizer_config.json"] | {"tokenizer_class": "PreTrainedTokenizerFast"}
    )
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if values[name] and token_text(values[name].get("eos_token")) != eos:
            values[name]["eos_token"] = eos
    generation = values["generation_config.json"]
    ends = generation.get("eos_token_id")  # one id or several
    if generation and eos_token_id not in (ends if isinstance(ends, list) else [ends]):
        generation["eos_token_id"] = eos_token_id
    ours = json.loads(config.to_json()) | {"eos_token_id": eos_token_id}
    values["config.json"] = read_object(start / "config.json") | ours
    try:
        for name, value in values.items():
            if value:
                kept = {key: field for key, field in value.items() if key not in STALE}
                texts[name] = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
                texts[name].encode()
    except UnicodeEncodeError:
        raise ValueError(f"{start / name}: has half a surrogate pair, which is no text") from None
    return texts


# ---------------------------------------------------------------- the model card

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]{base_model}
---
# {title}

{about}

| | |
|---|---|
{facts}

{tables}

![Held-out metrics and training signals](metrics.svg)

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")  # this folder, or its hub id
model = AutoModelForCausalLM.from_pretrained(".")
messages = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
response = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(response, skip_special_tokens=True))
```
"""


def write_card(run: Any, iterate: int, folder: Path) -> None:
    """README.md and the plot beside an exported iterate: where it comes from, how it was made and how good it is."""
    args, digests, command = run.args, run.record.get("digests", {}), run.record.get("command", "spin")
    method = {"spin": "SPIN (self-play fine-tuning, arXiv 2401.01335)", "sft": "supervised fine-tuning"}.get(
        command, "a relative of SPIN (self-play fine-tuning, arXiv 2401.01335)"
    )
    source, names, _ = args.source
    settings = [
        as_typed(field.name, getattr(args, field.name))
        for field in dataclasses.fields(args)
        if not field.metadata["changeable"] and getattr(args, field.name) != field.default and field.type is not bool
    ]
    switches = [
        flag_of(field.name)
        for field in dataclasses.fields(args)
        if not field.metadata["changeable"] and field.type is bool and getattr(args, field.name)
    ]
    revision = run.record.get("revision")
    hub = not Path(args.model).is_dir() and args.model.partition("@")[0]
    facts = {
        "Base model": f"`{_public(args.model)}`" + (f", commit {revision}" if revision else ""),
        "sha256 of its files": _short(digests.get("model")),
        "Training data": ", ".join(f"`{_public(name)}`" for name in names),
        "sha256 of its contents": _short(digests.get(source)),
        "Held-out data": ", ".join(f"`{_public(name)}`" for name in args.eval_data)
        or f"a share of {args.eval_share} of the data",
        "sha256 of its examples": _short(digests.get("eval-data")),
        "Settings, where not the default": f"`{' '.join(settings + switches) or 'none'}`",
        "Prompt template": f"`{json.dumps(run.record.get('template', ''), ensure_ascii=False)}`",
        "torch": run.record.get("torch", ""),
    }
    text = CARD.format(
        tags="gpt_neo, sft" if command == "sft" else "gpt_neo, spin, self-play",
        base_model=f"\nbase_model: {hub}" if hub else "",
        title=f"{_public(args.model)}, iterate {iterate} of {command}",
        about=f"Iterate {iterate} of {run.rows[-1]['iterate']} of a run of {method}. Iterate 0 is the base model.",
        facts="\n".join(f"| {name} | {fact.replace('|', chr(92) + '|')} |" for name, fact in facts.items()),
        tables=f"```{report.tables(run.rows)}\n```",
    )
    write_text(folder / "README.md", text)
    write_text(folder / "metrics.svg", panels.plot(run.rows, "Held-out metrics and training signals"))


def _public(name: str) -> str:
    """A hub id as it is, of a path its last part: a card that is published tells no folders of its author."""
    return Path(name).resolve().name if Path(name).exists() else name


def _short(digest: str | None) -> str:
    return digest or "unknown"
