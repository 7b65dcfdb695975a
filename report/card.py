"""The model card of an exported iterate: where it comes from, how it was made and how good it is."""

import json
from collections.abc import Sequence
from pathlib import Path

from evaluate import Row
from report.tables import text_of

SPIN = "SPIN (self-play fine-tuning, arXiv 2401.01335)"
METHODS = {"spin": SPIN, "sft": "supervised fine-tuning"}


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
    method = METHODS.get(command, f"a relative of {SPIN}")
    base = f"\nbase_model: {hub}" if hub else ""
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{"sft" if command == "sft" else "spin, self-play"}]{base}
---
# {public(args["model"])}, iterate {iterate} of {command}

Iterate {iterate} of {rows[-1]["iterate"]} of a run of {method}. Iterate 0 is the base model.

{listed}

```
{text_of(rows)}
```

![Held-out metrics and training signals](metrics.svg)

The tokenizer's chat template writes a prompt as it was written in training.
"""


def public(*names: str) -> str:
    """Ids of the hub as they are, and of paths the last part: a published card must not tell the author's folders."""
    return ", ".join(f"`{Path(name).resolve().name if Path(name).exists() else name}`" for name in names)
