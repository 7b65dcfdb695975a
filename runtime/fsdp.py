"""A model whose weights, gradients and optimizer state are cut over the ranks while it trains: FSDP2.

`fully_shard` keeps every parameter in fp32, cut over the ranks, and makes one block at a time whole in the dtype of
products. Generating that way would send all weights for every token. So a whole copy is gathered once an iteration, for
generation, scoring and evaluation; its storage is freed while the player trains.
"""

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import GPTNeo
from runtime import parallel, storage

CHECKPOINT = "train.json"  # names the folder with the state of training, written by torch.distributed.checkpoint


class Sharded:
    """The two forms of a model.

    master: cut over the ranks, fp32, to train. The linear layers of a block travel in `dtype`, in which autocast would
        use them anyway; embeddings, head and norms stay fp32. So results are those of a run without FSDP.
    whole: a plain model with the values and dtypes that a forward pass of `master` computes with: the first step of an
        iteration finds the very log-probabilities that were scored. It has no weights during training.

    Args:
        model: in fp32 on rank 0's CPU, without storage (on the meta device) on the others. It becomes `whole`.
    """

    def __init__(self, model: GPTNeo, device: torch.device, dtype: torch.dtype) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        self.device, self.dtype = device, dtype
        outline = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters()}
        self.master = copy.deepcopy(model, outline)  # without storage
        # FSDP warns of operations in place on what a layer returns. The model has none.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        mesh = init_device_mesh(device.type, (parallel.world_size(),))
        products = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in self.master.transformer["h"]:
            fully_shard([m for m in block.modules() if isinstance(m, nn.Linear)], mesh=mesh, mp_policy=products)
        linear = {name for name, m in self.master.named_modules() if isinstance(m, nn.Linear)}
        self.in_dtype = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in linear}
        fully_shard(self.master, mesh=mesh)
        for part in self.master.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)  # take_step wants the sum over the ranks, not the mean
                part.set_force_sum_reduction_for_comms(True)
        self.master.to_empty(device=device)
        self.overwrite(model)
        self.whole = model.requires_grad_(False)
        self.release()
        self.gather()

    @torch.no_grad()
    def overwrite(self, model: GPTNeo | None) -> None:
        """Sets the weights of `master` to those of rank 0's model, sent a tensor at a time."""
        from torch.distributed.tensor import distribute_tensor

        own = dict(self.master.named_parameters())
        tensors = {name: p.detach() for name, p in model.named_parameters()} if parallel.is_writer() else None
        for name, full in parallel.sent(tensors):
            full = full.to(self.device, torch.float32)
            part = distribute_tensor(full, own[name].device_mesh, own[name].placements, src_data_rank=None)
            own[name].copy_(part)

    def load(self, folder: Path) -> None:
        """Sets both forms to the model in a folder on rank 0's disk."""
        self.overwrite(GPTNeo.from_pretrained(folder) if parallel.is_writer() else None)
        self.gather()

    @torch.no_grad()
    def gather(self) -> None:
        """Fills `whole` from `master`. Only what the products need travels."""
        weights = {}
        for name, own in self.master.named_parameters():
            weights[name] = (own.to(self.dtype) if name in self.in_dtype else own).full_tensor()
        self.whole.load_state_dict(weights, assign=True)

    def release(self) -> None:
        """Frees the storage of `whole`."""
        self.whole.to("meta")

    @torch.no_grad()
    def to_save(self) -> GPTNeo | None:
        """The model in fp32 on rank 0's CPU, None on the others: what an iterate's file holds."""
        tensors: dict[str, Tensor] = {}
        for name, own in self.master.named_parameters():
            full = own.full_tensor()
            if parallel.is_writer():
                tensors[name] = full.cpu()
        if not parallel.is_writer():
            return None
        return copy.deepcopy(self.whole, {id(p): nn.Parameter(tensors[n]) for n, p in self.whole.named_parameters()})


# ---------------------------------------------------------------- the state of training


def save_training(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, str]) -> None:
    """Each rank writes its part of weights and optimizer state; a run with another number of ranks can read them.

    The parts lie in a folder of their own; `path`, written last, names it and holds `progress` and the parts' sha256.
    All ranks must see the same file system, which the other files of a run do not need.
    """
    import torch.distributed.checkpoint as dcp

    folder = path.parent / f"train-{progress['steps']}"
    parallel.on_writer(lambda: shutil.rmtree(folder, ignore_errors=True))  # of a process that died while writing it
    dcp.save(_state(model, optimizer), checkpoint_id=folder)

    def commit() -> None:
        digests = {file.name: storage.digest_of_file(file) for file in sorted(folder.iterdir())}
        storage.write_signed(path, progress | {"folder": folder.name, "files": digests})
        for other in path.parent.glob("train-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    parallel.on_writer(commit)


def read_training(path: Path) -> tuple[dict[str, str], Path] | None:
    """(progress, folder) of a checkpoint; None where it is damaged. Called on rank 0."""
    found = storage.read_signed(path)
    if found is None:
        return None
    folder = path.parent / found.pop("folder")
    for name, digest in found.pop("files").items():
        if not (folder / name).is_file() or storage.digest_of_file(folder / name) != digest:
            return None
    return found, folder


def restore_training(folder: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Sets the parts of model and optimizer on all ranks to those of a checkpoint, whose folder rank 0 knows."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    folder = parallel.on_writer(lambda: folder)
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": states}
