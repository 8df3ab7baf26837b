"""Ranks on GPUs: two compute what one computes, and NCCL's exchanges are replayed by a CUDA graph."""

import multiprocessing
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")]
CASES = ("ranges", "warm-up", "embedding", "conditional", "buckets", "histogram", "block", "fine-tuning")
NEAR = 1e-4  # convolutions may sum in another order for half a batch


def run(function, count: int, *arguments) -> list[int]:
    """Exit codes of so many processes that run `function(rank, count, *arguments)`, whose networks are on a GPU."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=function, args=(rank, count, *arguments)) for rank in range(count)]
    there = {"GDFQ_RANK_CASES_ON": "cuda", "PYTHONPATH": os.pathsep.join(sys.path)}
    with mock.patch.dict(os.environ, there):
        for process in processes:
            process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def compute(rank: int, count: int, folder: Path) -> None:
    """Be a rank: by NCCL on a GPU of its own where there are enough, else by gloo on the only one."""
    has_own = torch.cuda.device_count() >= count
    torch.cuda.set_device(rank if has_own else 0)
    import rank_cases

    from gdfq import ranks

    if count > 1:
        rank_cases.join(rank, count, folder, backend=f"cpu:gloo,cuda:{'nccl' if has_own else 'gloo'}")
    with ranks.one_run():
        results = {(name, seed): rank_cases.CASES[name](seed) for name in CASES for seed in range(2)}
    torch.save(results, folder / f"{count}-{rank}.pt")


def test_one_iteration_is_that_of_one_rank(tmp_path):
    from rank_cases import difference  # here: what a rank imports, it computes with on its own GPU

    for count in (1, 2):
        assert run(compute, count, tmp_path) == [0] * count
    one, first, second = (torch.load(tmp_path / f"{name}.pt", map_location="cpu") for name in ("1-0", "2-0", "2-1"))
    for case in CASES:
        for seed in range(2):
            found = first[case, seed]
            assert all(torch.equal(value, second[case, seed][name]) for name, value in found.items()), case
        # With one of the seeds a value may come to lie across a rounding boundary.
        assert min(difference(first[case, seed], one[case, seed]) for seed in range(2)) < NEAR, case


def replay(rank: int, count: int, folder: Path) -> None:
    import rank_cases

    from gdfq import ranks

    rank_cases.join(rank, count, folder, backend="cpu:gloo,cuda:nccl")

    def exchange(moments: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        end = ranks._begin_to_add_up([gradient])
        total = ranks._Summed.apply(moments)
        end()
        return total + gradient

    moments, gradient = torch.arange(4.0, device="cuda"), torch.ones(4, device="cuda")
    for _ in range(3):
        exchange(moments, gradient)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = exchange(moments, gradient)
    moments.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert result.tolist() == [2, 3, 4, 5]
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_nccl_available(), reason="this PyTorch has no NCCL")
def test_a_graph_replays_exchanges_of_a_group_of_one(tmp_path):
    """What is to be seen before iterations of several ranks are captured, on a machine with a single GPU."""
    assert run(replay, 1, tmp_path) == [0]
