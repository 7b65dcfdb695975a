"""The weights of a run's iterates: in the player, sharded across ranks while it trains, and on disk."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

import lora
from runtime import parallel
from runtime.export import export
from runtime.folder import Folder
from runtime.fsdp import Sharded
from runtime.resume import digest_of_adapter, digest_of_model
from runtime.stopping import Stopped


@dataclass
class Weights:
    """How iterates are kept: as adapters in PEFT's layout, or as whole models if all parameters are trained."""

    args: Any
    model_class: Any  # makes and loads models
    config: Any  # the contents of the model's config.json; see setup.py
    start: Path  # directory of theta_0
    tokenizer: Tokenizer
    record: dict[str, Any]  # Its "digests" of inputs and the "template" of prompts are read.
    folder: Folder
    dtype: torch.dtype = torch.float32  # the dtype of matrix products
    sharded: Sharded | None = None  # the weights sharded across ranks, if --fsdp asks for it

    @contextlib.contextmanager
    def to_train(self, player: Any) -> Iterator[None]:
        """Shards the player's weights for a while if --fsdp asks for it."""
        if self.sharded is None:
            yield
            return
        player.model = self.sharded.master
        self.sharded.whole.to("meta")  # This frees its storage.
        yield
        player.model = self.sharded.whole
        self.sharded.gather()

    @contextlib.contextmanager
    def of_start(self, player: Any) -> Iterator[None]:
        """Makes the player theta_0 for a while: with its adapters off; or, if all parameters are trained or the run
        began with --adapter, from disk.

        The player's own weights wait on the CPU, which takes less memory than training does.
        """
        if self.args.rank and not self.args.adapter:
            with lora.lora_disabled(player.model):
                yield
            return
        self._check_start("adapter" if self.args.adapter else "model")
        trained = [p for p in player.model.parameters() if p.requires_grad or not self.args.rank]
        own = [p.detach().to("cpu", copy=True) for p in trained]
        self._read(player.model, Path(self.args.adapter or self.start))
        yield  # There is no `finally`: an error ends the run, and a resumed run reads its last iterate.
        for parameter, value in zip(trained, own):
            parameter.data.copy_(value)

    def save(self, model: nn.Module, path: Path) -> None:
        """Writes an iterate into a folder."""
        if self.args.rank:
            lora.save_adapter(model, path, self.args.model, task_type="CAUSAL_LM")
        else:
            export(model, self.config, path, self.start, self.tokenizer, self.record["template"])

    def load(self, player: Any, iterate: int) -> None:
        """Turns the player into an iterate that an earlier process finished, whose files have been checked."""
        path = self.folder.path / f"iterate-{iterate}"
        if iterate and self.sharded is not None:
            self.sharded.load(path)
        elif iterate:
            parallel.on_writer(lambda: self._read(player.model, path))
            trained = {name: p for name, p in player.model.named_parameters() if p.requires_grad}
            parallel.overwrite(trained, trained)

    def _read(self, model: nn.Module, path: Path) -> None:
        if self.args.rank:
            lora.load_adapter(model, path)
        else:
            model.load_weights(path)

    def export(self, iterate: int, path: Path) -> None:
        """Writes an iterate of this run into a folder as one plain model that transformers loads, too."""
        source = self.folder.path / f"iterate-{iterate}"
        if not self.args.rank:
            shutil.copytree(source, path, dirs_exist_ok=True)
            return
        # Merge in fp32, into the base as it is on disk: bf16 would round small updates away.
        self._check_start("model")
        model = self.model_class.from_pretrained(self.start)
        lora.load_adapter(model, source)
        lora.merge(model)
        lora.remove_lora(model)
        export(model, self.config, path, self.start, self.tokenizer, self.record["template"])

    def _check_start(self, name: str) -> None:
        """Compares the start's "model" or "adapter" with what it was when the run began. Raises: Stopped."""
        adapter = name == "adapter"
        path = Path(self.args.adapter) if adapter else self.start
        if (digest_of_adapter if adapter else digest_of_model)(path) != self.record["digests"][name]:
            raise Stopped(
                f"--{name} {path}: has changed since the run began; restore it, then the same command resumes"
            )
