"""A model as a directory that other tools load: weights, config, tokenizer, and what else came with the start."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data.files import read_object, read_text, token_text
from data.templates import jinja_of, read_chat

# Files of the start besides the weights: those that are copied, and those in which the end token may change.
COPIED = ("vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja")
CHANGED = ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json")
# Fields that do not hold for an exported model, which is in fp32 and has no code of its own.
STALE = ("_name_or_path", "auto_map", "dtype", "quantization_config", "torch_dtype")


def export(model: Any, config: Any, folder: Path, start: Path, tokenizer: Tokenizer, template: str = "") -> None:
    """Writes `model`, which has no adapters, into `folder` as a plain model with the end token of `config`.

    The files of `start` besides the weights are written, too. `template` is that of the prompts, "chat" or a text,
    which becomes the chat template if the start has none.
    """
    texts = side_files(start, config, tokenizer)
    if template not in ("", "chat") and not read_chat(start)[0]:
        texts["chat_template.jinja"] = jinja_of(template)
    model.save_pretrained(folder)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def side_files(start: Path, config: Any, tokenizer: Tokenizer) -> dict[str, str]:
    """The texts of all files besides the weights by name. `setup` calls it, too, to find damaged files early."""
    texts = {name: read_text(start / name) for name in COPIED if (start / name).is_file()}
    texts["tokenizer.json"] = tokenizer.to_str(pretty=True)
    values = {name: read_object(start / name) for name in CHANGED}
    eos_token_id, eos = config.eos_token_id, tokenizer.id_to_token(config.eos_token_id)
    # For GPT-Neo transformers would choose GPT-2's class, which puts GPT-2's pre-tokenizer in place of that in
    # tokenizer.json. The generic class leaves tokenizer.json as it is.
    defaults = {"clean_up_tokenization_spaces": False, "model_max_length": config.max_position_embeddings}
    generic = {"tokenizer_class": "PreTrainedTokenizerFast"}
    values["tokenizer_config.json"] = defaults | values["tokenizer_config.json"] | generic
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if values[name] and token_text(values[name].get("eos_token")) != eos:
            values[name]["eos_token"] = eos
    theirs = read_object(start / "config.json")
    values["config.json"] = theirs | json.loads(config.to_json())
    for name, listed in (("generation_config.json", values["generation_config.json"]), ("config.json", theirs)):
        if values[name]:  # Of several end tokens, the first is that of the run.
            ends = listed.get("eos_token_id")
            ends = list(dict.fromkeys([eos_token_id, *ends])) if isinstance(ends, list) else eos_token_id
            values[name]["eos_token_id"] = ends
    kept = {name: {key: field for key, field in value.items() if key not in STALE} for name, value in values.items()}
    return texts | {name: json.dumps(value, indent=2) + "\n" for name, value in kept.items() if values[name]}
