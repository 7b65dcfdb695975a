"""GPT-Neo from scratch: the model and its weights on disk.

Needs torch and safetensors only (which wants numpy to save); copy this file alone into another code base.

What sets GPT-Neo apart from GPT-2, and is easily got wrong:
- attention scores are NOT divided by sqrt(head size);
- layers alternate between global attention and local attention, where a position sees the last
  `window_size` positions, itself included;
- q, k and v have no bias, the output projection has one;
- positions are learned, the activation is gelu_new (tanh), the head is tied to the token embedding.

Module attributes bear the names of the hub's state-dict keys and config fields those of config.json, so
loading is strict and there is no table of renames.

Shapes: B rows, T tokens, D hidden size, H heads, K head size, V vocabulary.
Source: github.com/EleutherAI/gpt-neo (Black et al., 2021); checked against transformers' GPTNeoForCausalLM.
"""

import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
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

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Keys of hub checkpoints that hold no parameter: causal-mask buffers, and the head when tied to `wte`.
HEAD = "transformer.wte.weight"  # tied: the token embedding is the language-model head
IGNORED_KEYS = ("attn.attention.bias", "attn.attention.masked_bias", "lm_head.weight")
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # 8 bits and integers would need scales


@dataclass(frozen=True)
class GPTNeoConfig:
    """The fields of config.json that decide what the model computes; defaults as in transformers."""

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
        sizes = ("vocab_size", "max_position_embeddings", "hidden_size", "num_layers", "num_heads", "window_size")
        for name in sizes:
            most = 1024 if name == "num_layers" else 2**24  # what no model has; more could not be laid out in no time
            if type(getattr(self, name)) is not int or not 1 <= getattr(self, name) <= most:
                raise ValueError(f"config field {name} = {getattr(self, name)!r}: expected an integer from 1 to {most}")
        for name in ("embed_dropout", "attention_dropout", "resid_dropout"):
            if type(getattr(self, name)) not in (int, float) or not 0 <= getattr(self, name) < 1:
                raise ValueError(f"config field {name} = {getattr(self, name)!r}: expected a number in [0, 1)")
        for name in ("layer_norm_epsilon", "initializer_range"):
            if type(getattr(self, name)) not in (int, float) or not 0 < getattr(self, name) < 1:
                raise ValueError(f"config field {name} = {getattr(self, name)!r}: expected a number in (0, 1)")
        for name, only in (("activation_function", "gelu_new"), ("tie_word_embeddings", True)):
            if getattr(self, name) != only:
                raise ValueError(f"config field {name} = {getattr(self, name)!r}: only {only!r} is supported")
        if self.intermediate_size is not None and (
            type(self.intermediate_size) is not int or not 1 <= self.intermediate_size < 2**31
        ):
            raise ValueError(f"config field intermediate_size = {self.intermediate_size!r}: expected null or >= 1")
        if self.eos_token_id is not None and (type(self.eos_token_id) is not int or not 0 <= self.eos_token_id < 2**31):
            raise ValueError(f"config field eos_token_id = {self.eos_token_id!r}: expected null or one token id")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"config field num_heads = {self.num_heads}: must divide hidden_size = {self.hidden_size}")
        kinds = self.attention_layers
        if len(kinds) != self.num_layers or not all(kind in ("global", "local") for kind in kinds):
            raise ValueError(
                f"config field attention_types = {self.attention_types!r}: expected [[kinds, repeats], ...] of "
                f"'global' and 'local' that name num_layers = {self.num_layers} layers"
            )

    @property
    def attention_layers(self) -> list[str]:
        """The kind of attention of each layer, `attention_types` written out (as far as one layer too many)."""
        try:
            rounds = ((kinds, range(repeats if len(kinds) else 0)) for kinds, repeats in self.attention_types)
            return list(islice((kind for kinds, times in rounds for _ in times for kind in kinds), self.num_layers + 1))
        except (TypeError, ValueError):
            return []

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> "GPTNeoConfig":
        """Reads config.json. Raises ValueError naming the file and the field that is not supported."""
        raw = _read_json(Path(path))
        if raw.get("model_type") != "gpt_neo":
            raise ValueError(f"{path}: model_type is {raw.get('model_type')!r}, expected 'gpt_neo'")
        known = {f.name for f in fields(cls)}
        try:
            return cls(**{name: value for name, value in raw.items() if name in known})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_json(self) -> str:
        """The text of a config.json that transformers reads too."""
        head = {"architectures": ["GPTNeoForCausalLM"], "model_type": "gpt_neo"}
        return json.dumps(head | asdict(self) | {"attention_layers": self.attention_layers}, indent=2) + "\n"


# Given a layer's number and its new keys and values (B, H, T, K), returns all that the new tokens may attend to.
Remember = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def local_attention(q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float = 0.0) -> Tensor:
    """Causal attention to the last `window` positions, itself included: (B, H, T, K) -> (B, H, T, K), scores unscaled.

    In blocks of `window` queries, each against its own block of keys and the one before: time and memory grow with T
    times window, and the only mask is (window, 2 window).
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
        self.layer, self.num_heads, self.dropout = layer, config.num_heads, config.attention_dropout
        local = config.attention_layers[layer] == "local"
        self.window = config.window_size if local else config.max_position_embeddings
        self.k_proj = nn.Linear(D, D, bias=False)
        self.v_proj = nn.Linear(D, D, bias=False)
        self.q_proj = nn.Linear(D, D, bias=False)
        self.out_proj = nn.Linear(D, D)
        self.resid_dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x: Tensor, mask: Tensor | None, remember: Remember | None) -> Tensor:
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, H, T, K)
        if remember is not None:
            k, v = remember(self.layer, k, v)
        dropout = self.dropout * self.training
        if mask is None and self.window < x.shape[1]:
            y = local_attention(q, k, v, self.window, dropout)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=1.0
            )
        return self.resid_dropout(self.out_proj(y.transpose(1, 2).flatten(2)))  # (B, T, D)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class GPTNeoAttention(nn.Module):
    """Exists for the hub's key `attn.attention.*` alone."""

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

    def forward(self, x: Tensor, mask: Tensor | None, remember: Remember | None) -> Tensor:
        x = x + self.attn.attention(self.ln_1(x), mask, remember)
        return x + self.mlp(self.ln_2(x))


class GPTNeo(nn.Module):
    """GPT-Neo with a language-model head tied to the token embedding."""

    def __init__(self, config: GPTNeoConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: keep each block's input only for the backward pass, and run it once more
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.hidden_size),
                "wpe": nn.Embedding(config.max_position_embeddings, config.hidden_size),
                "drop": nn.Dropout(config.embed_dropout),
                "h": nn.ModuleList(GPTNeoBlock(config, layer) for layer in range(config.num_layers)),
                "ln_f": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon),
            }
        )

    def forward(self, input_ids: Tensor, segments: Tensor | None = None, remember: Remember | None = None) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: (B, T) int64.
            segments: (B, T) int64. Tokens see what is before them in segment 0 and in their own segment: 0 is the text
                itself, or a prompt; 1, 2, ... are continuations of it that do not see each other; -1 is padding, on
                any side. A token's learned position is the number of tokens that it sees before it. None: all is
                segment 0 (padding on the right needs no mention, since no real token can see it).
            remember: is shown every layer's keys and values (B, H, T, K), for a cache, and must return them.

        Returns: (B, T, D) in the model's dtype; rows at padding are finite and meaningless.
        Raises: ValueError where a row is longer than max_position_embeddings.
        """
        if segments is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            masks: dict[str, Tensor | None] = {"global": None, "local": None}
        else:
            positions, masks = self._tree(segments)
        limit = self.config.max_position_embeddings
        if input_ids.shape[1] > limit and int(positions.max()) >= limit:
            raise ValueError(f"{int(positions.max()) + 1} tokens in a row: max_position_embeddings is {limit}")
        return self._blocks(input_ids, positions, masks, remember)

    def decode(self, tokens: Tensor, positions: Tensor, masks: dict[str, Tensor], remember: Remember) -> Tensor:
        """Hidden states (B, D) of one more token a row, after tokens whose keys and values are known.

        Args:
            tokens: (B,) int64.
            positions: (B,), the learned position of each, below max_position_embeddings.
            masks: for each kind of layer, "global" and "local", (B, 1, 1, S), True where attention is allowed.
            remember: takes a layer's keys and values of the new tokens (B, H, 1, K), returns all S of them.
        """
        return self._blocks(tokens[:, None], positions[:, None], masks, remember)[:, 0]

    def _blocks(
        self, input_ids: Tensor, positions: Tensor, masks: dict[str, Tensor | None], remember: Remember | None
    ) -> Tensor:
        wte, wpe, drop, h, ln_f = self.transformer.values()
        x = drop(wte(input_ids) + wpe(positions))
        for block in h:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, masks[block.kind], remember, use_reentrant=False)
            else:
                x = block(x, masks[block.kind], remember)
        return ln_f(x)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the weight whose product with `hidden` gives logits, for a fused kernel."""
        return self.transformer["wte"].weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return F.linear(hidden, self.head_weight)

    def _tree(self, segments: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Positions (B, T), and for each kind of layer a mask (B, 1, T, T), True where attention is allowed."""
        slot = torch.arange(segments.shape[1], device=segments.device)
        mine, other = segments[:, :, None], segments[:, None]
        seen = (slot <= slot[:, None]) & ((other == mine) | (other == 0) & (mine > 0))
        positions = seen.sum(2) - 1
        near = positions[:, :, None] - positions[:, None] < self.config.window_size
        # padding sees padding; its position must not count, and may lie beyond the last
        return positions.masked_fill(segments < 0, 0), {"global": seen[:, None], "local": (seen & near)[:, None]}

    def init_weights(self, generator: torch.Generator | None = None) -> "GPTNeo":
        """Random weights for training from scratch: N(0, initializer_range), biases 0, norms 1."""
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
        """Loads a directory of hub layout, in evaluation mode.

        Reads config.json and the first of WEIGHT_FILES that is there. Each tensor goes to `device` and `dtype` as
        it is read, so no second copy of the model exists. No pickle is executed (`weights_only=True`).

        Raises: FileNotFoundError without a config or weights; ValueError naming the file for a config that is not
        supported, a damaged file, or keys and shapes that do not fit.
        """
        path = Path(path)
        config = GPTNeoConfig.from_json(path / "config.json")
        with torch.device("meta"):
            model = cls(config)
        state, shapes = {}, {key: tensor.shape for key, tensor in model.state_dict().items()}
        for file in weight_files(path):
            for key, tensor in _tensors(file, device):
                if key.endswith(IGNORED_KEYS):
                    continue
                if key in state:
                    raise ValueError(f"{file}: holds {key}, and so does a file before it")
                if tensor.dtype not in WEIGHT_DTYPES:
                    raise ValueError(f"{file}: {key} is {tensor.dtype}, expected one of {WEIGHT_DTYPES}")
                # what does not fit may be of any size: it is left as it lies in the file, and named below
                state[key] = tensor.to(device, dtype) if tensor.shape == shapes.get(key) else tensor
        _check_fit(path, state, model)
        state[HEAD] = _with_padding(state[HEAD])
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval()

    @torch.no_grad()
    def load_weights(self, path: str | os.PathLike) -> None:
        """Overwrites the weights by those of a directory of hub layout, one tensor at a time: no second model exists.

        Raises as from_pretrained; where it does, some tensors may be overwritten already.
        """
        path, own = Path(path), {key: tensor.detach() for key, tensor in self.state_dict().items()}
        read = set()
        for file in weight_files(path):
            for key, tensor in _tensors(file, "cpu"):
                if key in own and own[key].shape == tensor.shape:
                    own[key].copy_(tensor)
                    read.add(key)
        if read != own.keys():
            raise ValueError(f"{path}: no tensor of the right shape for {sorted(own.keys() - read)[0]}")

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes config.json and model.safetensors; transformers loads them with no key missing or unexpected.

        Each file is written under a temporary name, synced and renamed. Raises ValueError where the module holds
        other parameters than GPT-Neo's (adapters: merge and remove them first), OSError where they cannot be written.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        with torch.device("meta"):
            expected = GPTNeo(self.config)
        state = {key: tensor.detach().contiguous() for key, tensor in self.state_dict().items()}
        _check_fit(path, state, expected)
        config, weights = path / "config.json.tmp", path / "model.safetensors.tmp"
        try:
            config.write_text(self.config.to_json())
            save_file(state, weights, metadata={"format": "pt"})
            weights.chmod(config.stat().st_mode)  # safetensors lets the owner alone read it, whatever the umask
            for temporary in (weights, config):
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, temporary.with_suffix(""))
        except (OSError, SafetensorError) as error:
            for temporary in (weights, config):  # a full disk should not stay so
                temporary.unlink(missing_ok=True)
            raise OSError(f"{path}: the model cannot be written ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():  # nor a pipe, which might never end
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not text, not JSON, a number or a nesting too long to read
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of the model in directory `path`."""
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
        if Path(name).name != name:  # an index from a stranger must not read outside its own directory
            raise ValueError(f"{found}: shard name {name!r} is not a plain file name")
        if not (path / name).is_file():
            raise FileNotFoundError(f"{found}: shard {name!r} is missing")
    return [path / name for name in shards]


def _tensors(file: Path, device: str | torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yields the (name, tensor) pairs of one weight file, each read when asked for."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt", device=str(device)) as reader:
                for key in reader.keys():  # noqa: SIM118 - a safetensors reader, not a dict
                    yield key, reader.get_tensor(key)
        else:
            # mmap keeps the file out of memory; only the zip format (torch >= 1.6) can be mapped
            with warnings.catch_warnings():  # of what is refused in the same breath
                warnings.simplefilter("ignore")
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            if not isinstance(state, dict) or not all(_is_stored(key, tensor) for key, tensor in state.items()):
                raise ValueError("no state dict of tensors")
            yield from state.items()
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"{file}: damaged or not a weight file ({first_line})") from None
    except Exception as error:  # torch.load refuses with pickle.UnpicklingError, EOFError, KeyError and others
        raise ValueError(f"{file}: not a weight file that can be read safely ({type(error).__name__})") from None


def _is_stored(key: Any, tensor: Any) -> bool:
    """Whether a pickled pair is a name and a tensor whose every element is in the file: expanded, sparse and meta
    tensors may claim any size."""
    return (
        isinstance(key, str)
        and isinstance(tensor, Tensor)
        and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        and tensor.untyped_storage().nbytes() >= tensor.nbytes
    )


def _with_padding(weight: Tensor) -> Tensor:
    """The same (V, D), but followed in memory by rows of zeros up to a multiple of 64.

    Matrix products with V = 50257 rows may be slow on a GPU; a kernel that looks for the padding can take all 50304.
    State dicts and files do not see it; moving or casting the module drops it.
    """
    V, D = weight.shape
    if V % 64 == 0:
        return weight
    storage = weight.new_zeros((V + 63) // 64 * 64, D)
    storage[:V] = weight
    return storage[:V]


def _check_fit(path: Path, state: dict[str, Tensor], model: nn.Module) -> None:
    """Raises ValueError naming the first keys or shapes in which `state` differs from `model`."""
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, expected {shape}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path}: tensors do not fit the GPT-Neo of its config.json: {'; '.join(problems[:3])}{more}")
