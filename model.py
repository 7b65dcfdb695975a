"""GPT-Neo from scratch, and what it shares with the Llama family of llama.py: masks, the head, weights on disk.

This file needs only torch and safetensors, plus numpy to save; it can be copied alone into another code base.

Mistakes are easy where GPT-Neo differs from GPT-2:
- attention scores are NOT divided by sqrt(head size);
- layers alternate between global attention and local attention, in which a position sees the last `window_size`
  positions, including itself;
- q, k and v have no bias, but the output projection has one.
As in GPT-2, positions are learned, the activation is gelu_new (tanh) and the head is tied to the token embedding.

Module attributes are named like the state-dict keys on the hub, and config fields like those of config.json. Loading
is therefore strict and needs no table of renames.

Shapes: B rows, T tokens, S cached tokens, D hidden size, H heads, G key/value heads, K head size, V vocabulary.
Source: github.com/EleutherAI/gpt-neo (Black et al., 2021); checked against transformers' GPTNeoForCausalLM.
"""

import json
import os
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WEIGHT_FILES = tuple(name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # 8-bit and integer weights need scales
# Hub checkpoints hold these keys too, although they are no parameters: causal masks and rotary frequencies.
IGNORED_KEYS = ("attn.attention.bias", "attn.attention.masked_bias", "rotary_emb.inv_freq")
HEAD = "lm_head.weight"  # A tied model has no such parameter; files may hold it as well as the embedding.
WRAPPERS = ("_orig_mod.", "module.")  # torch.compile and DistributedDataParallel put these in front of every key.
LFS = b"version https://git-lfs"  # A Git LFS pointer, which stands in place of a file, begins with this.
HEAD_BLOCK = 4096  # a CPU casts a 16-bit head to fp32 in blocks of this many rows; all at once is up to 5 times slower
COLUMN_MULTIPLE = 64  # on CUDA a product of 50257 columns takes 4 times as long as one of a multiple of this


def check_fields(config: Any, names: str, expected: str, is_valid: Callable[[Any], bool]) -> None:
    """Raises ValueError naming the first of these fields, separated by spaces, whose value is not valid."""
    for name in names.split():
        value = getattr(config, name)
        if not is_valid(value):
            raise ValueError(f"config field {name} = {value!r}: expected {expected}")


# For check_fields: what is expected, and whether a value is valid.
SIZE = "an integer of at least 1", lambda size: type(size) is int and size >= 1
SHARE = "a number in [0, 1)", lambda share: type(share) in (int, float) and 0 <= share < 1
END = (
    "null, a token id or a list of them",
    lambda ids: ids is None or all(type(token) is int for token in (ids if isinstance(ids, list) else [ids])),
)


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
    intermediate_size: int | None = None  # None means 4 * hidden_size
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
    eos_token_id: int | list[int] | None = 50256

    def __post_init__(self) -> None:
        check = partial(check_fields, self)
        check("vocab_size max_position_embeddings hidden_size num_layers num_heads window_size", *SIZE)
        check("embed_dropout attention_dropout resid_dropout", *SHARE)
        check("activation_function", "'gelu_new', the only supported one", lambda name: name == "gelu_new")
        check("tie_word_embeddings", "true, since only a tied head is supported", lambda tied: tied is True)
        check("eos_token_id", *END)
        check("num_heads", f"a divisor of hidden_size = {self.hidden_size}", lambda n: self.hidden_size % n == 0)
        expected = f"[[kinds, repeats], ...] that give {self.num_layers} layers, each 'global' or 'local'"
        check("attention_types", expected, lambda _: len(self.attention_layers) == self.num_layers)

    @property
    def attention_layers(self) -> list[str]:
        """The kind of attention of each layer, "global" or "local"; empty if attention_types is malformed."""
        try:
            kinds = [kind for kinds, repeats in self.attention_types for _ in range(repeats) for kind in kinds]
        except (TypeError, ValueError):
            return []
        return kinds if all(kind in ("global", "local") for kind in kinds) else []

    @property
    def num_key_value_heads(self) -> int:
        return self.num_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> "GPTNeoConfig":
        """Reads a config.json. Raises: FileNotFoundError; ValueError naming the file and the unsupported field."""
        return config_from(cls, Path(path), read_config(Path(path), ["gpt_neo"]))

    def to_json(self) -> str:
        """The text of a config.json, which transformers can read too."""
        head = {"architectures": ["GPTNeoForCausalLM"], "model_type": "gpt_neo"}
        return json.dumps(head | asdict(self) | {"attention_layers": self.attention_layers}, indent=2) + "\n"


def read_config(path: Path, model_types: Collection[str]) -> dict[str, Any]:
    """The fields of a config.json. Raises: FileNotFoundError; ValueError if its model is not one of `model_types`."""
    if not path.exists() and path.with_name("adapter_config.json").is_file():
        problem = "an adapter's directory; load the base model and put the adapter on top"
        raise FileNotFoundError(f"{path.parent}: {problem}")
    raw = _read_json(path)
    if raw.get("model_type") not in model_types:
        raise ValueError(f"{path}: model_type is {raw.get('model_type')!r}, expected {' or '.join(model_types)}")
    if raw.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config: expected weights of 16 or 32 bits, not quantized ones")
    generation = path.with_name("generation_config.json")
    if generation.is_file() and isinstance(ends := _read_json(generation).get("eos_token_id"), list):
        raw["eos_token_id"] = ends  # Chat models often list their end tokens in this file only.
    return raw


def config_from(config_class: type, path: Path, raw: dict[str, Any]) -> Any:
    """An instance of the dataclass from those fields that it has. Raises: ValueError naming the file and the field."""
    known = {field.name for field in fields(config_class)}
    try:
        return config_class(**{name: value for name, value in raw.items() if name in known})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# Takes a layer's index and its new keys and values (B, G, T, K); returns the keys and values to attend to.
CacheUpdate = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
# A mask is (B, 1, T, S) bool, True where attention is allowed. None means causal attention.
Mask = Tensor | None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int, scale: float, dropout: float = 0.0) -> Tensor:
    """Attention of each query to the keys that `mask` allows; without one, to the last `window`, its own included.

    Args:
        q: (B, H, T, K). k, v: (B, G, S, K); H / G consecutive heads of q share one of k and v.
        mask: (B, 1, T, S) bool, True where attention is allowed, or None, which requires S = T.
        scale: multiplies the scores. dropout: the probability of dropping an attention weight.

    Returns: (B, H, T, K).
    """
    facts = dict(dropout_p=dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if mask is None and window < q.shape[2]:
        return _local_attention(q, k, v, window, facts)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **facts)


def _local_attention(q: Tensor, k: Tensor, v: Tensor, window: int, facts: dict[str, Any]) -> Tensor:
    """Causal attention to the last `window` positions, including a query's own.

    The function works in blocks of `window` queries. Each block attends to its own block of keys and to the one before
    it, so time and memory grow with T * window, and the only mask has shape (window, 2 * window).
    """
    B, T = q.shape[0], q.shape[2]
    blocks = -(-T // window)
    q, k, v = (
        F.pad(x, (0, 0, 0, blocks * window - T)).unflatten(2, (blocks, window)).transpose(1, 2) for x in (q, k, v)
    )  # (B, blocks, heads, window, K)
    first = F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], is_causal=True, **facts)
    slot = torch.arange(2 * window, device=q.device)
    query = slot[window:, None]
    y = F.scaled_dot_product_attention(
        q[:, 1:].flatten(0, 1),  # (B (blocks - 1), H, window, K)
        *(torch.cat([x[:, :-1], x[:, 1:]], 3).flatten(0, 1) for x in (k, v)),  # (B (blocks - 1), G, 2 window, K)
        attn_mask=(slot <= query) & (query - slot < window),
        **facts,
    )
    y = torch.cat([first.unsqueeze(1), y.unflatten(0, (B, blocks - 1))], 1)
    return y.transpose(1, 2).flatten(2, 3)[:, :, :T]


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
        y = attention(q, k, v, mask, self.window, 1.0, self.dropout * self.training)
        return self.resid_dropout(self.out_proj(y.transpose(1, 2).flatten(2)))  # (B, T, D)


class GPTNeoMLP(nn.Module):
    def __init__(self, config: GPTNeoConfig) -> None:
        super().__init__()
        inner = config.intermediate_size or 4 * config.hidden_size
        self.c_fc = nn.Linear(config.hidden_size, inner)
        self.c_proj = nn.Linear(inner, config.hidden_size)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class LayerNorm(nn.LayerNorm):
    """A norm in the dtype of its input. Autocast would cast it and the weights to fp32, and every product cast back."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class GPTNeoBlock(nn.Module):
    def __init__(self, config: GPTNeoConfig, layer: int) -> None:
        super().__init__()
        self.kind = config.attention_layers[layer]
        self.ln_1 = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = nn.ModuleDict({"attention": GPTNeoSelfAttention(config, layer)})  # the hub's keys: attn.attention.*
        self.ln_2 = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = GPTNeoMLP(config)

    def forward(self, x: Tensor, mask: Mask, update_cache: CacheUpdate | None) -> Tensor:
        x = x + self.attn["attention"](self.ln_1(x), mask, update_cache)
        return x + self.mlp(self.ln_2(x))


class LanguageModel(nn.Module):
    """What GPTNeo and Llama share: segments, decoding with a cache, the head in fp32, weights on disk.

    A subclass has `config_class`, the properties `blocks` and `head_weight`, and `_run_blocks`, which returns hidden
    states (B, T, D) for token ids, positions, masks by kind of layer, and a function that updates a cache or None.
    """

    config_class: type
    blocks: nn.ModuleList
    head_weight: Tensor  # (V, D), for a fused kernel. logits = hidden @ head_weight.T.

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        # If checkpointing is True, each block saves only its input and runs again in the backward pass.
        self.checkpointing = False

    def forward(
        self, input_ids: Tensor, segments: Tensor | None = None, update_cache: CacheUpdate | None = None
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: (B, T) int64.
            segments: (B, T) int64. Segment 0 is the text, or a prompt; 1, 2, ... are continuations of the prompt, which
                do not see each other; -1 is padding, on either side. A token sees those tokens before it that are in
                segment 0 or in its own segment. Its position is the number of tokens that it sees before it.
                None puts every token in segment 0. This suits padding on the right too, since no real token can see it.
            update_cache: called with each layer's keys and values (B, G, T, K), to cache them; must return them.

        Returns: (B, T, D) in the model's dtype; finite but meaningless at padding.
        Raises: ValueError if a row has more than max_position_embeddings tokens.
        """
        if segments is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            masks: dict[str, Mask] = {"global": None, "local": None}
        else:
            positions, masks = self._positions_and_masks(segments)
        limit = self.config.max_position_embeddings
        if input_ids.shape[1] > limit and int(positions.max()) >= limit:
            raise ValueError(f"{int(positions.max()) + 1} tokens in a row: max_position_embeddings is {limit}")
        return self._run_blocks(input_ids, positions, masks, update_cache)

    def decode(self, tokens: Tensor, positions: Tensor, masks: dict[str, Mask], update_cache: CacheUpdate) -> Tensor:
        """Hidden states of one new token per row, given the cached keys and values of the tokens before it.

        Args:
            tokens: (B,) int64.
            positions: (B,) int64, the position of each token, below max_position_embeddings.
            masks: "global" and "local" -> (B, 1, 1, S) bool, True where layers of this kind may attend.
            update_cache: takes a layer's new keys and values, (B, G, 1, K), and returns all of them, (B, G, S, K).

        Returns: (B, D) in the model's dtype.
        """
        return self._run_blocks(tokens[:, None], positions[:, None], masks, update_cache)[:, 0]

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        saving = self.checkpointing and torch.is_grad_enabled()
        return checkpoint(block, *inputs, use_reentrant=False) if saving else block(*inputs)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), in fp32 for a 16-bit model and under autocast: close logits would tie in 16 bits."""
        weight, kind = self.head_weight, hidden.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        if weight.dtype not in (torch.float16, torch.bfloat16):
            return F.linear(hidden, weight)
        with torch.autocast(kind, enabled=False):
            if hidden.is_cuda and not torch.is_grad_enabled():  # torch.mm to fp32 has no derivative in torch 2.13
                rows = hidden.reshape(-1, hidden.shape[-1])
                return _aligned_product(rows, weight).view(*hidden.shape[:-1], len(weight))
            return torch.cat([F.linear(hidden.float(), block.float()) for block in weight.split(HEAD_BLOCK)], -1)

    def _positions_and_masks(self, segments: Tensor) -> tuple[Tensor, dict[str, Mask]]:
        """The positions (B, T), and a mask (B, 1, T, T) for each kind of layer, True where attention is allowed."""
        index = torch.arange(segments.shape[1], device=segments.device)
        own = segments[:, :, None]
        other = segments[:, None]
        seen = (index <= index[:, None]) & ((other == own) | (other == 0) & (own > 0))
        positions = seen.sum(2) - 1
        near = positions[:, :, None] - positions[:, None] < self.config.window_size
        # Padding sees padding. Its positions are meaningless and may exceed the limit, so they are set to 0.
        return positions.masked_fill(segments < 0, 0), {"global": seen[:, None], "local": (seen & near)[:, None]}

    def init_weights(self, generator: torch.Generator | None = None) -> "LanguageModel":
        """Draws weights from N(0, initializer_range), with biases 0 and norms 1, to train from scratch."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        return self

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "LanguageModel":
        """Loads a model from a directory in the hub's layout, in evaluation mode.

        The directory must hold config.json and one of WEIGHT_FILES, of which the first is read. Each tensor is copied
        when it is read, so memory never holds a second copy of the model, and the file may change later. Pickles run no
        code (`weights_only=True`).

        Raises: FileNotFoundError if the config or the weights are missing; ValueError naming the file if the config is
        not supported, if the file cannot be read, or if its tensors do not fit the config.
        """
        config = cls.config_class.from_json(Path(path, "config.json"))
        with torch.device("meta"):
            model = cls(config).to(dtype)
        model.to_empty(device=device).load_weights(path)
        return model.eval()

    @torch.no_grad()
    def load_weights(self, path: str | os.PathLike) -> None:
        """Overwrites the weights in place with those of a directory in the hub's layout, one tensor at a time.

        Raises: as from_pretrained. By then some tensors may have been overwritten.
        """
        own = self.state_dict()
        for key, tensor in _read_weights(Path(path), self):
            own[key].copy_(tensor)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes config.json and model.safetensors. transformers loads them with no missing or unexpected key.

        Raises: ValueError if the module has parameters that its class does not have, such as those of adapters.
        """
        state = {key: tensor.contiguous() for key, tensor in self.state_dict().items()}
        with torch.device("meta"):
            unknown = state.keys() - type(self)(self.config).state_dict().keys()
        if unknown:
            raise ValueError(f"{min(unknown)} is no parameter of {type(self).__name__}: merge and remove adapters")
        config, weights = Path(path, "config.json"), Path(path, "model.safetensors")
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(self.config.to_json())
        save_file(state, weights, metadata={"format": "pt"})
        weights.chmod(config.stat().st_mode)  # safetensors ignores the umask: only the owner could read the file


class GPTNeo(LanguageModel):
    """GPT-Neo with a language-model head tied to the token embedding."""

    config_class = GPTNeoConfig

    def __init__(self, config: GPTNeoConfig) -> None:
        super().__init__(config)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.hidden_size),
                "wpe": nn.Embedding(config.max_position_embeddings, config.hidden_size),
                "drop": nn.Dropout(config.embed_dropout),
                "h": nn.ModuleList(GPTNeoBlock(config, layer) for layer in range(config.num_layers)),
                "ln_f": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon),
            }
        )

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer["h"]

    @property
    def head_weight(self) -> Tensor:
        return self.transformer["wte"].weight

    def _run_blocks(
        self, input_ids: Tensor, positions: Tensor, masks: dict[str, Mask], update_cache: CacheUpdate | None
    ) -> Tensor:
        wte, wpe, drop, h, ln_f = self.transformer.values()
        x = drop(wte(input_ids) + wpe(positions))
        for block in h:
            x = self._run(block, x, masks[block.kind], update_cache)
        return ln_f(x)


def _aligned_product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight.T, (n, V) fp32, of 16-bit tensors (n, D) and (V, D) on CUDA.

    The columns behind the last multiple of 64, 17 of 50257, are a product of their own, since fast kernels require
    aligned rows.
    """
    blocks = weight.split(len(weight) // COLUMN_MULTIPLE * COLUMN_MULTIPLE or len(weight))
    return torch.cat([torch.mm(rows, block.t(), out_dtype=torch.float32) for block in blocks], 1)


# ---------------------------------------------------------------- files


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises: FileNotFoundError; ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # the text is not UTF-8 or not JSON
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def weight_files(path: Path) -> list[Path]:
    """The weight files of the model in directory `path`: one file, or all shards that its index names.

    Raises: FileNotFoundError if a file is missing; ValueError naming the index if it cannot be used.
    """
    found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path}: no weights, expected one of {', '.join(WEIGHT_FILES)}")
    if found.suffix != ".json":
        return [found]
    names = _read_json(found).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{found}: expected a 'weight_map' from tensor names to file names")
    shards = sorted(set(names.values()))
    for name in shards:
        if Path(name).name != name:  # an index from the internet must not read outside its directory
            raise ValueError(f"{found}: shard name {name!r} is not a plain file name")
        if not (path / name).is_file():
            raise FileNotFoundError(f"{found}: shard {name!r} is missing")
    return [path / name for name in shards]


def _read_weights(path: Path, model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights in directory `path` that fit `model`, each read on demand, as (name, tensor).

    Keys may have the prefixes of torch.compile and DistributedDataParallel, or lack that of the model without a head.

    Raises: ValueError, after all other tensors, if any is missing, superfluous, or of another shape or an unsupported
    dtype. The message names the file, or the directory of several files, and the first three such tensors.
    """
    missing = {key: tensor.shape for key, tensor in model.state_dict().items()}
    count, base = len(missing), next(iter(missing)).partition(".")[0]  # "transformer" or "model"
    tied_head = None
    problems = []
    files = weight_files(path)
    for file in files:
        for found, tensor in _read_file(file):
            key = found
            while key.startswith(WRAPPERS):
                key = key.partition(".")[2]
            key = f"{base}.{key}" if f"{base}.{key}" in missing else key
            if key != found and len(missing) == count:
                print(f"{file}: its tensor {found} is read as {key}, and others likewise", flush=True)
            if key == HEAD and HEAD not in missing:
                tied_head = tensor
                continue
            shape = missing.pop(key, None)  # a name that occurs twice is unexpected the second time
            if shape is None:
                problems.append(f"unexpected {key!r}")
            elif tensor.shape != shape:
                problems.append(f"{key} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
            elif tensor.dtype not in WEIGHT_DTYPES:
                problems.append(f"{key} is {tensor.dtype}, expected a floating-point type of 16 bits or more")
            else:
                yield key, tensor
    problems += [f"missing {key}" for key in missing]
    weight = model.head_weight
    if tied_head is not None and not problems and not torch.equal(tied_head.to(weight), weight):
        problems.append(f"{HEAD} differs from the embedding, but config.json ties them (tie_word_embeddings)")
    if problems:
        place = files[0] if len(files) == 1 else path
        name, first = type(model).__name__, "; ".join(problems[:3])
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{place}: tensors do not fit the {name} of config.json: {first}{more}")


def _read_file(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields the (name, tensor) pairs of one weight file. Raises: ValueError naming the file."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as reader:
                for key in reader.keys():  # noqa: SIM118 - the reader is not a dict
                    if not key.endswith(IGNORED_KEYS):
                        yield key, reader.get_tensor(key)
            return
        # Mapping the file avoids a copy in memory. It requires the zip format, which torch has written since 1.6.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch.load raises UnpicklingError, EOFError, KeyError and others
        reason = str(error).partition("\n")[0] or type(error).__name__
        with open(file, "rb") as start:
            if start.read(len(LFS)) == LFS:
                reason = "a Git LFS pointer: run git lfs pull"
        raise ValueError(f"{file}: cannot be read as weights ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{file}: expected a dict from names to tensors")
    for key in [key for key in state if not key.endswith(IGNORED_KEYS)]:
        yield key, state.pop(key)  # popping lets the caller free each tensor once it is copied
