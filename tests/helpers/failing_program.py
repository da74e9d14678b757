"""Two ranks: one fails while the other waits for it in a collective."""

import contextlib
import time

import torch
import torch.distributed as dist

from unicl_fast.distributed.ranks import gather_integers
from unicl_fast.distributed.rendezvous import process_group
from unicl_fast.system.program import begin_program


def wait_for_the_others() -> None:
    """NCCL's way of parting, where a collective is under way."""
    time.sleep(600)


if __name__ == "__main__":
    begin_program()
    with process_group(torch.device("cpu"), timeout_seconds=600) as ranks:
        gather_integers(0, ranks)
        if ranks.rank == 1:
            dist.destroy_process_group = wait_for_the_others
            # which the other rank never joins: a thread of gloo's waits for it
            dist.all_reduce(torch.ones(1), group=ranks.host_group, async_op=True)
            raise RuntimeError("the fault of rank 1")
        with contextlib.suppress(RuntimeError):
            gather_integers(0, ranks)
