// Eq. 10: cross-entropy and T^2 KL(softmax(z_P / T) || softmax(z_Q / T)), with the gradient of z_Q.
// Bytes per element: 12, with soft targets 16. An image's logits are read several times, from the cache.
#include "../kernels/distillation_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "channels.h"
#include "exponential.h"
#include "lanes.h"

namespace gdfq::cpu {
namespace {

// log softmax(x / temperature) = (x - greatest) / temperature - log_sum. With the greatest taken away, no exponential
// overflows.
struct LogSoftmax {
  float greatest;
  float inverse_temperature;
  float log_sum;

  GDFQ_HD float operator()(float x) const { return (x - greatest) * inverse_temperature - log_sum; }
};

GDFQ_CLONES float greatest_of(const float* x, std::int64_t count) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, kNothing);
  const std::int64_t whole = count - count % kLanes;
  for (std::int64_t begin = 0; begin < whole; begin += kLanes) {
    GDFQ_SIMD
    for (std::int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = std::max(lanes[lane], x[begin + lane]);
  }
  float greatest = *std::max_element(lanes, lanes + kLanes);
  for (std::int64_t i = whole; i < count; ++i) greatest = std::max(greatest, x[i]);
  return greatest;
}

// Leaves softmax(x / temperature) in y.
GDFQ_CLONES LogSoftmax softmax(const float* x, float* y, std::int64_t count, float greatest, float temperature) {
  const float inverse_temperature = 1.0f / temperature;
  const float sum = sum_of(count, [=](std::int64_t i) GDFQ_INLINE_LAMBDA {
    y[i] = exp_of_negative((x[i] - greatest) * inverse_temperature);
    return y[i];
  });
  const float factor = 1.0f / sum;
  GDFQ_SIMD
  for (std::int64_t i = 0; i < count; ++i) y[i] *= factor;
  return {greatest, inverse_temperature, std::log(sum)};
}

// One image, and what becomes of it.
struct Row {
  const float* student;
  const float* teacher;
  float* gradient;
  std::int64_t classes;
};

// The image's KL; its part of the gradient goes to `gradient`, scaled.
GDFQ_CLONES float divergence(const Row& row, const float* p, const float* q, LogSoftmax teacher, LogSoftmax student,
                             float scale) {
  return sum_of(row.classes, [=](std::int64_t c) GDFQ_INLINE_LAMBDA {
    row.gradient[c] = scale * (q[c] - p[c]);
    return p[c] * (teacher(row.teacher[c]) - student(row.student[c]));
  });
}

GDFQ_CLONES float sum_of_values(const float* x, std::int64_t count) {
  return sum_of(count, [=](std::int64_t i) GDFQ_INLINE_LAMBDA { return x[i]; });
}

// Adds scale * (total * q - shares) to the gradient and gives the cross-entropy against the shares; 0 log 0 is 0.
GDFQ_CLONES float soft_cross_entropy(const Row& row, const float* shares, const float* q, LogSoftmax student,
                                     float scale) {
  const float total = sum_of_values(shares, row.classes);
  return sum_of(row.classes, [=](std::int64_t c) GDFQ_INLINE_LAMBDA {
    row.gradient[c] += scale * (total * q[c] - shares[c]);
    const float term = shares[c] * student(row.student[c]);
    return shares[c] == 0.0f ? 0.0f : -term;
  });
}

// The same with all of the share at the label.
GDFQ_CLONES float hard_cross_entropy(const Row& row, std::int64_t label, const float* q, LogSoftmax student,
                                     float scale) {
  if (label < 0 || label >= row.classes) {
    std::fill_n(row.gradient, row.classes, std::numeric_limits<float>::quiet_NaN());
    return std::numeric_limits<float>::quiet_NaN();
  }
  GDFQ_SIMD
  for (std::int64_t c = 0; c < row.classes; ++c) row.gradient[c] += scale * q[c];
  row.gradient[label] -= scale;
  return -student(row.student[label]);
}

}  // namespace

void distillation_loss(const float* student, const float* teacher, const Targets& targets, std::int64_t batch,
                       std::int64_t classes, const DistillationWeights& weights, float* loss, float* cross_entropy,
                       float* kl, float* gradient, const Parallel& parallel) {
  const double count = static_cast<double>(batch) * (weights.batchmean ? 1.0 : static_cast<double>(classes));
  const float of_kl = static_cast<float>(weights.distillation * weights.temperature / count);
  std::vector<float> cross_entropies(static_cast<std::size_t>(batch)), kls(cross_entropies.size());
  const auto run_row = [&](std::int64_t image, float* p, float* q) {
    const std::int64_t offset = image * classes;
    const Row row{student + offset, teacher + offset, gradient + offset, classes};
    const float greatest = greatest_of(row.student, classes);
    const LogSoftmax soft_teacher =
        softmax(row.teacher, p, classes, greatest_of(row.teacher, classes), weights.temperature);
    const LogSoftmax soft_student = softmax(row.student, q, classes, greatest, weights.temperature);
    const auto index = static_cast<std::size_t>(image);
    kls[index] = divergence(row, p, q, soft_teacher, soft_student, of_kl);
    const LogSoftmax plain = softmax(row.student, q, classes, greatest, 1.0f);
    const float sample_weight = targets.sample_weight == nullptr ? 1.0f : targets.sample_weight[image];
    const float scale = weights.cross_entropy * sample_weight / static_cast<float>(batch);
    const float term = targets.labels != nullptr ? hard_cross_entropy(row, targets.labels[image], q, plain, scale)
                                                 : soft_cross_entropy(row, targets.shares + offset, q, plain, scale);
    cross_entropies[index] = sample_weight * term;
  };
  const std::int64_t together = std::max<std::int64_t>(1, kBlock / std::max<std::int64_t>(1, classes));
  parallel_for(parallel, (batch + together - 1) / together, [&](std::int64_t first, std::int64_t last) {
    std::vector<float> softmaxes(static_cast<std::size_t>(2 * classes));
    for (std::int64_t image = first * together; image < std::min(last * together, batch); ++image) {
      run_row(image, softmaxes.data(), softmaxes.data() + classes);
    }
  });
  double sum_of_cross_entropy = 0.0, sum_of_kl = 0.0;
  for (const float term : cross_entropies) sum_of_cross_entropy += term;
  for (const float term : kls) sum_of_kl += term;
  *cross_entropy = static_cast<float>(sum_of_cross_entropy / static_cast<double>(batch));
  *kl = static_cast<float>(sum_of_kl / count);
  *loss =
      weights.cross_entropy * *cross_entropy + weights.distillation * weights.temperature * weights.temperature * *kl;
}

}  // namespace gdfq::cpu
