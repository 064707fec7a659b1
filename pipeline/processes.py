"""The processes of a run: this one alone, or as many as `torchrun` has started, on one host or several."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(hours=6)
"""How long one waits for another: the first predicts and writes while the others have nothing to do."""


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls) -> Processes:
        """Meet the others, if `torchrun` started this process; tensors go by gloo from the CPU, and by NCCL between GPUs."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        if not dist.is_initialized():
            has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def leave(self) -> None:
        """Part from the others."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network with gradients averaged over the processes."""
        if self.count == 1:
            return network
        # Norms that count over the batch would be unsettled by it; ours has none, MONAI's have.
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network) if device.type == "cuda" else network
        # Buffers are averages of what each has seen; the first one's serve all.
        return DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def share_from_first(self, value: Any) -> Any:
        """What the first one holds: tensors, numbers, lists, dicts."""
        if self.count == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def gather(self, value: Any) -> list[Any]:
        """What each of them holds, by rank."""
        if self.count == 1:
            return [value]
        held: list[Any] = [None] * self.count
        dist.all_gather_object(held, value)
        return held

    def gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Rows of each process's tensor, one process after another, in the first; the others keep their own.

        Args:
            rows: [row, ...] on the CPU.
            counts: how many rows each has.
        """
        if self.count == 1:
            return rows
        if not self.is_first:
            dist.send(rows.contiguous(), dst=0)
            return rows
        whole = rows.new_empty((sum(counts), *rows.shape[1:]))
        parts = list(whole.split(counts))
        parts[0].copy_(rows)
        for rank, part in enumerate(parts[1:], start=1):
            dist.recv(part, src=rank)
        return whole

    def share_buffers(self, network: nn.Module) -> None:
        """The first one's buffers for all: where norms are not synchronised, each has counted its own slices."""
        if self.count > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)
