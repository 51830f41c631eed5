"""A model that is too large for one device: each process holds a part of every weight, of its gradient and of what the
optimizer keeps of it (Zhao et al. 2023, "FSDP"; here torch's fully_shard). train.py imports this for --parallel fsdp.

A block's weights are gathered when it is their turn, and dropped again. Checkpoints are those of one process: gathered
when they are saved, and cut when they are loaded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from support.kernels import updates_here
from support.machine import HostCopies
from support.processes import Processes, dealt


class Sharded(Processes):
    """One of several processes, each with a part of the model."""

    @property
    def parts(self) -> int:
        return self.world_size

    def wrap(self, model: nn.Module) -> nn.Module:
        """Block by block. What is left, the tables, which the head shares, and the last norm, goes together. Products
        stay autocast's business: a policy of fully_shard's would also round the residual stream."""
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for block in next(module for module in model.modules() if isinstance(module, nn.ModuleList)):
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def clip(self, parameters: Iterator[nn.Parameter], most: float) -> torch.Tensor:
        return super().clip(parameters, most).full_tensor()

    # ---- checkpoints ----

    def whole(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        """Whole tensors on the CPU, in the first process alone. All of them gather."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a proof the tables are still whole
        weights = {}
        gathered = {}
        for name, p in model.state_dict(keep_vars=True).items():
            if id(p) not in gathered:  # the head has the same as the token table
                gathered[id(p)] = self.gathered(p)
            weights[name] = gathered[id(p)]
        averages = optimizer.state_dict()
        states = {}
        for number, state in averages["state"].items():
            states[number] = {name: self.gathered(value) for name, value in state.items()}
        return {"model": weights, "optimizer": {**averages, "state": states}}

    def gathered(self, value):
        if not isinstance(value, DTensor):
            return value
        whole = value.detach().full_tensor()
        return whole.cpu() if self.rank == 0 else None

    def cut(self, state: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        """Each process has read all of it, so nothing travels."""
        shards = model.state_dict()
        weights = {name: cut_as(shards[name], value) for name, value in state["model"].items()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = {}
        for number, averages in state["optimizer"]["state"].items():
            states[number] = {name: cut_as(parameters[number], value) for name, value in averages.items()}
        return {**state, "model": weights, "optimizer": {**state["optimizer"], "state": states}}

    def host_copies(self) -> HostCopies:
        return GatheredCopies(self.device)

    # ---- Muon ----

    def muon_updates(self, directions: dict, shapes: dict, dtype: torch.dtype) -> Iterator[tuple]:
        """The parts of a direction travel to the process that orthogonalizes it, and the parts of the update back: two
        collectives, for any number of matrices."""
        shares = dealt(directions, self.world_size)
        mine = shares[self.rank]
        # what I have of each process's matrices, and how much each process has of mine
        parts = [[directions[p].to_local() for p in share] for share in shares]
        held = [[numbers(p, rank, self.world_size) for p in mine] for rank in range(self.world_size)]

        received = self.all_to_all(parts, held, torch.float32)
        whole = {}
        for i, p in enumerate(mine):
            whole[p] = torch.cat([of_one[i] for of_one in received]).view(p.shape)
        updates = dict(updates_here(whole, shapes, dtype))

        back = [[] for _ in shares]
        for i, p in enumerate(mine):
            pieces = updates[p].flatten().split([of_one[i] for of_one in held])
            for to_one, piece in zip(back, pieces, strict=True):
                to_one.append(piece)
        held_here = [[part.numel() for part in share] for share in parts]
        for share, pieces in zip(shares, self.all_to_all(back, held_here, dtype), strict=True):
            for p, piece in zip(share, pieces, strict=True):
                yield p, sharded_as(p, piece)

    def all_to_all(self, tensors: list[list], sizes: list[list], dtype: torch.dtype) -> list[list]:
        """Sends tensors[rank] to each rank. Returns what each rank sent here, flat tensors of sizes[rank] numbers."""
        flat = [tensor.flatten() for to_one in tensors for tensor in to_one]
        sent = torch.cat([torch.empty(0, dtype=dtype, device=self.device), *flat])
        lengths_sent = [sum(tensor.numel() for tensor in to_one) for to_one in tensors]
        lengths = [sum(of_one) for of_one in sizes]
        received = sent.new_empty(sum(lengths))
        dist.all_to_all_single(received, sent, lengths, lengths_sent)
        return [part.split(of_one) for part, of_one in zip(received.split(lengths), sizes, strict=True)]


def numbers(p: torch.Tensor, rank: int, world_size: int) -> int:
    """How many a rank holds: rows of a matrix, or matrices of a stack. The last ranks may have fewer, or none."""
    most = -(-p.size(0) // world_size)
    held = max(0, min(most, p.size(0) - rank * most))
    return held * p.shape[1:].numel()


def cut_as(like: torch.Tensor, whole):
    """A whole tensor as this process's part, if `like` is one of the same shape. Buffers aren't cut."""
    if not isinstance(like, DTensor) or not isinstance(whole, torch.Tensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def sharded_as(like: DTensor, part: torch.Tensor) -> DTensor:
    local = part.view(like.to_local().shape)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


class GatheredCopies(HostCopies):
    """Where large tensors were gathered for this save alone, they are copies already."""

    def copy_tensor(self, content: torch.Tensor) -> torch.Tensor:
        return content if self.is_large(content) else content.detach().cpu().clone()
