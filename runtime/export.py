"""A model as a directory that other tools load: weights, config, tokenizer, and what else came with the start."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from model import GPTNeo, GPTNeoConfig
from runtime.files import read_object, read_text, token_text
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
