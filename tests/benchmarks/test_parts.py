"""Every operator's time goes to one part, the right one, and the parts make up the iteration."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import parts
from benchmarks.step_providers import RELEASED, Gdfq, PlainPyTorch, Task, Variant

TASK = Task(model="benchmarks.memory:SmallNet", image_size=16, batch=16)


@dataclass(eq=False)
class Event:
    """What is read of torch's FunctionEvent, times in microseconds."""

    name: str
    start: float = 0.0
    self_cpu_time_total: float = 0.0
    kernels: list = field(default_factory=list)
    cpu_parent: "Event | None" = None
    device_type: DeviceType = DeviceType.CPU

    @property
    def time_range(self) -> SimpleNamespace:
        return SimpleNamespace(start=self.start)


def kernel(name: str, duration: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, duration=duration)


def small_profile() -> list[Event]:
    step = Event("Optimizer.step#Adam.step", 60, 1000, [kernel("Optimizer.step#Adam.step", 9e6)])
    quantize = Event("gdfq_ext::fake_quantize", 25, 5000, [kernel("quantize", 50)])
    node = Event("GeneratedBackwardFor_gdfq_ext_batch_norm_act_moments_defaultBackward", 50)
    return [
        Event("aten::randn", 1, 100, [kernel("normal", 1)]),
        *(Event(parts.MARK + stage, start, 7e6) for stage, start in (("teacher", 20), ("generator", 10))),
        *(Event(parts.MARK + stage, start, 7e6) for stage, start in (("losses", 30), ("student", 40), ("other", 70))),
        Event("aten::conv2d", 11, 10000, [kernel("conv", 100), kernel("transpose", 10)]),
        Event("aten::conv2d", 21, 20000, [kernel("conv", 200)]),
        quantize,
        Event("aten::empty", 26, 500, cpu_parent=quantize),
        Event("aten::log_softmax", 31, 3000, [kernel("softmax", 30)]),
        Event("aten::conv2d", 41, 40000, [kernel("conv", 400)]),
        node,
        Event("aten::cat", 51, 6000, [kernel("cat", 60)], cpu_parent=node),
        step,
        Event("aten::_fused_adam_", 61, 7000, [kernel("adam", 70)], cpu_parent=step),
        Event("aten::add_", 71, 8000, [kernel("add", 80)]),
        Event("conv", device_type=DeviceType.CUDA),
        Event("Memcpy DtoH", device_type=DeviceType.CUDA),
        Event("Optimizer.step#Adam.step", device_type=DeviceType.CUDA),
    ]


def test_operators_belong_to_the_stage_that_they_start_in_or_to_their_own_part():
    expected = {
        "generator": 10, "teacher": 20, "student": 40, "quantizers": 5.5, "statistics": 6, "losses": 3, "optimizers": 8,
        "other": 8.1,
    }  # fmt: skip
    assert parts.part_times(small_profile(), on_gpu=False) == pytest.approx(expected)
    expected = {
        "generator": 0.11, "teacher": 0.2, "student": 0.4, "quantizers": 0.05, "statistics": 0.06, "losses": 0.03,
        "optimizers": 0.07, "other": 0.081,
    }  # fmt: skip
    assert parts.part_times(small_profile(), on_gpu=True) == pytest.approx(expected)


def test_launches_on_a_gpu_are_what_the_device_did():
    assert parts.count_launches(small_profile(), on_gpu=True) == {"kernels": 2}


def test_leaf_operator_calls_are_those_that_compute():
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    result = parts.measure(lambda: (a.t() @ b + 1).relu().view(2, 8)[0], 2, None)
    assert result["launches"] == {"leaf operator calls": 3}  # mm, add and what relu calls
    assert result["parts_ms"] is None


def test_compiled_loops_are_no_operators():
    assert parts.count_launches([Event("Torch-Compiled Region: 0/1"), Event("aten::mm")], on_gpu=False) is None


@pytest.mark.parametrize("new", [Gdfq, lambda task: PlainPyTorch(task, Variant()), lambda t: PlainPyTorch(t, RELEASED)])
def test_marks_follow_the_iteration(new):
    subject = new(TASK)
    for _ in range(2):  # the second: no hook was left behind
        with parts.marking(subject.networks), profile(activities=[ProfilerActivity.CPU]) as profiler:
            subject.step()
        events = sorted(profiler.events(), key=lambda event: event.time_range.start)
        stages = [event.name.removeprefix(parts.MARK) for event in events if event.name.startswith(parts.MARK)]
        step_of_generator = ["generator", "losses", "teacher", "losses", "teacher", "generator", "other"]
        assert stages == [*step_of_generator, "student", "losses", "student", "other"]


def test_parts_make_up_the_iteration():
    """All but Python between operators: at this size not more than a quarter."""
    ours, eager = Gdfq(TASK), PlainPyTorch(TASK, Variant())
    for subject in (ours, eager):
        subject.step()
        result = parts.measure(subject.step, 3, subject.networks)
        assert tuple(result["parts_ms"]) == parts.PARTS
        assert 0.75 < sum(result["parts_ms"].values()) / result["profiled_ms"] <= 1
        own = {part: result["parts_ms"][part] for part in ("quantizers", "statistics")}
        assert all(value > 0 for value in own.values()) if subject is ours else not any(own.values())
        assert min(value for part, value in result["parts_ms"].items() if part not in own) > 0


def test_no_parts_where_the_networks_are_not_called():
    optimizer = torch.optim.SGD([torch.zeros(1)])
    networks = parts.Networks(nn.Identity(), nn.Identity(), nn.Identity(), (optimizer,))
    assert parts.measure(lambda: torch.ones(3) + 1, 1, networks)["parts_ms"] is None
