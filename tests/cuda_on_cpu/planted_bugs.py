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
        "parameters.h",
        "step[c] > 0.0f ? step[c] : NAN",
        "step[c]",
        "numbers of a learned step that is not above 0",
    ),
    PlantedBug(
        "parameters.h",
        "fp32::subtract(highest, zero_point[c])",
        "highest",
        "the last level of a learned step without its zero point",
    ),
    PlantedBug(
        "fake_quantize_learned.h",
        "fp32::subtract(level, steps)",
        "fp32::subtract(steps, level)",
        "what the rounding adds to the gradient of the step with the wrong sign",
    ),
    PlantedBug(
        "fake_quantize_learned.cu",
        "elements.choice.at[v] < tensors.choice.threshold",
        "elements.choice.at[v] <= tensors.choice.threshold",
        "a byte at the threshold keeps its element",
    ),
    PlantedBug(
        "fake_quantize_learned.cu",
        "const bool passes = stays || is_inside(level, quantizer);",
        "const bool passes = is_inside(level, quantizer);",
        "no gradient for what stays beyond the levels",
    ),
    PlantedBug(
        "fake_quantize_learned.cu",
        "if (!stays) of_step +=",
        "of_step +=",
        "what stays moves the step",
    ),
    PlantedBug(
        "fake_quantize_learned.cu",
        "is_aligned(tensors.grad_y) && is_aligned(tensors.result)",
        "is_aligned(tensors.result)",
        "the gradient's alignment is not looked at",
    ),
    PlantedBug(
        "fake_quantize_learned.cu",
        "                       is_aligned(tensors.choice.bytes);",
        "                       true;",
        "the choice's alignment is not looked at",
    ),
    PlantedBug(
        "fake_quantize_learned.cu",
        "if (rest < tensors.numel) {",
        "if (rest + 1 < tensors.numel) {",
        "the last element is left out",
    ),
    PlantedBug(
        "fake_quantize_learned.cu",
        "i < blocks; i += kThreads) of_thread",
        "i < blocks; i += 2 * kThreads) of_thread",
        "every other 256 of the blocks' sums are left out",
    ),
    PlantedBug(
        "fake_quantize_learned.cu",
        "double of_thread = 0.0;",
        "float of_thread = 0.0f;",
        "the blocks' sums joined in float",
    ),
    PlantedBug(
        "round_learned.h",
        "clamped ? 0.0f : 1.2f * sigmoid * (1.0f - sigmoid)",
        "1.2f * sigmoid * (1.0f - sigmoid)",
        "a gradient of what is rounded all the way",
    ),
    PlantedBug(
        "round_learned.h",
        "is_inside(level, quantizer) ? grad_y * quantizer.step : 0.0f",
        "grad_y * quantizer.step",
        "a gradient of codes beyond the last",
    ),
    PlantedBug(
        "round_learned.h",
        "side < 0.0f ? -power : 0.0f",
        "-power",
        "the penalty pushes what is halfway",
    ),
    PlantedBug(
        "round_learned.cu",
        "log2f(fabsf(centered))",
        "log2f(fmaxf(fabsf(centered), 0x1p-100f))",
        "a penalty that loses NaN",
    ),
    PlantedBug(
        "round_learned.cu",
        "power(centered(rounding), sharpness - 1.0f)",
        "power(centered(rounding), sharpness)",
        "the penalty itself for its derivative",
    ),
    PlantedBug(
        "round_learned.cu",
        "is_aligned(weight.v) && is_aligned(grad_y)",
        "is_aligned(weight.v)",
        "the gradient's alignment is not looked at",
    ),
    PlantedBug(
        "round_learned.cu",
        "c < channels; c += kThreads) of_thread",
        "c < channels; c += 2 * kThreads) of_thread",
        "channels beyond the number of threads are left out of the penalty",
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
        "return fp32::multiply_add(remainder, quantizer.reciprocal, quotient);",
        "return quotient;",
        "a quotient that is not corrected, on the wrong side of a half",
    ),
    PlantedBug(
        "quantizer.h",
        "const FastStepQuantizer& quantizer) {\n  return fp32::round_half_even(in_steps(x, quantizer));",
        "const FastStepQuantizer& quantizer) {\n  return floorf(in_steps(x, quantizer) + 0.5f);",
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
        "quantizer.step > 0x1p64f ? 0x1p-64f : quantizer.step",
        "quantizer.step",
        "the reciprocal of a large step, which float32 does not hold",
    ),
    PlantedBug(
        "quantizer.h",
        "quantizer.step < 0x1p-64f ? 0x1p64f : 1.0f",
        "1.0f",
        "the reciprocal of a small step, which float32 does not hold",
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
