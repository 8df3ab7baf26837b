#pragma once

#include "device.h"

namespace gdfq::cuda {

struct DistillationWeights {
  float temperature;
  float cross_entropy;
  float distillation;
  bool batchmean;  // KL divided by the batch, not by batch and classes
};

// Logits and gradient are (batch, classes), labels (batch); the three losses are one float each.
void distillation_loss(const float* student, const float* teacher, const std::int64_t* labels, std::int64_t batch,
                       std::int64_t classes, const DistillationWeights& weights, float* loss, float* cross_entropy,
                       float* kl, float* gradient, const Device& device);

}  // namespace gdfq::cuda
