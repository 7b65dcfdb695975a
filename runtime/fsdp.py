"""FSDP2: weights, gradients and optimizer state are sharded across ranks while the model trains.

`fully_shard` keeps every parameter in fp32, sharded across ranks, and gathers one block at a time in the dtype of the
matrix products. Generating in that way would send all weights for every token. Therefore a whole copy is gathered once
per iteration, for generation, scoring and evaluation, and freed while the player trains.
"""

import copy
import warnings
from pathlib import Path

import torch
from torch import nn

from runtime import parallel


class Sharded:
    """The two forms of a model, which is given in fp32 on rank 0's CPU, and on the meta device on the other ranks.

    master: sharded across ranks, fp32, for training. The linear layers of a block are gathered in `dtype`, in which
        autocast would use them anyway; embeddings, head and norms stay fp32. Results are those of a run without FSDP.
    whole: a plain model with the values and dtypes that a forward pass of `master` computes with, so the first step of
        an iteration finds the log-probabilities that were scored. It has no weights during training.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        from torch.distributed.device_mesh import init_device_mesh  # Importing these takes seconds.
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        self.dtype = dtype
        outline = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters()}
        self.master = copy.deepcopy(model, outline)  # Its parameters have no storage yet.
        linear = {id(m) for block in model.blocks for m in block.modules() if isinstance(m, nn.Linear)}
        layers = {name for name, module in model.named_modules() if id(module) in linear}
        self.in_dtype = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in layers}
        # FSDP warns of in-place operations on the outputs of a layer. The model has none.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        mesh = init_device_mesh(device.type, (parallel.world_size(),))
        products = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in self.master.blocks:
            fully_shard([m for m in block.modules() if isinstance(m, nn.Linear)], mesh=mesh, mp_policy=products)
        fully_shard(self.master, mesh=mesh)
        for part in self.master.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)  # Training.step expects the sum over the ranks, not the mean.
                part.set_force_sum_reduction_for_comms(True)
        self.master.to_empty(device=device)
        parallel.overwrite(dict(self.master.named_parameters()), model.state_dict())
        self.whole = model.requires_grad_(False)
        self.gather()

    def load(self, folder: Path) -> None:
        """Sets both forms to the model in a folder on rank 0's disk."""
        weights = type(self.whole).from_pretrained(folder).state_dict() if parallel.is_writer() else None
        parallel.overwrite(dict(self.master.named_parameters()), weights)
        self.gather()

    @torch.no_grad()
    def gather(self) -> None:
        """Fills `whole` from `master`. Linear layers are sent in `dtype`."""
        weights = {}
        for name, own in self.master.named_parameters():
            weights[name] = parallel.whole(own.to(self.dtype) if name in self.in_dtype else own)
        self.whole.load_state_dict(weights, assign=True)

    def to_save(self) -> nn.Module | None:
        """The model in fp32 on rank 0's CPU, to be written as an iterate; None on the other ranks."""
        weights = parallel.collected(dict(self.master.named_parameters()))
        if not parallel.is_writer():
            return None
        with torch.device("meta"):
            model = type(self.whole)(self.whole.config)
        model.load_state_dict(weights, assign=True)
        return model
