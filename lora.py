"""LoRA: trainable low-rank updates of frozen linear layers (Hu et al. 2021, arXiv 2106.09685), in PEFT's file format.

    add_lora(model, rank=8, alpha=16)        # freezes the model; only lora_A and lora_B are trained
    with lora_disabled(model): ...           # inside, the model is exactly its base model
    with factors_ready(model, dtype): ...    # inside, products are faster: see there
    save_adapter(model, "adapter")           # PeftModel.from_pretrained(base_model, "adapter") can load it
    merge(model); remove_lora(model)         # a plain model again, with the update in its weights

This file needs only torch and safetensors; it can be copied alone into another code base.

Shapes: in and out are the features of the linear layer, r is the rank, ... stands for any leading dimensions.
"""

import json
import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj")  # all linear layers of a GPT-Neo block

# These three tables list the known fields of adapter_config.json. Any other field must be null, false, {} or []:
# load_adapter rejects an option that is not implemented here and never ignores one.
IMPLEMENTED_FIELDS = {  # field: whether a value is valid
    "r": lambda r: type(r) is int and r >= 1,
    "lora_alpha": lambda alpha: type(alpha) in (int, float),
    "lora_dropout": lambda dropout: type(dropout) in (int, float) and 0 <= dropout < 1,
    "target_modules": lambda names: isinstance(names, list),
}
RESTRICTED_FIELDS = {  # field: the values that need no implementation
    "peft_type": ["LORA"],
    "bias": ["none"],
    "layers_to_transform": [None, []],
    "init_lora_weights": [True, False, "gaussian", "orthogonal"],  # "pissa" and others change the base weights
}
IRRELEVANT_FIELDS = {
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode", "peft_version",
    "megatron_config", "megatron_core",
    "qalora_group_size",  # has no effect unless another field is set
    "fan_in_fan_out",  # describes how a layer stores its weight, which does not change A and B
}  # fmt: skip


class LoRALinear(nn.Module):
    """Linear layer with a low-rank update: y = x W^T + b + (alpha / r) * drop(x) A^T B^T.

    The layer takes over the Parameters weight (out, in) and bias (out) of `linear` under the same names. lora_A (r, in)
    and lora_B (out, r) are fp32 for every base dtype, on the weight's device; casting the model later casts them too.

    Args:
        linear: the base layer, of any float dtype.
        rank, alpha: r and alpha of the formula.
        dropout: the probability of dropping an input of the update, in training mode only.
        generator: draws A; None means torch's global generator.

    Raises: ValueError if rank < 1 or dropout is outside [0, 1).
    Source: arXiv 2106.09685, section 4.1. A is initialised as in loralib and PEFT. B is 0, so that the layer initially
    computes the same as its base layer.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0,
                 generator: torch.Generator | None = None) -> None:  # fmt: skip
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank = {rank}: must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout = {dropout}: must be in [0, 1)")
        self.out_features, self.in_features = linear.weight.shape
        self.rank = rank
        self.alpha = alpha
        self.scaling = alpha / rank
        self.dropout = dropout
        self.enabled = True
        self.training = linear.training
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.register_parameter("base_weight", None)  # while merged, this is the unmerged weight
        self.ready: tuple[Tensor, Tensor] | None = None  # A, scaled, and B as products take them: see factors_ready
        device = linear.weight.device
        A = torch.empty(rank, self.in_features, dtype=torch.float32, device=generator.device if generator else device)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)  # uniform in +-1 / sqrt(in)
        self.lora_A = nn.Parameter(A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device=device))

    @property
    def merged(self) -> bool:
        """Whether `weight` contains the update."""
        return self.base_weight is not None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the base layer's output dtype. Raises: RuntimeError if merged and disabled."""
        if self.merged and not self.enabled:
            raise RuntimeError("LoRA is disabled but merged into the weights: call unmerge(model) first")
        shape = (*x.shape[:-1], self.out_features)
        base = F.linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        if self.merged or not self.enabled:
            return base.view(shape)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        # For speed, cast the small factors and not x, and scale A and not a product. onednn.py makes only F.linear
        # faster; a 16-bit product is added to base before it is rounded.
        A, B = self.ready or (factor.to(base.dtype) for factor in (self.lora_A * self.scaling, self.lora_B))
        h = F.linear(x.reshape(-1, self.in_features), A)  # (N, r)
        added = base + F.linear(h, B) if base.dtype == torch.float32 else base.addmm_(h, B.t())
        return added.view(shape)


class _Ready(torch.autograd.Function):
    """Scales and casts many tensors by a few kernels: one each would cost more time to launch than to run."""

    @staticmethod
    def forward(ctx: Any, scales: list[float], dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.scales, ctx.dtype = scales, tensors[0].dtype
        return _cast(torch._foreach_mul(tensors, scales), dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wide = _cast(gradients, ctx.dtype)
        torch._foreach_mul_(wide, ctx.scales)
        return None, None, *wide


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    torch._foreach_copy_(copies, tensors)
    return copies


@contextmanager
def factors_ready(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside the `with` block all products use copies of A and B in `dtype`, made once: do not change the adapters."""
    layers = [layer for _, layer in lora_layers(model)]
    if layers:
        factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]
        scales = [scale for layer in layers for scale in (layer.scaling, 1.0)]
        copies = _Ready.apply(scales, dtype, *factors)
        for layer, ready in zip(layers, zip(copies[::2], copies[1::2], strict=True), strict=True):
            layer.ready = ready
    try:
        yield
    finally:
        for layer in layers:
            layer.ready = None


def linear_names(model: nn.Module) -> list[str]:
    """Last names of the linear layers in the model's repeated blocks: the usual targets, whatever its type.

    For Llama, Mistral and Qwen they are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj. The head is
    in no block, so it is not among them.
    """
    linear = (name.split(".") for name, module in model.named_modules() if type(module) in (nn.Linear, LoRALinear))
    return list(dict.fromkeys(parts[-1] for parts in linear if any(map(str.isdecimal, parts))))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Yields (dotted name, layer) of every LoRA layer, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float = 0.0,
             targets: Collection[str] = DEFAULT_TARGETS,
             generator: torch.Generator | None = None) -> list[str]:  # fmt: skip
    """Replaces the targeted nn.Linear layers with LoRALinear and freezes everything else.

    A parent module that reads `child.weight` instead of calling the child bypasses the adapter. Hooks on a replaced
    layer are lost.

    Args:
        rank, alpha, dropout: as in LoRALinear.
        targets: a module is targeted if its dotted name equals a target or ends in "." + target, as in PEFT.
        generator: draws every A on the generator's device, in the model's order. None means torch's global generator.

    Returns: the dotted names of the replaced layers, in the model's order.
    Raises: ValueError, with the model unchanged, if the model already has LoRA layers, if a target matches no module
    or one that is not a plain nn.Linear, or if rank or dropout is out of range.
    """
    for name, _ in lora_layers(model):
        raise ValueError(f"{name} has LoRA already: call remove_lora(model) first")
    linears = _find_targets(model, targets)
    replacements = {linear: LoRALinear(linear, rank, alpha, dropout, generator) for linear in linears.values()}
    model.requires_grad_(False)
    _replace_modules(model, replacements)
    return list(linears)


def remove_lora(model: nn.Module) -> None:
    """Replaces every LoRALinear with an nn.Linear that has its present weight: call merge first to keep the update.

    The weights stay frozen. Afterwards the model's own save function writes an ordinary checkpoint.
    """
    replacements = {}
    for _, layer in lora_layers(model):
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        replacements[layer] = linear.train(layer.training)
    _replace_modules(model, replacements)


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Makes the model exactly its base model inside a `with` block. Blocks may nest: each restores all flags."""
    previous = [(layer, layer.enabled) for _, layer in lora_layers(model)]
    try:
        for layer, _ in previous:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in previous:
            layer.enabled = enabled


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Sets every layer's weight to W + (alpha / r) * B A, for inference: A and B get no gradient while merged.

    The sum is computed in fp32 and rounded once to the weight's dtype: in bf16, an update below 1/512 of its weight is
    lost. Merging twice changes nothing, and train() and eval() never merge or unmerge. The state dict of a merged model
    holds the merged `weight`, lora_A, lora_B and `base_weight`, so that a strict load into a plain or unmerged model
    fails instead of applying the update twice. Call remove_lora too to get the state dict of a plain model.
    """
    for _, layer in lora_layers(model):
        if layer.merged:
            continue
        with torch.autocast(layer.weight.device.type, enabled=False):
            update = layer.scaling * (layer.lora_B.float() @ layer.lora_A.float())  # (out, in)
        layer.base_weight = layer.weight
        # A new Parameter, because the old one may be tied to another module, such as the token embedding.
        layer.weight = nn.Parameter((layer.weight + update).to(layer.weight.dtype), requires_grad=False)


def unmerge(model: nn.Module) -> None:
    """Restores the Parameters that merge replaced, bit by bit and with their ties to other modules."""
    for _, layer in lora_layers(model):
        if layer.merged:
            layer.weight = layer.base_weight
            layer.base_weight = None


def save_adapter(model: nn.Module, path: str | os.PathLike[str], base_model_name_or_path: str | None = None,
                 task_type: str | None = None) -> None:  # fmt: skip
    """Writes adapter_model.safetensors and adapter_config.json, in PEFT's format, into folder `path`.

    PEFT's Auto classes can load the folder if the base model's name and a task_type, such as "CAUSAL_LM", are given.

    Raises: ValueError if there are no LoRA layers or they differ in rank, alpha or dropout.
    """
    layers = dict(lora_layers(model))
    options = {(layer.rank, layer.alpha, layer.dropout) for layer in layers.values()}
    if len(options) != 1:
        raise ValueError(f"expected LoRA layers of one (rank, alpha, dropout), found {sorted(options)}")
    config = {"peft_type": "LORA", "base_model_name_or_path": base_model_name_or_path, "target_modules": list(layers)}
    config |= {"task_type": task_type} if task_type else {}
    config |= zip(("r", "lora_alpha", "lora_dropout"), options.pop(), strict=True)
    tensors = {key: factor.detach().cpu().contiguous() for key, factor in _factors(layers).items()}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads an adapter that save_adapter or PEFT wrote. Adds LoRA layers if the model has none.

    Existing LoRA layers must have the same rank, alpha and names; they keep their dropout.

    Raises, with the model unchanged: FileNotFoundError; RuntimeError if the model is merged; ValueError naming the
    file if it cannot be read, sets an option that is not implemented here, or does not match the model.
    """
    config = _read_config(Path(path, "adapter_config.json"))
    rank, alpha, dropout, targets = (config[field] for field in IMPLEMENTED_FIELDS)
    existing = dict(lora_layers(model))
    for name, layer in existing.items():
        if layer.merged:
            raise RuntimeError(f"cannot load an adapter while {name} is merged: call unmerge(model) first")
        if (layer.rank, layer.alpha) != (rank, alpha):
            raise ValueError(f"{path}: rank {rank}, alpha {alpha}; {name} has rank {layer.rank}, alpha {layer.alpha}")
    try:
        layers = existing or _find_targets(model, targets)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    shapes = {_key(name, "lora_A"): (rank, layer.in_features) for name, layer in layers.items()}
    shapes |= {_key(name, "lora_B"): (layer.out_features, rank) for name, layer in layers.items()}
    file = Path(path, "adapter_model.safetensors")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if found != shapes:  # a tensor of another shape is both missing and unexpected
        missing, unexpected = sorted(shapes.items() - found.items()), sorted(found.items() - shapes.items())
        raise ValueError(f"{file}: missing {missing[:3]}, unexpected {unexpected[:3]}")
    if not existing:
        add_lora(model, rank, alpha, dropout, targets)
    with torch.no_grad():
        for key, factor in _factors(dict(lora_layers(model))).items():
            factor.copy_(tensors[key])


def _find_targets(model: nn.Module, targets: Collection[str]) -> dict[str, nn.Module]:
    """The targeted layers by dotted name, in the model's order. Raises: ValueError as add_lora."""
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets = {targets!r}: must be a list of module names that is not empty")
    modules = dict(model.named_modules())
    found = set()
    for target in dict.fromkeys(targets):
        names = [name for name in modules if f".{name}".endswith(f".{target}")]
        if not names:
            usual = ", ".join(linear_names(model))
            hint = f"; the usual ones are {usual}" if usual else ""
            raise ValueError(f"target {target!r} matches no module of {type(model).__name__}{hint}")
        for name in names:
            # A subclass is rejected: nn.MultiheadAttention reads the weight of its out_proj without calling it.
            if type(modules[name]) not in (nn.Linear, LoRALinear):
                raise ValueError(f"target {name!r} is a {type(modules[name]).__name__}, not a plain nn.Linear")
        found.update(names)
    return {name: module for name, module in modules.items() if name in found}


def _replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Replaces each key with its value, under every name that it has in the model."""
    for name, module in list(model.named_modules(remove_duplicate=False)):  # a shared layer appears under each name
        if module in replacements:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, replacements[module])


def _key(name: str, part: str) -> str:
    """PEFT's key of `part`, lora_A or lora_B, of the layer with this dotted name."""
    return f"base_model.model.{name}.{part}.weight"


def _factors(layers: dict[str, LoRALinear]) -> dict[str, Tensor]:
    """The parameters that an adapter's file holds, by PEFT's keys."""
    return {_key(name, part): getattr(layer, part) for part in ("lora_A", "lora_B") for name, layer in layers.items()}


def _read_config(file: Path) -> dict[str, Any]:
    """Reads adapter_config.json. Raises: FileNotFoundError; ValueError naming the file and the unsupported field."""
    try:
        config = dict.fromkeys((*IMPLEMENTED_FIELDS, "peft_type")) | json.loads(file.read_bytes())
    except (ValueError, TypeError) as error:  # the file is not JSON, or not an object
        raise ValueError(f"{file}: not a JSON object ({error})") from None
    for field, value in config.items():
        if field in IMPLEMENTED_FIELDS:
            supported = IMPLEMENTED_FIELDS[field](value)
        else:
            supported = field in IRRELEVANT_FIELDS or value in RESTRICTED_FIELDS.get(field, [None, False, {}, []])
        if not supported:
            raise ValueError(f"{file}: {field!r} = {value!r} is not supported")
    return config
