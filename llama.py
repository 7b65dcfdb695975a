"""The Llama family from scratch: Llama 2 and 3, Mistral, Qwen2 and Qwen3, and what has their layout.

SmolLM2, TinyLlama, Yi and DeepSeek's distillates are Llamas or Qwens, Zephyr is a Mistral. This file needs model.py, of
which it uses the base class, attention and files; the two can be copied together into another code base.

Where these models differ from GPT-Neo:
- norms are RMS norms, computed in fp32, without biases;
- positions rotate queries and keys; there is no table of positions;
- queries in groups of H / G share a key/value head;
- the MLP is a product of two branches, one of which goes through silu;
- the head may have weights of its own.

Module attributes are named like the state-dict keys on the hub, and config fields like those of config.json.

Shapes: B rows, T tokens, D hidden size, H heads, G key/value heads, K head size, V vocabulary.
Sources: arXiv 2307.09288 (Llama 2), 2407.21783 (Llama 3), 2310.06825 (Mistral), 2407.10671 (Qwen2), 2505.09388 (Qwen3);
checked against transformers.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import END, SHARE, SIZE, CacheUpdate, LanguageModel, Mask, attention, check_fields, config_from, read_config

QWEN = dict(
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768,
    sliding_window=4096, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
MISTRAL = dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
FAMILY: dict[str, dict[str, Any]] = {  # The fields whose defaults differ from Llama's, keyed by model_type.
    "llama": {}, "mistral": MISTRAL, "qwen2": QWEN, "qwen3": QWEN | {"head_dim": 128},
}  # fmt: skip
# Fields that change the computation in ways that are not implemented, and the values that do not.
REFUSED = {"partial_rotary_factor": (None, 1), "rope_interleaved": (None, False)}
ROPE_FIELDS = {  # The fields that each type of rotary positions requires.
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
KINDS = {"full_attention": "global", "sliding_attention": "local"}  # names of layer_types -> those of model.py


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of config.json that define the computation, with Llama's defaults.

    Raises: ValueError naming the field that has an unsupported value.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None means num_attention_heads
    head_dim: int | None = None  # None means hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # {"rope_type": ..., "factor": ...}; None means default
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool = False  # Qwen's switch; a Mistral with a window uses it in all layers.
    max_window_layers: int = 28  # The layers before this one are global.
    layer_types: list[str] | None = None  # This overrides the three fields above.
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self) -> None:
        check = partial(check_fields, self)
        check("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads", *SIZE)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        check("num_key_value_heads head_dim max_position_embeddings", *SIZE)
        heads = self.num_attention_heads
        check("num_key_value_heads", f"a divisor of num_attention_heads = {heads}", lambda n: heads % n == 0)
        check("head_dim", "an even number, since positions rotate pairs", lambda size: size % 2 == 0)
        check("hidden_act", "'silu', the only supported one", lambda name: name == "silu")
        check("attention_dropout", *SHARE)
        check("sliding_window", "null or an integer of at least 1", lambda n: n is None or SIZE[1](n))
        check("eos_token_id", *END)
        check("rope_scaling", f"null, or the type ({', '.join(ROPE_FIELDS)}) with its fields as numbers", self._is_rope)
        expected = f"null, or for each of {self.num_hidden_layers} layers one of {', '.join(KINDS)}"
        check("layer_types", expected, lambda _: len(self.attention_layers) == self.num_hidden_layers)

    @staticmethod
    def _is_rope(scaling: Any) -> bool:
        if scaling is None:
            return True
        needed = ROPE_FIELDS.get(scaling.get("rope_type")) if isinstance(scaling, dict) else None
        return needed is not None and all(type(scaling.get(name)) in (int, float) for name in needed)

    @property
    def attention_layers(self) -> list[str]:
        """The kind of attention of each layer, "global" or "local"; empty if layer_types is malformed."""
        types, mistral = self.layer_types, self.model_type == "mistral"
        if types is None:
            windowed = self.sliding_window and (self.use_sliding_window or mistral)
            first = 0 if mistral else self.max_window_layers
            return ["local" if windowed and layer >= first else "global" for layer in range(self.num_hidden_layers)]
        known = isinstance(types, list) and all(kind in KINDS for kind in types)
        return [KINDS[kind] for kind in types] if known else []

    @property
    def window_size(self) -> int:
        return self.sliding_window or self.max_position_embeddings

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> "LlamaConfig":
        """Reads a config.json. Raises: FileNotFoundError; ValueError naming the file and the unsupported field."""
        path = Path(path)
        raw = read_config(path, FAMILY)
        for name, harmless in REFUSED.items():
            if raw.get(name) not in harmless:
                raise ValueError(f"{path}: config field {name} = {raw[name]!r} is not supported")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5 and 4 use different names.
        if isinstance(rope, dict):  # Otherwise the check of rope_scaling says what is wrong.
            raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", cls.rope_theta))
            kind = str(rope.get("rope_type", rope.get("type", "default")))
            rope = {"rope_type": kind} | {name: rope.get(name) for name in ROPE_FIELDS.get(kind, ())}
        raw["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
        return config_from(cls, path, FAMILY[raw["model_type"]] | raw)

    def to_json(self) -> str:
        """The text of a config.json, which transformers can read too."""
        architecture = f"{self.model_type.capitalize()}ForCausalLM"
        return json.dumps({"architectures": [architecture]} | asdict(self), indent=2) + "\n"

    def frequencies(self) -> Tensor:
        """(K / 2,) fp32: by how many radians each pair of a head's numbers turns from one position to the next."""
        frequencies = self.rope_theta ** -(torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        scaling = self.rope_scaling or {"rope_type": "default"}
        if scaling["rope_type"] == "linear":
            return frequencies / scaling["factor"]
        if scaling["rope_type"] == "llama3":
            # Pairs that turn at least `high` times within the old context keep their frequency, those that turn at most
            # `low` times are slowed down by `factor`, and the others get a mixture.
            _, factor, low, high, context = scaling.values()
            turns = context * frequencies / (2 * math.pi)
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            return frequencies * (kept + (1 - kept) / factor)
        return frequencies


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 but for the last product."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


Rotation = tuple[Tensor, Tensor]  # cosines and sines of the angles, (B, 1, T, K / 2) fp32


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pair (i, i + K / 2) of every head by the angle of its position. x: (B, heads, T, K); cos, sin: fp32."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        D, K, G = config.hidden_size, config.head_dim, config.num_key_value_heads
        inner = config.num_attention_heads * K
        self.layer, self.head_dim = layer, K
        self.dropout = config.attention_dropout
        local = config.attention_layers[layer] == "local"
        self.window = config.window_size if local else config.max_position_embeddings
        bias = {"qwen2": True, "mistral": False}.get(config.model_type, config.attention_bias)
        self.q_proj = nn.Linear(D, inner, bias=bias)
        self.k_proj = nn.Linear(D, G * K, bias=bias)
        self.v_proj = nn.Linear(D, G * K, bias=bias)
        self.o_proj = nn.Linear(inner, D, bias=bias and config.model_type != "qwen2")
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(K, config.rms_norm_eps)
            self.k_norm = RMSNorm(K, config.rms_norm_eps)

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, update_cache: CacheUpdate | None) -> Tensor:
        q, k, v = (proj(x).unflatten(2, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, K) and twice (B, G, T, K)
        q, k = rotated(q, *rotation), rotated(k, *rotation)
        if update_cache is not None:
            k, v = update_cache(self.layer, k, v)
        y = attention(q, k, v, mask, self.window, self.head_dim**-0.5, self.dropout * self.training)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


class LlamaMLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        bias = config.mlp_bias and config.model_type == "llama"
        self.gate_proj = nn.Linear(D, inner, bias=bias)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.kind = config.attention_layers[layer]
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, update_cache: CacheUpdate | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, update_cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(LanguageModel):
    """A model of the Llama family, with a tied or a separate language-model head."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(LlamaBlock(config, layer) for layer in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # The frequencies are no buffer, since no file has them. They are computed when the model first runs.
        self._frequencies: Tensor | None = None

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model["layers"]

    @property
    def head_weight(self) -> Tensor:
        return (self.model["embed_tokens"] if self.config.tie_word_embeddings else self.lm_head).weight

    def _run_blocks(
        self, input_ids: Tensor, positions: Tensor, masks: dict[str, Mask], update_cache: CacheUpdate | None
    ) -> Tensor:
        embed_tokens, layers, norm = self.model.values()
        if self._frequencies is None or self._frequencies.device != positions.device:
            self._frequencies = self.config.frequencies().to(positions.device)
        angles = positions[:, None, :, None] * self._frequencies  # (B, 1, T, K / 2)
        rotation = angles.cos(), angles.sin()
        x = embed_tokens(input_ids)
        for block in layers:
            x = self._run(block, x, rotation, masks[block.kind], update_cache)
        return norm(x)
