"""What a run needs to go on from a step: the same files for one process or many, sharded or not.

    model.safetensors        parameters (of an adapter: its factors)
    optimizer.safetensors    <parameter>|exp_avg, <parameter>|exp_avg_sq, <parameter>|step
    scheduler.json           where the learning rate stands
    rng_state*.pth           random state of each process, written by the Trainer
    trainer_state.json       step and losses; written last, so that what is cut short is told apart

Whole tensors by name, gathered from the processes that hold their parts, so that a run may go on
with another number of processes. Without pickle, but for the Trainer's random state, which is read
as plain tensors.
"""

import glob
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers.trainer_utils import get_last_checkpoint

from fedgraft.progress import is_first
from fedgraft.provenance import hash_json

if TYPE_CHECKING:
    from pydantic import BaseModel
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

OPTIMIZER, SCHEDULER, STATE = "optimizer.safetensors", "scheduler.json", "trainer_state.json"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
Tensors = dict[str, torch.Tensor]


def whole_tensors(model: torch.nn.Module) -> Tensors:
    """Return every parameter and buffer whole, on the CPU; empty in all but the first process.

    All processes must call it. Without sharding every process gets them.
    """
    return cast("Tensors", get_model_state_dict(model, options=WHOLE))


def load_tensors(model: torch.nn.Module, folder: Path) -> None:
    """Give a model that is sharded over processes the parameters of a checkpoint."""
    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    options = StateDictOptions(full_state_dict=True, strict=False)  # a tied copy is left out
    set_model_state_dict(model, tensors, options=options)


def save_optimizer(
    folder: Path, model: torch.nn.Module, optimizer: "Optimizer", scheduler: "LRScheduler"
) -> None:
    """Write the optimizer's state and the schedule's; all processes must call it."""
    whole: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    if not is_first():
        return
    tensors = {
        f"{parameter}|{kind}": torch.as_tensor(value).contiguous()
        for parameter, kinds in whole["state"].items()
        for kind, value in kinds.items()
    }
    save_file(tensors, folder / OPTIMIZER)
    (folder / SCHEDULER).write_text(json.dumps(scheduler.state_dict()), encoding="utf-8")


def load_optimizer(
    folder: Path, model: torch.nn.Module, optimizer: "Optimizer", scheduler: "LRScheduler"
) -> None:
    """Read what `save_optimizer` wrote."""
    state: dict[str, Tensors] = {}
    for name, tensor in load_file(folder / OPTIMIZER).items():
        parameter, _, kind = name.rpartition("|")
        state.setdefault(parameter, {})[kind] = tensor
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    content: dict[str, Any] = {"state": state, "param_groups": groups}
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, optim_state_dict=content, options=options)
    scheduler.load_state_dict(json.loads((folder / SCHEDULER).read_bytes()))
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def last_whole(workdir: Path) -> Path | None:
    """Return the newest state that a kill did not cut short; remove those that it did."""
    while workdir.is_dir() and (found := get_last_checkpoint(str(workdir))):
        try:
            json.loads((Path(found) / STATE).read_bytes())
        except (OSError, ValueError):
            shutil.rmtree(found)
        else:
            return Path(found)
    return None


def work_directory(out: Path, inputs: dict[str, str], settings: "BaseModel") -> Path:
    """Where a run keeps what it needs to go on; other inputs or settings, another directory."""
    key = hash_json([inputs, settings.model_dump()]).removeprefix("sha256:")[:12]
    return out.absolute().with_name(f".{out.name}.training-{key}")


def remove_work(out: Path) -> None:
    """Remove what runs kept beside `out` to go on from, those with other settings included."""
    for left in out.absolute().parent.glob(f".{glob.escape(out.name)}.training-*"):
        shutil.rmtree(left, ignore_errors=True)
