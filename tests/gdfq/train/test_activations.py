"""Activations come back as they were kept, from memory and from files."""

import gc

import pytest
import torch

from gdfq.train.activations import Store


@pytest.mark.parametrize("budget", [2**30, 1], ids=["memory", "file"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_they_come_back(tmp_path, budget, layout):
    x = torch.randn(10, 3, 4, 5).contiguous(memory_format=layout)
    with Store(budget, tmp_path) as store:
        kept = store.keep(10, iter(x.split(4)))
        assert len(kept) == 10
        chosen = kept.select(torch.tensor([7, 0, 7]))
        assert torch.equal(chosen, x[[7, 0, 7]])
        assert chosen.is_contiguous(memory_format=layout)
        assert torch.equal(torch.cat(list(kept.batches(3, x.device))), x)
        assert (kept.obstacle(torch.device("cpu")) is None) or budget == 1


def test_vectors_and_a_share_of_the_budget(tmp_path):
    x = torch.randn(6, 8)
    with Store(4 * x.numel() * 4, tmp_path) as store:
        assert torch.equal(store.keep(6, iter([x])).select(torch.arange(6)), x)
        assert store.files is None, "a quarter of the budget is enough for one of four"
    with Store(4 * x.numel() * 4 - 1, tmp_path) as store:
        store.keep(6, iter([x]))
        assert store.files is not None


def test_no_file_is_left(tmp_path):
    with Store(1, tmp_path) as store:
        kept = store.keep(4, iter([torch.randn(4, 2)]))
        del kept
        gc.collect()
    assert not list(tmp_path.iterdir())
