"""Several processes of one group compute what one does: two and four of gloo, on batches that they do not divide."""

import multiprocessing

import pytest
import rank_cases
import torch

COUNTS = (2, 4)
SEEDS = range(2)
NEAR = 1e-5
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["rank_cases"])
# By the BN behind, or nearly: these gradients are what rounding leaves of nothing.
TAKEN_OUT = ("G linear.bias", "G conv1.bias", "G conv2.bias", "G conv3.bias", "Q activation_quantizers.x.observer.step")


def run(function, count, *args) -> list[int]:
    """Exit codes of so many processes that run `function(rank, count, *args)`."""
    processes = [PROCESSES.Process(target=function, args=(rank, count, *args)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """Results by count of ranks, rank, and what is computed from which seed."""
    folder = tmp_path_factory.mktemp("ranks")
    for count in (2, 1, 4):  # two begin what others go on with
        assert run(rank_cases.work, count, folder, SEEDS) == [0] * count
    return {count: [torch.load(folder / f"{count}-{rank}.pt") for rank in range(count)] for count in (1, 2, 4)}


def difference(one: dict, other: dict, taken_out: tuple[str, ...] = TAKEN_OUT) -> float:
    """The largest, as a share of the largest value of its tensor."""
    assert one.keys() == other.keys()
    differences = [0.0]
    for name, value in one.items():
        if name.endswith(taken_out) or not value.numel():
            continue
        equal = value.isfinite() & other[name].isfinite()
        assert torch.equal(value[~equal].nan_to_num(), other[name][~equal].nan_to_num()), name
        if equal.any():
            scale = other[name][equal].abs().max().clamp_min(1e-12)
            differences.append(((value - other[name])[equal].abs().max() / scale).item())
    return max(differences)


def nearer(computed, count, name, case=None) -> float:
    """Of the seeds, how far from one rank: with one of them a value may come to lie across a rounding boundary."""
    one = computed[1][0]
    taken_out = TAKEN_OUT + (("Q depthwise.bias", "Q grouped.bias") if name == "moving statistics" else ())
    results = [(computed[count][0][name, seed], one[case or name, seed]) for seed in SEEDS]
    return min(difference(*pair, taken_out) for pair in results)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("case", rank_cases.CASES)
def test_one_iteration_is_that_of_one_rank(computed, count, case):
    assert nearer(computed, count, case) < (0.3 if case == "bfloat16" else NEAR)


@pytest.mark.parametrize("bug", rank_cases.BUGS)
def test_a_planted_bug_is_found(computed, bug):
    assert nearer(computed, 2, bug, rank_cases.BUGS[bug][0]) > 10 * NEAR


@pytest.mark.parametrize("count", COUNTS)
def test_all_ranks_have_the_same_bit_for_bit(computed, count):
    first, *others = computed[count]
    for name, result in first.items():
        if name[0] not in rank_cases.BUGS:
            for other in others:
                assert all(
                    torch.equal(value.nan_to_num(), other[name][key].nan_to_num()) for key, value in result.items()
                ), name


@pytest.mark.parametrize("count", COUNTS)
def test_a_bank_is_bit_for_bit_that_of_one_rank(computed, count):
    for seed in SEEDS:
        one, other = computed[1][0]["bank", seed], computed[count][0]["bank", seed]
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert one["bank"].shape == (11, 3, 8, 8)


def distance(one: dict, other: dict) -> float:
    squares = [
        ((one[name] - other[name]).square().sum(), other[name].square().sum()) for name in one if "observer" not in name
    ]
    return (sum(a for a, _ in squares) / sum(b for _, b in squares)).sqrt().item()


@pytest.mark.parametrize("count", COUNTS)
def test_after_twenty_iterations_no_further_from_one_rank_than_another_order_of_its_images(computed, count):
    one = computed[1][0]
    apart = [distance(computed[count][0]["trained", seed], one["trained", seed]) for seed in SEEDS]
    reordered = [distance(one["reversed", seed], one["trained", seed]) for seed in SEEDS]
    print(apart, reordered)
    assert 0 < max(apart) < 3 * max(reordered)
    assert max(reordered) < 0.05


@pytest.mark.parametrize("count", [1, 4])
def test_another_number_of_ranks_goes_on(computed, count):
    print(difference(computed[count][0]["interrupted", 0], computed[2][0]["interrupted", 0]))
    assert difference(computed[count][0]["interrupted", 0], computed[2][0]["interrupted", 0]) < 1e-3
