"""The model card of an exported iterate: where it comes from, how it was made and how good it is."""

import json
from collections.abc import Sequence
from pathlib import Path

from evaluate import Row
from report.tables import text_of

METHODS = {"spin": "SPIN (self-play fine-tuning, arXiv 2401.01335)", "sft": "supervised fine-tuning"}
RELATIVE = "a relative of SPIN (self-play fine-tuning, arXiv 2401.01335)"
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]{base_model}
---
# {model}, iterate {iterate} of {command}

Iterate {iterate} of {last} of a run of {method}. Iterate 0 is the base model.

{facts}

```
{tables}
```

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


def card(iterate: int, rows: Sequence[Row], record: Row) -> str:
    """The text of the card. `record` is that of run.json."""
    args, digests, command = record["args"], record["digests"], record["command"]
    source = "pairs" if args.get("pairs") else "data"
    hub = "" if Path(args["model"]).is_dir() else args["model"].partition("@")[0]
    commit = f", commit {record['revision']}" if record["revision"] else ""
    facts = {
        "Base model": f"{public(args['model'])}{commit}",
        "sha256 of its files": digests["model"],
        "Training data": public(*args[source]),
        "sha256 of its contents": digests[source],
        "Held-out data": public(*args["eval_data"]) or f"a share of {args['eval_share']} of the data",
        "sha256 of its examples": digests["eval-data"],
        "Settings that are not the default": f"`{record['settings'] or 'none'}`",
        "Prompt template": f"`{json.dumps(record['template'], ensure_ascii=False)}`",
        "torch": record["torch"],
    }
    return CARD.format(
        tags="sft" if command == "sft" else "spin, self-play",
        base_model=f"\nbase_model: {hub}" if hub else "",
        model=public(args["model"]),
        iterate=iterate,
        last=rows[-1]["iterate"],
        command=command,
        method=METHODS.get(command, RELATIVE),
        facts="\n".join(f"- {name}: {value}" for name, value in facts.items()),
        tables=text_of(rows),
    )


def public(*names: str) -> str:
    """Hub ids as they are, and only the last part of a path: a published card must not reveal the author's folders."""
    return ", ".join(f"`{Path(name).resolve().name if Path(name).exists() else name}`" for name in names)
