// Eq. 10: cross-entropy and T^2 KL(softmax(z_P / T) || softmax(z_Q / T)), with the gradient of z_Q.
//
// Bytes per element: 12 (two logits read, once from memory and then from the cache, one gradient written), with soft
// targets 16.
//
// Launch: one block takes one image and leaves its two terms; a second kernel of one block adds the images' terms in
// order. The block is as wide as there are classes, up to kThreads.
#include "distillation_loss.h"

#include "reduce.cuh"

namespace gdfq::cuda {
namespace {

// log softmax of a row, x / temperature - shift.
struct LogSoftmax {
  float temperature;
  float shift;

  __device__ float operator()(float x) const { return x / temperature - shift; }
};

__device__ LogSoftmax log_softmax(const float* row, std::int64_t classes, float temperature) {
  float greatest = Greatest::nothing();
  for (std::int64_t c = threadIdx.x; c < classes; c += blockDim.x) {
    greatest = Greatest::join(greatest, row[c] / temperature);
  }
  greatest = block_reduce<Greatest>(greatest);
  float sum = 0.0f;
  for (std::int64_t c = threadIdx.x; c < classes; c += blockDim.x) sum += expf(row[c] / temperature - greatest);
  return {temperature, greatest + logf(block_reduce<Sum>(sum))};
}

__global__ void __launch_bounds__(kThreads)
    rows_kernel(const float* student, const float* teacher, Targets targets, std::int64_t classes,
                DistillationWeights weights, float* cross_entropies, float* kls, float* gradient) {
  const std::int64_t row = blockIdx.x;
  const float batch = static_cast<float>(gridDim.x);
  const float count = weights.batchmean ? batch : batch * static_cast<float>(classes);
  student += row * classes;
  teacher += row * classes;
  gradient += row * classes;
  const float* shares = targets.shares == nullptr ? nullptr : targets.shares + row * classes;
  const std::int64_t label = shares == nullptr ? targets.labels[row] : 0;
  const bool valid = label >= 0 && label < classes;
  const float sample_weight = targets.sample_weight == nullptr ? 1.0f : targets.sample_weight[row];
  const LogSoftmax plain = log_softmax(student, classes, 1.0f);
  const LogSoftmax soft_student = log_softmax(student, classes, weights.temperature);
  const LogSoftmax soft_teacher = log_softmax(teacher, classes, weights.temperature);
  float total = 1.0f;  // of the target
  if (shares != nullptr) {
    float sum = 0.0f;
    for (std::int64_t c = threadIdx.x; c < classes; c += blockDim.x) sum += shares[c];
    total = block_reduce<Sum>(sum);
  }
  const float of_cross_entropy = weights.cross_entropy * sample_weight / batch;
  const float of_kl = weights.distillation * weights.temperature / count;
  float cross_entropy = 0.0f;
  float kl = 0.0f;
  for (std::int64_t c = threadIdx.x; c < classes; c += blockDim.x) {
    const float log_q = soft_student(student[c]);
    const float log_p = soft_teacher(teacher[c]);
    const float p = expf(log_p);
    kl += p * (log_p - log_q);
    const float log_student = plain(student[c]);
    const float target = shares != nullptr ? shares[c] : (c == label ? 1.0f : 0.0f);
    if (target != 0.0f) cross_entropy -= target * log_student;  // 0 log 0 is 0
    const float error = total * expf(log_student) - target;
    gradient[c] = valid ? of_cross_entropy * error + of_kl * (expf(log_q) - p) : NAN;
  }
  cross_entropy = block_reduce<Sum>(cross_entropy);
  kl = block_reduce<Sum>(kl);
  if (threadIdx.x != 0) return;
  cross_entropies[row] = valid ? sample_weight * cross_entropy : NAN;
  kls[row] = kl;
}

__global__ void __launch_bounds__(kThreads)
    add_kernel(const float* cross_entropies, const float* kls, std::int64_t batch, std::int64_t classes,
               DistillationWeights weights, float* loss, float* cross_entropy, float* kl) {
  float sum_of_cross_entropy = 0.0f;
  float sum_of_kl = 0.0f;
  for (std::int64_t i = threadIdx.x; i < batch; i += kThreads) {
    sum_of_cross_entropy += cross_entropies[i];
    sum_of_kl += kls[i];
  }
  sum_of_cross_entropy = block_reduce<Sum>(sum_of_cross_entropy);
  sum_of_kl = block_reduce<Sum>(sum_of_kl);
  if (threadIdx.x != 0) return;
  const float images = static_cast<float>(batch);
  const float count = weights.batchmean ? images : images * static_cast<float>(classes);
  *cross_entropy = sum_of_cross_entropy / images;
  *kl = sum_of_kl / count;
  *loss =
      weights.cross_entropy * *cross_entropy + weights.distillation * weights.temperature * weights.temperature * *kl;
}

}  // namespace

void distillation_loss(const float* student, const float* teacher, const Targets& targets, std::int64_t batch,
                       std::int64_t classes, const DistillationWeights& weights, float* loss, float* cross_entropy,
                       float* kl, float* gradient, const Device& device) {
  float* terms = nullptr;
  if (batch > 0) {
    terms = device.scratch(2 * batch);
    const std::int64_t threads = classes < kThreads ? ceil_divide(classes, kWarp) * kWarp : kThreads;
    GDFQ_LAUNCH(rows_kernel, dim3(static_cast<unsigned>(batch)), dim3(static_cast<unsigned>(threads)), device.stream,
                student, teacher, targets, classes, weights, terms, terms + batch, gradient);
  }
  GDFQ_LAUNCH(add_kernel, dim3(1), dim3(kThreads), device.stream, terms, terms + batch, batch, classes, weights, loss,
              cross_entropy, kl);
  check_launch("distillation_loss");
}

}  // namespace gdfq::cuda
