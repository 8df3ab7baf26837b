"""Networks that nobody thought of: captured, quantized and stored they compute what the network computes, or refuse.

`GDFQ_NETWORKS=500 pytest tests/gdfq/graph/test_random_networks.py` tries as many, others each time.
"""

import copy
import os
import warnings
from pathlib import Path

import pytest
import torch
from distinct_inputs import distinct_inputs
from hypothesis import HealthCheck, Phase, event, given, settings
from random_networks import Network, Spec, specs
from torch import nn

import gdfq
from gdfq.calibrate import calibrate
from gdfq.config import QuantizerConfig
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized, build_teacher, capture
from gdfq.graph.blocks import find_blocks

MANY = int(os.environ.get("GDFQ_NETWORKS", "0"))
OTHER_SIZES = ((8, 8), (12, 9), (17, 13), (32, 24), (5, 7))
EIGHT_BITS = QuantizerConfig(weight_bits=8, activation_bits=8)
# Of the logits' standard deviation, root mean square; of 70 networks the median was 0.005, the largest 0.05.
NOISE = 0.15


def answer(model: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The logits; None: refused in words."""
    try:
        return model(x.clone())
    except GdfqError:
        return None


def expected_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The logits; None: the network takes no such images."""
    try:
        logits = model(x.clone())
    except Exception:
        return None
    return logits if logits.shape == (len(x), 5) else None


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-5)


@settings(
    max_examples=MANY or 12,
    derandomize=not MANY,
    database=None,
    deadline=None,
    phases=(Phase.generate,),  # the network that fails is printed; making it smaller takes minutes
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(spec=specs())
@torch.no_grad()
def check(folder: Path, spec: Spec) -> None:
    model = Network(spec)
    random = torch.Generator().manual_seed(spec.seed)

    def images(n, size=spec.size):
        return torch.randn(n, 3, *size, generator=random)

    with warnings.catch_warnings(action="ignore", category=UserWarning):
        captured = capture(copy.deepcopy(model), spec.size)
    teacher = build_teacher(captured)
    student, _ = build_quantized(captured, EIGHT_BITS)
    calibrate(student, [images(32)])

    for n in (1, 2, 5):
        x = images(n)
        logits, expected = answer(teacher, x), expected_of(model, x)
        assert (logits is not None) or n == 1, "a batch of the captured size was refused"
        if expected is not None:
            assert logits is not None, "refused, though the network takes it"
            assert close(logits, expected), f"{n} images"
    taken = 0
    for size in OTHER_SIZES:
        x = images(3, size)
        expected = expected_of(model, x)
        if expected is not None:
            logits = answer(teacher, x)
            taken += logits is not None
            assert logits is None or close(logits, expected), f"{size}"
            assert (answer(student, x) is None) == (logits is None)
    event(f"other sizes taken: {taken}")

    x = images(32)
    expected, found = model(x.clone()), student(x)
    noise = ((found - expected).square().mean().sqrt() / expected.std()).item()
    event(f"noise {noise:.0e}")
    assert noise < NOISE, noise
    assert max(distinct_inputs(student, x)) <= 256, "a layer reads what was not quantized"

    q = p = x
    blocks = find_blocks(student)
    for block in blocks:
        q, p = block.quantized()(q), block.exact()(p)
    event(f"blocks: {len(blocks)}")
    assert close(q, found)
    assert close(p, teacher(x))

    path = folder / "model.safetensors"
    gdfq.save_quantized(path, student, EIGHT_BITS, captured.image_shape)
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        loaded = gdfq.load_quantized(path, Network(spec))
    assert torch.equal(loaded(x), found)


@pytest.mark.long
def test_random_networks(tmp_path):
    check(tmp_path)
