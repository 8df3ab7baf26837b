"""The benchmark of numerators that are 0: its data are what it says, and it measures them."""

import json

import torch

from benchmarks import zero_numerators

SHAPE = (4, 3, 40, 40)


def numerators(x: torch.Tensor) -> torch.Tensor:
    """(q + zero) of Eq. 6 for four bits and the range 0..15, in float64."""
    scale, zero = 1.0, 0.0 + 8
    return (scale * x.double() - zero).round().clamp(-8, 7) + zero


def test_half_of_the_numerators_are_0_and_nothing_else_differs():
    data = zero_numerators.inputs(SHAPE, False, "cpu")
    assert (numerators(data["positive"]) >= 1).all()
    for name in ("half small", "half zero"):
        is_zero = numerators(data[name]) == 0
        assert 0.45 < is_zero.float().mean() < 0.55
        assert torch.equal(data[name][~is_zero], data["positive"][~is_zero])
    assert (data["half small"] > 0).all()
    relu = zero_numerators.inputs(SHAPE, True, "cpu")
    assert torch.equal(relu["half zero"].abs(), relu["positive"])
    assert 0.45 < (numerators(relu["half zero"].relu()) == 0).float().mean() < 0.55


def test_run(tmp_path, capsys):
    out = tmp_path / "result.json"
    assert zero_numerators.main(["--device", "cpu", "--mb", "0.2", "--rounds", "2", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["torch"] == torch.__version__
    assert result["gdfq_commit"]
    rows = {(row["kernel"], row["dtype"], row["data"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 10
    for (_, _, data), row in rows.items():
        assert row["rounds"] == 2
        assert row["median_us"] > 0
        assert row["over_positive"] == 1 if data == "positive" else row["over_positive"] > 0
        # What the kernels themselves made of it.
        assert row["zero_numerators"] == 0 if data == "positive" else 0.45 < row["zero_numerators"] < 0.55
    printed = capsys.readouterr().out
    assert printed.count("batch_norm_act_fake_quantize") == 4
    assert "of copy" in printed
