"""Eq. 5 and Eq. 10 against their expressions in float64."""

import pytest
import torch
from torch.nn import functional as F

import gdfq_ext

CHANNELS = [16, 1, 7, 64]


def layers(seed, channels=CHANNELS, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(count, generator=g).to(dtype) for count in channels]


def bns64(means, variances, running_means, running_vars, reduction):
    reduce = torch.sum if reduction == "sum" else torch.mean
    pairs = zip(means + variances, running_means + running_vars, strict=True)
    terms = [reduce((batch.double() - running.double()) ** 2) for batch, running in pairs]
    return sum(terms) / (1 if reduction == "sum" else len(means))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("channels", [CHANNELS, [1], [3] * 60])
def test_bns_loss_and_gradients(reduction, channels):
    lists = [layers(seed, channels) for seed in range(4)]
    leaves = [layer.requires_grad_() for layer in lists[0] + lists[1]]
    actual = gdfq_ext.bns_loss(*lists, reduction=reduction)
    expected = bns64(*lists, reduction)
    assert actual.shape == ()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(3 * actual, leaves), torch.autograd.grad(3 * expected, leaves)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_bns_loss_is_zero_where_the_statistics_match():
    means, variances = layers(0), layers(1)
    assert gdfq_ext.bns_loss(means, variances, means, variances) == 0


def test_bns_loss_takes_half_precision_statistics():
    lists = [layers(seed, dtype=torch.float16) for seed in range(4)]
    torch.testing.assert_close(gdfq_ext.bns_loss(*lists).double(), bns64(*lists, "mean"), rtol=1e-5, atol=0)


def test_bns_loss_shows_nan():
    lists = [layers(seed) for seed in range(4)]
    lists[1][2][3] = torch.nan
    assert gdfq_ext.bns_loss(*lists).isnan()


def test_running_statistics_take_no_gradient():
    lists = [layers(seed) for seed in range(4)]
    for layer in lists[0] + lists[2]:
        layer.requires_grad_()
    gdfq_ext.bns_loss(*lists).backward()
    assert all(layer.grad is None for layer in lists[2])


def test_losses_refuse_a_second_derivative():
    student = torch.randn(3, 4, requires_grad=True)
    means = [torch.randn(3, requires_grad=True)]
    bns = gdfq_ext.bns_loss(means, [torch.ones(3)], [torch.ones(3)], [torch.ones(3)])
    distillation, _, _ = gdfq_ext.distillation_loss(student, torch.randn(3, 4), torch.zeros(3, dtype=torch.int64))
    for loss, leaf in ((bns, means), (distillation, student)):
        with pytest.raises(RuntimeError, match="once only"):
            torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"means": []}, "means is empty"),
        ({"running_vars": [torch.ones(3)] * 2}, "running_vars has 2 layers and means has 1"),
        ({"variances": [torch.ones(4)]}, r"variances\[0\] has shape \(4,\), means\[0\] \(3,\)"),
        ({"means": [torch.ones(3, 1)]}, r"means\[0\] has shape \(3, 1\)"),
        ({"means": [torch.ones(0)]}, "C >= 1"),
        ({"running_means": [torch.ones(3, device="meta")]}, r"running_means\[0\] is on meta"),
        ({"reduction": "none"}, "reduction is 'none'; allowed are 'mean', 'sum'"),
    ],
)
def test_bns_loss_names_bad_arguments(changes, message):
    names = ["means", "variances", "running_means", "running_vars"]
    with pytest.raises(ValueError, match=message):
        gdfq_ext.bns_loss(**({name: [torch.ones(3)] for name in names} | changes))


def logits(batch, classes, seed, scale=3.0, dtype=torch.float32):
    return (torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def distillation64(student, teacher, targets, temperature, ce_weight, kd_weight, reduction, sample_weight=None):
    student, teacher = student.double(), teacher.double()
    terms = F.cross_entropy(student, targets.double() if targets.is_floating_point() else targets, reduction="none")
    cross_entropy = (terms if sample_weight is None else terms * sample_weight.double()).mean()
    soft = F.log_softmax(student / temperature, 1)
    kl = F.kl_div(soft, F.softmax(teacher / temperature, 1), reduction="sum")
    kl = kl / (student.numel() if reduction == "mean" else len(student))
    return ce_weight * cross_entropy + kd_weight * temperature**2 * kl, cross_entropy, kl


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
@pytest.mark.parametrize(("batch", "classes"), [(1, 1), (1, 10), (7, 10), (200, 10), (5, 1000), (3, 33)])
def test_distillation_loss_and_gradient(batch, classes, reduction, dtype):
    student, teacher = logits(batch, classes, 0, dtype=dtype).requires_grad_(), logits(batch, classes, 1, dtype=dtype)
    labels = torch.arange(batch) * 7 % classes
    options = {"temperature": 4.0, "cross_entropy_weight": 0.7, "distillation_weight": 1.3}
    actual = gdfq_ext.distillation_loss(student, teacher, labels, **options, reduction=reduction)
    expected = distillation64(student, teacher, labels, *options.values(), reduction)
    assert [part.dtype for part in actual] == [torch.float32] * 3
    torch.testing.assert_close([part.double() for part in actual], list(expected), rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(2 * loss, student)[0].double() for loss, _, _ in (actual, expected)]
    tolerance = {"rtol": 1e-4, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-6}
    torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize(("batch", "classes"), [(1, 1), (7, 10), (200, 10), (5, 1000), (3, 33)])
def test_distillation_loss_with_soft_targets_and_weights(batch, classes, soft, weighted):
    student, teacher = logits(batch, classes, 0).requires_grad_(), logits(batch, classes, 1)
    targets = logits(batch, classes, 2).softmax(1) * 0.8 if soft else torch.arange(batch) * 7 % classes
    sample_weight = torch.rand(batch, generator=torch.Generator().manual_seed(3)) if weighted else None
    options = {"temperature": 4.0, "cross_entropy_weight": 0.7, "distillation_weight": 1.3, "reduction": "batchmean"}
    actual = gdfq_ext.distillation_loss(student, teacher, targets, sample_weight=sample_weight, **options)
    expected = distillation64(student, teacher, targets, *options.values(), sample_weight)
    torch.testing.assert_close([part.double() for part in actual], list(expected), rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(2 * loss, student)[0] for loss, _, _ in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_shares_of_one_class_are_its_label():
    student, teacher, labels = logits(6, 10, 0), logits(6, 10, 1), torch.arange(6)
    shares = F.one_hot(labels, 10).half()
    hard, soft = (gdfq_ext.distillation_loss(student, teacher, targets) for targets in (labels, shares))
    torch.testing.assert_close(hard, soft, rtol=1e-6, atol=0)


def test_no_share_of_an_impossible_class_costs_nothing():
    student = logits(2, 10, 0)
    student[:, 3] = -torch.inf
    for target in (F.one_hot(torch.tensor([0, 1]), 10).float(), torch.tensor([0, 1])):
        _, cross_entropy, _ = gdfq_ext.distillation_loss(student, logits(2, 10, 1), target)
        torch.testing.assert_close(cross_entropy, F.cross_entropy(student, torch.tensor([0, 1])))


def test_a_sample_without_weight_takes_part_in_kl_alone():
    student, teacher = logits(2, 10, 0).requires_grad_(), logits(2, 10, 1)
    labels, weight = torch.tensor([3, 4]), torch.tensor([1.0, 0.0])
    options = {"distillation_weight": 0.0}
    loss, cross_entropy, kl = gdfq_ext.distillation_loss(student, teacher, labels, sample_weight=weight, **options)
    loss.backward()
    assert student.grad[1].eq(0).all()
    assert student.grad[0].ne(0).all()
    torch.testing.assert_close(cross_entropy, F.cross_entropy(student[:1], labels[:1]).detach() / 2)
    torch.testing.assert_close(kl, gdfq_ext.distillation_loss(student, teacher, labels)[2], rtol=0, atol=0)


@pytest.mark.parametrize(("ce_weight", "kd_weight"), [(1.0, 0.0), (0.0, 1.0)])
def test_each_part_alone(ce_weight, kd_weight):
    student, teacher, labels = logits(6, 10, 0), logits(6, 10, 1), torch.arange(6)
    loss, cross_entropy, kl = gdfq_ext.distillation_loss(
        student, teacher, labels, cross_entropy_weight=ce_weight, distillation_weight=kd_weight
    )
    torch.testing.assert_close(loss, ce_weight * cross_entropy + kd_weight * 400 * kl, rtol=1e-6, atol=0)


def test_equal_logits_distil_nothing():
    student = logits(6, 10, 0)
    _, _, kl = gdfq_ext.distillation_loss(student, student, torch.arange(6))
    assert kl.item() == pytest.approx(0, abs=1e-8)


def test_large_logits_do_not_overflow():
    student, teacher = logits(4, 10, 0, scale=1e4).requires_grad_(), logits(4, 10, 1, scale=1e4)
    loss, _, _ = gdfq_ext.distillation_loss(student, teacher, torch.arange(4))
    loss.backward()
    torch.testing.assert_close(
        loss.double(), distillation64(student, teacher, torch.arange(4), 20.0, 1.0, 1.0, "mean")[0], rtol=1e-5, atol=0
    )
    assert student.grad.isfinite().all()


def test_only_the_student_takes_a_gradient():
    student, teacher = logits(4, 10, 0).requires_grad_(), logits(4, 10, 1).requires_grad_()
    shares, weight = torch.ones(4, 10, requires_grad=True), torch.ones(4, requires_grad=True)
    gdfq_ext.distillation_loss(student, teacher, shares, sample_weight=weight)[0].backward()
    assert [leaf.grad for leaf in (teacher, shares, weight)] == [None] * 3
    loss, cross_entropy, kl = gdfq_ext.distillation_loss(student, teacher, torch.arange(4))
    loss.backward()
    assert teacher.grad is None
    assert not gdfq_ext.distillation_loss(student.detach(), teacher, torch.arange(4))[0].requires_grad
    assert not cross_entropy.requires_grad
    assert not kl.requires_grad


@pytest.mark.parametrize("label", [-1, -100, 10, 2**40])
def test_a_label_that_is_no_class_makes_the_loss_nan(label):
    student = logits(3, 10, 0).requires_grad_()
    loss, cross_entropy, kl = gdfq_ext.distillation_loss(student, logits(3, 10, 1), torch.tensor([0, label, 1]))
    loss.backward()
    assert loss.isnan()
    assert cross_entropy.isnan()
    assert kl.isfinite()
    assert student.grad.isnan().any(dim=1).tolist() == [False, True, False]


def test_an_empty_batch_gives_nan_and_an_empty_gradient():
    student = torch.empty(0, 10, requires_grad=True)
    parts = gdfq_ext.distillation_loss(student, torch.empty(0, 10), torch.empty(0, dtype=torch.int64))
    assert all(part.isnan() for part in parts)
    parts[0].backward()
    assert student.grad.shape == (0, 10)


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_distillation_compiles_without_graph_breaks(reduction):
    def step(student, teacher, labels):
        return gdfq_ext.distillation_loss(student * 2, teacher, labels, reduction=reduction)[0]

    student, arguments = logits(6, 10, 0).requires_grad_(), (logits(6, 10, 1), torch.arange(6))
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    gradients = [torch.autograd.grad(function(student, *arguments), student)[0] for function in (compiled, step)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"targets": torch.zeros(3).int()}, TypeError, "targets is torch.int32; allowed is torch.int64 or a floating"),
        ({"targets": torch.arange(4)}, ValueError, r"targets has shape \(4,\); allowed is \(3,\)"),
        ({"targets": torch.ones(3)}, ValueError, r"targets has shape \(3,\); allowed is \(3, 4\)"),
        ({"targets": torch.arange(3, device="meta")}, ValueError, "targets is on meta"),
        ({"sample_weight": torch.arange(3)}, TypeError, "sample_weight is torch.int64; allowed is a floating type"),
        ({"sample_weight": torch.ones(3, 1)}, ValueError, r"sample_weight has shape \(3, 1\); allowed is \(3,\)"),
        ({"sample_weight": torch.ones(3, device="meta")}, ValueError, "sample_weight is on meta"),
        ({"teacher_logits": torch.ones(3, 5)}, ValueError, r"teacher_logits has shape \(3, 5\)"),
        ({"student_logits": torch.ones(3)}, ValueError, r"student_logits has shape \(3,\)"),
        ({"student_logits": torch.ones(3, 4).int()}, TypeError, "student_logits is torch.int32"),
        ({"teacher_logits": torch.ones(3, 4, device="meta")}, ValueError, "teacher_logits is on meta"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0; allowed is a number above 0"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"reduction": "sum"}, ValueError, "reduction is 'sum'; allowed are 'mean', 'batchmean'"),
    ],
)
def test_distillation_loss_names_bad_arguments(changes, error, message):
    good = {"student_logits": torch.ones(3, 4), "teacher_logits": torch.ones(3, 4), "targets": torch.arange(3)}
    with pytest.raises(error, match=message):
        gdfq_ext.distillation_loss(**(good | changes))
