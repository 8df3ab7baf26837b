"""Bugs that somebody could write into the CUDA kernels, chosen by hand: `mutations.py planted` tries them."""

from typing import NamedTuple


class PlantedBug(NamedTuple):
    """A piece of a kernel, and what a mistake would make of it."""

    file: str
    """In csrc/kernels."""
    old: str
    """What stands there, exactly once."""
    new: str
    why: str
    """What kind of mistake this is."""


PLANTED = [
    PlantedBug(
        "channels.cuh",
        "__syncthreads();\n      // The threads of the block's first rows",
        "// The threads of the block's first rows",
        "no barrier between writing and adding the threads' sums",
    ),
    PlantedBug(
        "fake_quantize.cu",
        "first + v < numel; ++v) y[",
        "first + v + 1 < numel; ++v) y[",
        "the last element of a ragged tensor is not written",
    ),
    PlantedBug(
        "channels.cuh",
        "#pragma unroll\n    for (int k = 0; k < Operation::kSums; ++k) {\n      __syncthreads();",
        "#pragma unroll\n    for (int k = 0; k < Operation::kSums; ++k) {",
        "no barrier between adding one sum and writing the next",
    ),
    PlantedBug(
        "reduce.cuh",
        "  __syncthreads();  // an earlier result may still be being read\n",
        "",
        "no barrier between reading one result and writing the next",
    ),
    PlantedBug(
        "reduce.cuh",
        "if (lane == 0) of_warp[warp] = value;\n  __syncthreads();",
        "if (lane == 0) of_warp[warp] = value;",
        "no barrier between the warps' results and their join",
    ),
    PlantedBug(
        "reduce.cuh",
        "for (int distance = kWarp / 2;",
        "for (int distance = kWarp / 4;",
        "shuffles over half a warp",
    ),
    PlantedBug(
        "reduce.cuh",
        "lane < warps ? of_warp[lane]",
        "lane < warps - 1 ? of_warp[lane]",
        "the last warp is left out",
    ),
    PlantedBug(
        "reduce.cuh",
        "(b > a || b != b) ? b : a",
        "b > a ? b : a",
        "a maximum that loses NaN",
    ),
    PlantedBug(
        "channels.cuh",
        "if (first + u * blockDim.x < end) apply",
        "if (first + u * blockDim.x <= end) apply",
        "one vector too many at the end of a share of planes",
    ),
    PlantedBug(
        "channels.cuh",
        "in_one_plane ? into_plane * N : 0",
        "in_one_plane ? into_plane : 0",
        "a share's offset counted in vectors instead of elements",
    ),
    PlantedBug(
        "channels.cuh",
        "share_end < shape.rows ? share_end : shape.rows",
        "share_end",
        "the last share of rows runs past the tensor",
    ),
    PlantedBug(
        "channels.cuh",
        "+ c) * gridDim.y + blockIdx.y] = sum",
        "+ c) * gridDim.y] = sum",
        "all shares of a channel write to one place",
    ),
    PlantedBug(
        "channels.cuh",
        "i < partial.shares; i += kWarp",
        "i < partial.shares; i += 2 * kWarp",
        "every other 32 of the shares are left out",
    ),
    PlantedBug(
        "divider.h",
        "/ static_cast<std::uint64_t>(d) + 1)",
        "/ static_cast<std::uint64_t>(d))",
        "a multiplier rounded down: multiples of the divisor come out one too low",
    ),
    PlantedBug(
        "fake_quantize.cu",
        "distance < lanes; distance *= 2) byte",
        "distance <= lanes; distance *= 2) byte",
        "mask bytes mixed with those of the neighbouring lanes",
    ),
    PlantedBug(
        "fake_quantize.cu",
        "if (first + N > numel) flags &=",
        "if (first > numel) flags &=",
        "mask bits past the end are not cleared",
    ),
    PlantedBug(
        "weights.cuh",
        "if (block < layers.at[middle].first_block)",
        "if (block <= layers.at[middle].first_block)",
        "a layer's first block works on the layer before",
    ),
    PlantedBug(
        "count_changed_codes.cu",
        "counts += std::int64_t{layers.count} * count;",
        "",
        "the counts of a second launch overwrite those of the first",
    ),
    PlantedBug(
        "count_changed_codes.cu",
        "is_aligned(weight.weight) && is_aligned(weight.direction)",
        "is_aligned(weight.weight)",
        "of a weight and its direction only the first one's alignment is looked at",
    ),
    PlantedBug(
        "observe_range.cu",
        "if (rest < numel)",
        "if (rest + 1 < numel)",
        "the last element is not looked at",
    ),
    PlantedBug(
        "bns_loss.cu",
        "batch_terms += count;",
        "",
        "the terms of a second launch overwrite those of the first",
    ),
    PlantedBug(
        "distillation_loss.cu",
        "label >= 0 && label < classes",
        "label >= 0 && label <= classes",
        "a label one past the last class counts as one",
    ),
    PlantedBug(
        "conditional_batch_norm_act.cu",
        "if (groups.norm.labels[n] == row) return;",
        "if (groups.norm.labels[n] == row) break;",
        "all samples of a label write to its row, the last one to run wins",
    ),
    PlantedBug(
        "quantizer.h",
        "round_half_even(fp32::multiply_add(remainder, quantizer.reciprocal, quotient))",
        "round_half_even(quotient)",
        "a quotient that is not corrected, on the wrong side of a half",
    ),
    PlantedBug(
        "quantizer.h",
        "return fp32::round_half_even(fp32::multiply_add(remainder, quantizer.reciprocal, quotient));",
        "return floorf(fp32::multiply_add(remainder, quantizer.reciprocal, quotient) + 0.5f);",
        "halves of a step rounded up",
    ),
    PlantedBug(
        "quantizer.h",
        "affine ? -fp32::round_half_even(fp32::divide(below, quantizer.step)) : -levels",
        "affine ? 0.0f : -levels",
        "the affine quantizer without a zero point",
    ),
    PlantedBug(
        "quantizer.h",
        "fp32::divide(below, quantizer.step)) : -levels;",
        "fp32::divide(below, quantizer.step)) : -levels - 1.0f;",
        "the least code, which has no opposite, taken into the symmetric quantizer",
    ),
    PlantedBug(
        "quantizer.h",
        "fp32::at_least(width, affine ? 1e-8f : 5e-9f)",
        "width",
        "a step of 0 for an empty range",
    ),
    PlantedBug(
        "quantizer.h",
        "fp32::subtract(0.0f, fp32::at_most(lower, 0.0f))",
        "fp32::subtract(0.0f, lower)",
        "an affine range without 0",
    ),
    PlantedBug(
        "quantizer.h",
        "upper >= lower && width < INFINITY ? step",
        "width < INFINITY ? step",
        "numbers of an inverted range",
    ),
    PlantedBug(
        "quantizer.h",
        "fp32::multiply(fp32::add(level, 0.0f), quantizer.step)",
        "fp32::multiply(level, quantizer.step)",
        "a value of -0",
    ),
    PlantedBug(
        "quantizer.h",
        "quantizer.step > 0x1p64f ? 0x1p-64f : 1.0f",
        "1.0f",
        "the reciprocal of a step that float32 does not hold",
    ),
    PlantedBug(
        "quantizer.h",
        "quantizer.high + 1.0f, divisor",
        "quantizer.high, divisor",
        "what is above the last level counts as inside",
    ),
    # What an earlier emulation let through.
    PlantedBug(
        "observe_range.cu",
        "for (int i = static_cast<int>(threadIdx.x); i < blocks; i += kThreads) {",
        "if (const int i = static_cast<int>(threadIdx.x); i < blocks) {",
        "the results of blocks beyond the number of threads are left out",
    ),
    PlantedBug(
        "distillation_loss.cu",
        "for (std::int64_t i = threadIdx.x; i < batch; i += kThreads) {",
        "if (const std::int64_t i = threadIdx.x; i < batch) {",
        "images beyond the number of threads are left out of the sums",
    ),
    PlantedBug(
        "channels.cuh",
        "for (const auto* input : operation.input) aligned = aligned && is_aligned(input);",
        "aligned = aligned && is_aligned(operation.input[0]);",
        "of two inputs only the first one's alignment is looked at",
    ),
    PlantedBug(
        "weights.cuh",
        "const bool by_warp = layer.length <= kShort;",
        "const bool by_warp = layer.length < kShort;",
        "host and device disagree on whether channels of one length are short",
    ),
    PlantedBug(
        "batch_norm_act_moments.cu",
        "GDFQ_LAUNCH(finish_kernel, grid_of_warps(shape.channels), dim3(kThreads), device.stream,",
        "GDFQ_LAUNCH(finish_kernel, grid_of_warps(shape.channels), dim3(kThreads), nullptr,",
        "the second stage does not wait for the first, being on another stream",
    ),
    PlantedBug(
        "fake_quantize.cu",
        "std::int64_t{kThreads} * kUnroll * N)));",
        "std::int64_t{kThreads} * kUnroll * N)), 1, 2);",
        "every block is there twice: all is done, and stored, two times",
    ),
    PlantedBug(
        "channels.cuh",
        "static_cast<std::int64_t>(plane) * planes.outer_stride",
        "static_cast<std::int32_t>(plane * planes.outer_stride)",
        "the offset of a plane in 32 bits",
    ),
    PlantedBug(
        "channels.cuh",
        "  double sum = 0.0;\n",
        "  float sum = 0.0f;\n",
        "shares joined in float: the variance is the difference of two sums that are rounded too early",
    ),
]
