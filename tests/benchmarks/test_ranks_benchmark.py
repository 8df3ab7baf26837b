"""The benchmark of several ranks says what it has measured, and refuses what it cannot measure."""

from collections import Counter

import pytest

from benchmarks import ranks


class Group:
    """In place of processes: so many ranks take 100 ms an iteration and exchange 3 KB; with more, twice as much."""

    def __init__(self, count: int, *_: object) -> None:
        self.count = count
        self.metrics = {"generator/bns": 1.0}

    def run(self, repeat: int) -> list:
        bytes_handed_over = Counter({"sums": 3000 * repeat} if self.count > 1 else {})
        exchanges = Counter({"sums": 2 * repeat} if self.count > 1 else {})
        return [(0.1 * self.count * repeat, bytes_handed_over, exchanges)] * self.count

    def end(self) -> None:
        pass


def test_times_are_divided_by_those_of_the_first_and_bytes_are_of_an_iteration(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "Group", Group)
    assert ranks.main(["--ranks", "1", "2", "--rounds", "3", "--repeat", "5"]) == 0
    *_, one, two, sums = capsys.readouterr().out.splitlines()
    assert one.split() == ["1", "100.0", "100.0", "100.0", "1.00"]
    assert two.split() == ["2", "200.0", "200.0", "200.0", "2.00"]
    assert sums.split() == ["2", "ranks:", "3.0", "KB", "in", "2", "exchanges", "an", "iteration,", "sums"]


def test_more_ranks_than_images_are_refused(capsys):
    with pytest.raises(SystemExit):
        ranks.main(["--ranks", "8", "--batch", "4"])
    assert "allowed are --ranks from 1 to --batch" in capsys.readouterr().err
