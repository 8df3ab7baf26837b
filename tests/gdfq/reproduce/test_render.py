"""Means, gaps and orderings by hand, and the table that people read."""

import pytest

from gdfq.reproduce import render
from gdfq.reproduce.tables import CIFAR10, CIFAR100, Cell, Published


def record(quantized, float_top1=94.0, choice=None, seconds=10.0):
    top1 = {"float": float_top1, "quantized": quantized}
    return {"top1": top1 | ({} if choice is None else {"choice": choice}), "seconds": seconds}


def entry(row, published, ours, network="a", bits=4):
    """A cell of `Grid.result` whose figures in the paper are `published`, by network, and ours `ours`, by seed."""
    return {
        "network": network, "bits": bits, "row": row,
        "published": [{"network": key, "top1": value} for key, value in published.items()],
        "results": [{"top1": {"quantized": value}} for value in ours],
    }  # fmt: skip


def test_summary():
    found = render.summary([record(90, seconds=10, choice=91), record(92, seconds=20, choice=90)])
    assert found == {
        "top1": 91, "spread": pytest.approx(2**0.5), "float": 94, "gap": 3, "choice": 90.5, "seconds": 15,
    }  # fmt: skip
    single = render.summary([record(90)])
    assert (single["spread"], single["choice"]) == (None, None)
    assert render.summary([]) is None


def test_published_gap():
    figure = Published(CIFAR10, 90.25, 0.3, 94.03)
    assert render.published(figure)["gap"] == 3.78


@pytest.mark.parametrize(
    ("ours", "theirs", "holds"),
    [([90], [80], True), ([80], [90], False), ([90, 91], [80, 89], True), ([90, 80], [85, 85], None), ([8], [8], None)],
)
def test_an_order_holds_when_all_seeds_say_so(ours, theirs, holds):
    (pair,) = render.orderings([entry("ZeroQ", {"x": 79}, theirs), entry("ours", {"x": 90}, ours)])
    means = [pytest.approx(sum(ours) / len(ours)), pytest.approx(sum(theirs) / len(theirs))]
    assert pair == {"network": "a", "bits": 4, "higher": "ours", "lower": "ZeroQ", "holds": holds, "ours": means}


def test_only_rows_of_one_network_and_width_with_results_are_compared():
    cells = [
        entry("ours", {"x": 90}, [90]),
        entry("ZeroQ", {"x": 79}, []),
        entry("ZeroQ", {"x": 79}, [79], bits=8),
        entry("ZeroQ", {"x": 79}, [79], network="b"),
        entry("equal", {"x": 90}, [79]),
    ]
    assert render.orderings(cells) == []


def test_pairs_of_which_the_paper_has_both_orders_are_left_out():
    cells = [entry("KL", {"x": 90, "y": 70}, [90]), entry("MSE", {"x": 91, "y": 60}, [80])]
    assert render.orderings(cells) == []
    cells[1]["published"][0]["top1"] = 80
    assert render.orderings(cells)[0]["higher"] == "KL"


def test_the_page_has_ours_beside_the_papers():
    provenance = {
        "machine": {"device": "cpu", "cpu": "a processor", "cores": 2}, "threads": 1, "torch": "2.x",
        "gdfq_commit": {"hash": "0123456789abcdef", "dirty": False},
    }  # fmt: skip
    cells = []
    for number, (row, top1, ours) in enumerate((("ours", 90.25, 91.5), ("ZeroQ", 79.3, None)), start=1):
        figure = Published(CIFAR10, top1, 0.3 if row == "ours" else None, 94.03)
        records = [] if ours is None else [record(ours, choice=91.25)]
        cell = Cell(CIFAR10, row, "gdfq", 4, published=(figure, Published(CIFAR100, 63.58, None, 70.33)))
        cells.append(
            {
                "number": number, **render.facts(cell),
                "published": [render.published(each) for each in cell.published],
                "results": [{"top1": {"quantized": ours}} for _ in records], "summary": render.summary(records),
            }
        )  # fmt: skip
    result = {
        "table": "table1", "title": "Comparisons", "offline": True, "seeds": [0], "scale": 0.5,
        "settings": {"schedule.iterations": 3}, "machines": [render.machine(provenance)], "cells": cells, "missing": [],
        "orderings": [
            {"network": "n", "bits": 4, "higher": "ours", "lower": "ZeroQ", "holds": holds, "ours": [90.0, 79.256]}
            for holds in (True, True, False, None)
        ],
    }  # fmt: skip
    page = render.markdown(result)
    assert page.startswith("# Table 1 of the paper: Comparisons\n\nOffline: ")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    cells = "ours | W4A4 | 94.00 | 91.50 | 90.25 ± 0.30; 63.58 | 2.50 | 3.78; 6.75 | 91.25 | 10 |"
    assert rows[2] == f"| 1 | cifar10 | ResNet-20 | {cells}"
    assert rows[3] == "| 2 | cifar10 | ResNet-20 | ZeroQ | W4A4 |  |  | 79.30; 63.58 |  | 14.73; 6.75 |  |  |"
    assert {line.count("|") for line in rows} == {13}
    assert "Scale 0.5, schedule.iterations = 3." in page
    assert "Measured on a processor, 2 cores, 1 threads, torch 2.x, gdfq 0123456789ab.\n" in page
    assert "Of 4 pairs" in page
    assert "2 in the paper's order, 1 in the opposite order, 1 undecided" in page
    assert "here in the opposite order, 90.00 and 79.26\n" in page
    assert page.count("- n, W4A4: ours above ZeroQ in the paper; here") == 2
    assert "Offline" not in render.markdown(result | {"offline": False})
    assert "No two rows to compare" in render.markdown(result | {"orderings": []})
