"""GPT-Neo from scratch: the model and its weights on disk.

Needs torch and safetensors only (safetensors needs numpy); copy this file alone into another code base.

Where GPT-Neo differs from GPT-2, and mistakes are easy:
- attention scores are NOT divided by sqrt(head size);
- layers alternate between global attention and local attention, in which a position sees the last `window_size`
  positions, itself included;
- q, k and v have no bias, the output projection has one.
As in GPT-2, positions are learned, the activation is gelu_new (tanh) and the head is tied to the token embedding.

Module attributes have the names of the state-dict keys on the hub, and config fields those of config.json. Loading is
therefore strict and needs no table of renames.

Shapes: B rows, T tokens, D hidden size, H heads, K head size, V vocabulary.
Source: github.com/EleutherAI/gpt-neo (Black et al., 2021); checked against transformers' GPTNeoForCausalLM.
"""

import contextlib
import json
import math
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WEIGHT_FILES = tuple(name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))
HEAD = "transformer.wte.weight"  # the language-model head is tied to the token embedding
HEAD_MULTIPLE = 64  # rows of the padded head; products with GPT-Neo's 50257 rows may be slow on a GPU
HEAD_BLOCK = 4096  # rows of a 16-bit head that a CPU casts to fp32 at a time; all at once is up to 5 times slower
JSON_BYTES, JSON_DEPTH = 2**24, 50  # the largest JSON file and the deepest nesting that are accepted
# Keys of hub checkpoints that hold no parameter: causal-mask buffers and the tied head.
IGNORED_KEYS = ("attn.attention.bias", "attn.attention.masked_bias", "lm_head.weight")
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # 8-bit and integer weights need scales


@dataclass(frozen=True)
class GPTNeoConfig:
    """The fields of config.json that define the computation, with the defaults of transformers.

    Raises: ValueError naming the field that has an unsupported value.
    """

    vocab_size: int = 50257
    max_position_embeddings: int = 2048
    hidden_size: int = 2048
    num_layers: int = 24
    num_heads: int = 16
    intermediate_size: int | None = None  # None: 4 * hidden_size
    attention_types: tuple = ((("global", "local"), 12),)  # ((kinds, repeats), ...)
    window_size: int = 256
    activation_function: str = "gelu_new"
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    resid_dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256

    def __post_init__(self) -> None:
        def check(name: str, valid: bool, expected: str) -> None:
            if not valid:
                raise ValueError(f"config field {name} = {getattr(self, name)!r:.200}: expected {expected}")

        for name in ("vocab_size", "max_position_embeddings", "hidden_size", "num_layers", "num_heads", "window_size"):
            value = getattr(self, name)
            limit = 1024 if name == "num_layers" else 2**24  # Sanity bound: a huge value would stall the parser.
            check(name, type(value) is int and 1 <= value <= limit, f"an integer from 1 to {limit}")
        for name in ("embed_dropout", "attention_dropout", "resid_dropout"):
            value = getattr(self, name)
            check(name, type(value) in (int, float) and 0 <= value < 1, "a number in [0, 1)")
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            check(name, type(value) in (int, float) and 0 < value < 1, "a number in (0, 1)")
        for name, only in (("activation_function", "gelu_new"), ("tie_word_embeddings", True)):
            check(name, getattr(self, name) == only, f"{only!r}, as nothing else is supported")
        inner, end = self.intermediate_size, self.eos_token_id
        check("intermediate_size", inner is None or (type(inner) is int and 1 <= inner < 2**31), "null or >= 1")
        check("eos_token_id", end is None or (type(end) is int and 0 <= end < 2**31), "null or one token id")
        check("num_heads", not self.hidden_size % self.num_heads, f"a divisor of hidden_size = {self.hidden_size}")
        kinds = self.attention_layers
        good = len(kinds) == self.num_layers and all(kind in ("global", "local") for kind in kinds)
        expected = "[[kinds, repeats], ...] of 'global' and 'local' that name num_layers"
        check("attention_types", good, f"{expected} = {self.num_layers} layers")

    @property
    def attention_layers(self) -> list[str]:
        """The kind of attention of each layer: `attention_types` expanded, cut after num_layers + 1 entries."""
        try:
            rounds = ((kinds, range(repeats if len(kinds) else 0)) for kinds, repeats in self.attention_types)
            return list(islice((kind for kinds, times in rounds for _ in times for kind in kinds), self.num_layers + 1))
        except (TypeError, ValueError):
            return []

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> "GPTNeoConfig":
        """Reads a config.json. Raises: FileNotFoundError; ValueError naming the file and the unsupported field."""
        path = Path(path)
        if not path.exists() and path.with_name("adapter_config.json").is_file():
            problem = "an adapter's directory; load the base model and put the adapter on top"
            raise FileNotFoundError(f"{path.parent}: {problem}")
        raw = _read_json(path)
        if raw.get("model_type") != "gpt_neo":
            raise ValueError(f"{path}: model_type is {raw.get('model_type')!r:.200}, expected 'gpt_neo'")
        known = {f.name for f in fields(cls)}
        try:
            return cls(**{name: value for name, value in raw.items() if name in known})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_json(self) -> str:
        """The text of a config.json, which transformers can read too."""
        head = {"architectures": ["GPTNeoForCausalLM"], "model_type": "gpt_neo"}
        return json.dumps(head | asdict(self) | {"attention_layers": self.attention_layers}, indent=2) + "\n"


# Takes a layer's index and its new keys and values (B, H, T, K); returns the keys and values to attend to.
CacheUpdate = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
# How the layers of a kind attend. None: causally. A mask (B, 1, T, S) bool, True where attention is allowed. Or a
# function of q (B, H, T, K) and k, v (B, H, S, K) that attends in their place, scores unscaled, without
# attention_dropout: returns (B, H, T, K).
Mask = Tensor | Callable[[Tensor, Tensor, Tensor], Tensor] | None


def local_attention(q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float = 0.0) -> Tensor:
    """Causal attention to the last `window` positions, itself included, with unscaled scores.

    Works in blocks of `window` queries, each of which attends to its own block of keys and the one before. Time and
    memory grow with T * window, and the only mask has shape (window, 2 * window).

    Args:
        q, k, v: (B, H, T, K).
        dropout: probability of dropping an attention weight.

    Returns: (B, H, T, K).
    """
    B, H, T, K = q.shape
    blocks = -(-T // window)
    q, k, v = (F.pad(x, (0, 0, 0, blocks * window - T)).unflatten(2, (blocks, window)) for x in (q, k, v))
    first = F.scaled_dot_product_attention(
        q[:, :, 0], k[:, :, 0], v[:, :, 0], is_causal=True, dropout_p=dropout, scale=1.0
    )
    slot = torch.arange(2 * window, device=q.device)
    query = slot[window:, None]
    y = F.scaled_dot_product_attention(
        q[:, :, 1:].flatten(1, 2),  # (B, H (blocks - 1), window, K)
        *(torch.cat([x[:, :, :-1], x[:, :, 1:]], 3).flatten(1, 2) for x in (k, v)),  # (B, H (blocks - 1), 2 window, K)
        attn_mask=(slot <= query) & (query - slot < window),
        dropout_p=dropout,
        scale=1.0,
    )
    return torch.cat([first.unsqueeze(2), y.view(B, H, blocks - 1, window, K)], 2).flatten(2, 3)[:, :, :T]


class GPTNeoSelfAttention(nn.Module):
    def __init__(self, config: GPTNeoConfig, layer: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.layer = layer
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        local = config.attention_layers[layer] == "local"
        self.window = config.window_size if local else config.max_position_embeddings
        self.k_proj = nn.Linear(D, D, bias=False)
        self.v_proj = nn.Linear(D, D, bias=False)
        self.q_proj = nn.Linear(D, D, bias=False)
        self.out_proj = nn.Linear(D, D)
        self.resid_dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x: Tensor, mask: Mask, update_cache: CacheUpdate | None) -> Tensor:
        projections = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in projections)  # (B, H, T, K)
        if update_cache is not None:
            k, v = update_cache(self.layer, k, v)
        dropout = self.dropout * self.training
        if callable(mask):
            y = mask(q, k, v)
        elif mask is None and self.window < x.shape[1]:
            y = local_attention(q, k, v, self.window, dropout)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=1.0
            )
        return self.resid_dropout(self.out_proj(y.transpose(1, 2).flatten(2)))  # (B, T, D)


class GPTNeoAttention(nn.Module):
    """Exists only because the hub's keys contain `attn.attention.*`."""

    def __init__(self, config: GPTNeoConfig, layer: int) -> None:
        super().__init__()
        self.attention = GPTNeoSelfAttention(config, layer)


class GPTNeoMLP(nn.Module):
    def __init__(self, config: GPTNeoConfig) -> None:
        super().__init__()
        inner = config.intermediate_size or 4 * config.hidden_size
        self.c_fc = nn.Linear(config.hidden_size, inner)
        self.c_proj = nn.Linear(inner, config.hidden_size)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class GPTNeoBlock(nn.Module):
    def __init__(self, config: GPTNeoConfig, layer: int) -> None:
        super().__init__()
        self.kind = config.attention_layers[layer]
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = GPTNeoAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = GPTNeoMLP(config)

    def forward(self, x: Tensor, mask: Mask, update_cache: CacheUpdate | None) -> Tensor:
        x = x + self.attn.attention(self.ln_1(x), mask, update_cache)
        return x + self.mlp(self.ln_2(x))


class GPTNeo(nn.Module):
    """GPT-Neo with a language-model head tied to the token embedding."""

    def __init__(self, config: GPTNeoConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: save only the input of each block and run it again in the backward pass
        self._padded_head: Tensor | None = None  # (V + head_padding_rows, D), see head_padding_rows
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.hidden_size),
                "wpe": nn.Embedding(config.max_position_embeddings, config.hidden_size),
                "drop": nn.Dropout(config.embed_dropout),
                "h": nn.ModuleList(GPTNeoBlock(config, layer) for layer in range(config.num_layers)),
                "ln_f": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon),
            }
        )

    def forward(
        self,
        input_ids: Tensor,
        segments: Tensor | None = None,
        update_cache: CacheUpdate | None = None,
        positions: Tensor | None = None,
        masks: dict[str, Mask] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: (B, T) int64.
            segments: (B, T) int64. A token sees the tokens before it in segment 0 and in its own segment. Segment 0 is
                the text, or a prompt; 1, 2, ... are continuations of it that do not see each other; -1 is padding, on
                either side. A token's learned position is the number of tokens that it sees before it. None: every
                token is in segment 0 (correct with padding on the right too, which no real token can see).
            update_cache: is called with each layer's keys and values (B, H, T, K), to cache them; must return them.
            positions, masks: both in place of `segments`: the learned position of each token, (B, T) int64 below
                max_position_embeddings, and how layers attend, "global" and "local" -> Mask.

        Returns: (B, T, D) in the model's dtype; finite but meaningless at padding.
        Raises: ValueError if a row has more than max_position_embeddings tokens.
        """
        if positions is not None and masks is not None:
            return self._run_blocks(input_ids, positions, masks, update_cache)
        if segments is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            masks = {"global": None, "local": None}
        else:
            positions, masks = self._positions_and_masks(segments)
        limit = self.config.max_position_embeddings
        if input_ids.shape[1] > limit and int(positions.max()) >= limit:
            raise ValueError(f"{int(positions.max()) + 1} tokens in a row: max_position_embeddings is {limit}")
        return self._run_blocks(input_ids, positions, masks, update_cache)

    def decode(self, tokens: Tensor, positions: Tensor, masks: dict[str, Mask], update_cache: CacheUpdate) -> Tensor:
        """Hidden states of one new token per row; the keys and values of the tokens before it are cached.

        Args:
            tokens: (B,) int64.
            positions: (B,) int64, the learned position of each token, below max_position_embeddings.
            masks: "global" and "local" -> (B, 1, 1, S) bool, True where layers of this kind may attend; or a function.
            update_cache: takes a layer's keys and values of the new tokens, (B, H, 1, K), returns all, (B, H, S, K).

        Returns: (B, D) in the model's dtype.
        """
        return self._run_blocks(tokens[:, None], positions[:, None], masks, update_cache)[:, 0]

    def _run_blocks(
        self, input_ids: Tensor, positions: Tensor, masks: dict[str, Mask], update_cache: CacheUpdate | None
    ) -> Tensor:
        wte, wpe, drop, h, ln_f = self.transformer.values()
        x = drop(wte(input_ids) + wpe(positions))
        saving = self.checkpointing and torch.is_grad_enabled()
        for block in h:
            inputs = x, masks[block.kind], update_cache
            x = checkpoint(block, *inputs, use_reentrant=False) if saving else block(*inputs)
        return ln_f(x)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the weight of the language-model head, for a fused kernel. logits = hidden @ head_weight.T."""
        return self.transformer["wte"].weight

    @property
    def head_padding_rows(self) -> int:
        """How many rows of zeros follow head_weight in its storage, so that a fused kernel may multiply aligned shapes.

        from_pretrained creates them, up to a multiple of HEAD_MULTIPLE rows in total. 0 if head_weight is anything
        else than the first V rows of the tensor created there, as after a move, a cast, a copy or a swap of `.data`.
        """
        weight, padded = self.head_weight, self._padded_head
        if padded is None or weight.data_ptr() != padded.data_ptr():
            return 0
        # The model holds `padded`, so no other storage can have its address; a view of it may still differ in layout.
        original = padded[: self.config.vocab_size]
        layouts = ((t.shape, t.stride(), t.dtype, t.device) for t in (weight, original))
        return len(padded) - len(original) if len(set(layouts)) == 1 else 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GPTNeo":
        """nn.Module's hook behind .to() and casts: also frees the padded head if it is no longer in use."""
        super()._apply(fn, recurse)
        if not self.head_padding_rows:
            self._padded_head = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle of the model must not carry a second copy of the head."""
        return super().__getstate__() | {"_padded_head": None}

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), fp32 for a 16-bit model and under autocast: near logits would tie in 16 bits."""
        weight, kind = self.head_weight, hidden.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        if weight.dtype not in (torch.float16, torch.bfloat16):
            return F.linear(hidden, weight)
        with torch.autocast(kind, enabled=False):
            if hidden.is_cuda and not torch.is_grad_enabled():  # this product has no derivative in torch 2.13
                rows = hidden.reshape(-1, hidden.shape[-1])
                return torch.mm(rows, weight.t(), out_dtype=torch.float32).view(*hidden.shape[:-1], len(weight))
            return torch.cat([F.linear(hidden.float(), block.float()) for block in weight.split(HEAD_BLOCK)], -1)

    def _positions_and_masks(self, segments: Tensor) -> tuple[Tensor, dict[str, Mask]]:
        """Positions (B, T), and for each kind of layer a mask (B, 1, T, T), True where attention is allowed."""
        index = torch.arange(segments.shape[1], device=segments.device)
        own = segments[:, :, None]
        other = segments[:, None]
        seen = (index <= index[:, None]) & ((other == own) | (other == 0) & (own > 0))
        positions = seen.sum(2) - 1
        near = positions[:, :, None] - positions[:, None] < self.config.window_size
        # Padding sees padding. Its position is meaningless and may exceed the limit, so it is set to 0.
        return positions.masked_fill(segments < 0, 0), {"global": seen[:, None], "local": (seen & near)[:, None]}

    def init_weights(self, generator: torch.Generator | None = None) -> "GPTNeo":
        """Random weights for training from scratch: N(0, initializer_range), biases 0, norms 1. Returns the model."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        return self

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "GPTNeo":
        """Loads a model from a directory in the hub's layout, in evaluation mode.

        Reads config.json and the first of WEIGHT_FILES that exists. Each tensor is copied to `device` and `dtype` when
        it is read: there is never a second copy of the model, and later changes of a file do not reach the model.
        Pickles run no code (`weights_only=True`).

        Raises: FileNotFoundError if the config or the weights are missing; ValueError naming the file if the config is
        not supported, a file is damaged, or keys and shapes do not match the config; MemoryError or RuntimeError if
        the memory does not suffice.
        """
        path = Path(path)
        config = GPTNeoConfig.from_json(path / "config.json")
        check_weights(path, config)
        with torch.device("meta"):
            model = cls(config)
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        state: dict[str, Tensor] = {}
        for file in weight_files(path):
            for key, tensor in _read_tensors(file, device):
                if key in state:
                    raise ValueError(f"{file}: holds {key!r:.200}, and so does a file before it")
                if tensor.dtype not in WEIGHT_DTYPES:
                    raise ValueError(f"{file}: {key!r:.200} is {tensor.dtype}, expected one of {WEIGHT_DTYPES}")
                # A copy, since what was read is a view of the mapped file. One of a wrong shape may be huge: it is not
                # copied, and _check_fit names it below.
                state[key] = tensor.to(device, dtype, copy=True) if tensor.shape == shapes.get(key) else tensor
        _check_fit(path, {key: tensor.shape for key, tensor in state.items()}, model)
        if config.vocab_size % HEAD_MULTIPLE:
            model._padded_head = F.pad(state[HEAD], (0, 0, 0, -config.vocab_size % HEAD_MULTIPLE))
            state[HEAD] = model._padded_head[: config.vocab_size]
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval()

    @torch.no_grad()
    def load_weights(self, path: str | os.PathLike) -> None:
        """Overwrites the weights in place by those of a directory in the hub's layout, one tensor at a time.

        Raises: as from_pretrained. Some tensors may have been overwritten by then.
        """
        path = Path(path)
        own = {key: tensor.detach() for key, tensor in self.state_dict().items()}
        read = set()
        for file in weight_files(path):
            for key, tensor in _read_tensors(file, "cpu"):
                if key in own and own[key].shape == tensor.shape:
                    own[key].copy_(tensor)
                    read.add(key)
        if read != own.keys():
            raise ValueError(f"{path}: no tensor of the right shape for {sorted(own.keys() - read)[0]}")

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes config.json and model.safetensors. transformers loads them with no missing or unexpected key.

        Both are written into a new directory .tmp-* inside `path`, synced, and moved out of it one after the other.

        Raises: ValueError if the module has parameters that GPT-Neo does not have (merge and remove adapters first);
        OSError if a file cannot be written.
        """
        with torch.device("meta"):
            expected = GPTNeo(self.config)
        state = {key: tensor.detach().contiguous() for key, tensor in self.state_dict().items()}
        _check_fit(path, {key: tensor.shape for key, tensor in state.items()}, expected)
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
            # Only this process can write there: no link that somebody planted is followed.
            with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path, ignore_cleanup_errors=True) as folder:
                files = weights, config = Path(folder, "model.safetensors"), Path(folder, "config.json")
                config.write_text(self.config.to_json())
                save_file(state, weights, metadata={"format": "pt"})
                weights.chmod(config.stat().st_mode)  # safetensors ignores the umask and lets only the owner read
                for file in files:
                    with open(file, "rb") as stream:
                        os.fsync(stream.fileno())
                for file in files:
                    os.replace(file, Path(path, file.name))
        except (OSError, SafetensorError) as error:
            raise OSError(f"{path}: the model cannot be written ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises: FileNotFoundError; ValueError naming the file."""
    if not path.is_file():  # a pipe is not accepted: reading it might never end
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > JSON_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected at most {JSON_BYTES}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number or nesting beyond Python's limits
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    if _nested_deeper(value, JSON_DEPTH):  # saving it would exceed Python's limit
        raise ValueError(f"{path}: values are nested more than {JSON_DEPTH} deep")
    return value


def _nested_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (levels == 0 or any(_nested_deeper(item, levels - 1) for item in inner))


def weight_files(path: Path) -> list[Path]:
    """The weight files of the model in directory `path`: one file, or all shards that its index names.

    Raises: FileNotFoundError if a file is missing; ValueError naming the index if it is damaged.
    """
    found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path}: no weights, expected one of {', '.join(WEIGHT_FILES)}")
    if found.suffix != ".json":
        return [found]
    names = _read_json(found).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{found}: expected a 'weight_map' from tensor names to file names")
    shards = sorted(set(names.values()))
    for name in shards:
        if Path(name).name != name:  # an untrusted index must not read outside its directory
            raise ValueError(f"{found}: shard name {name!r:.200} is not a plain file name")
        if not os.path.isfile(path / name):  # Path.is_file would raise for a name that is too long
            raise FileNotFoundError(f"{found}: shard {name!r:.200} is missing")
    return [path / name for name in shards]


def check_weights(path: str | os.PathLike, config: GPTNeoConfig) -> None:
    """Compares the safetensors files of directory `path` with `config`, by the names and shapes in their headers.

    Takes milliseconds, however large the files are, since no weight is read. Files of other kinds are not opened.

    Raises: as GPTNeo.from_pretrained.
    """
    files = weight_files(Path(path))
    if any(file.suffix != ".safetensors" for file in files):
        return
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        # "np" because "pt" would reserve memory for the whole file.
        with _errors_naming(file), safe_open(file, framework="np") as reader:
            shapes |= {key: tuple(reader.get_slice(key).get_shape()) for key in reader.keys()}  # noqa: SIM118
    ignored = sum(math.prod(shapes.pop(key)) for key in list(shapes) if key.endswith(IGNORED_KEYS))
    with torch.device("meta"):
        _check_fit(path, shapes, GPTNeo(config))
    largest = max(config.vocab_size * config.hidden_size, config.max_position_embeddings**2)  # the tied head, or a mask
    if ignored > (config.num_layers + 1) * largest:
        raise ValueError(f"{path}: causal masks and a tied head of {ignored} numbers are too large for its config.json")


@contextlib.contextmanager
def _errors_naming(file: Path) -> Iterator[None]:
    """Turns errors in reading a weight file into a ValueError that names it, except those for lack of memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch.load raises UnpicklingError, EOFError, KeyError and others
        # torch has no class of its own for lack of memory on a CPU. A damaged pickle may ask Python for any amount, and
        # that MemoryError has no text.
        pickled = file.suffix != ".safetensors"
        if re.search("allocate memory|not enough memory", str(error)) or (type(error) is MemoryError and not pickled):
            raise
        if not isinstance(error, (SafetensorError, RuntimeError, ValueError, OSError)):
            problem = f"not a weight file that can be read safely ({type(error).__name__})"
        else:
            first_line = str(error).partition("\n")[0]
            problem = f"damaged or not a weight file ({first_line:.200})"
        raise ValueError(f"{file}: {problem}") from None


def _read_tensors(file: Path, device: str | torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yields the (name, tensor) pairs of one weight file, each read on demand. Raises: ValueError naming the file."""
    with _errors_naming(file):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt", device=str(device)) as reader:
                for key in reader.keys():  # noqa: SIM118 - a safetensors reader, not a dict
                    if not key.endswith(IGNORED_KEYS):
                        yield key, reader.get_tensor(key)
            return
        # mmap avoids a copy in memory; only the zip format (torch >= 1.6) can be mapped.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Silence warnings about files that are rejected below.
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        if not isinstance(state, dict) or not all(_is_stored_in_full(key, tensor) for key, tensor in state.items()):
            raise ValueError("no state dict of tensors")
        for key in [key for key in state if not key.endswith(IGNORED_KEYS)]:
            yield key, state.pop(key)  # the caller alone decides how long it lives


def _is_stored_in_full(key: Any, tensor: Any) -> bool:
    """Whether a pickled pair is a name and a tensor with every element in the file.

    Expanded, sparse and meta tensors are rejected because a small file may declare them with any size.
    """
    return (
        isinstance(key, str)
        and isinstance(tensor, Tensor)
        and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        and tensor.untyped_storage().nbytes() >= tensor.nbytes
    )


def _check_fit(path: str | os.PathLike, shapes: Mapping[str, Sequence[int]], model: nn.Module) -> None:
    """Raises ValueError naming the first three keys or shapes in which a file differs from `model`."""
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    problems = [f"missing {key}" for key in expected if key not in shapes]
    problems += [f"unexpected {key!r:.200}" for key in shapes if key not in expected]
    problems += [
        f"{key} has shape {tuple(shapes[key])!r:.200}, expected {shape}"
        for key, shape in expected.items()
        if key in shapes and tuple(shapes[key]) != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path}: tensors do not fit the GPT-Neo of its config.json: {'; '.join(problems[:3])}{more}")
