#pragma once

#include <cstdint>

#include "kernel.h"

namespace gdfq {

struct DistillationWeights {
  float temperature;
  float cross_entropy;
  float distillation;
  bool batchmean;  // KL divided by the batch, not by batch and classes
};

// What the student's classes should be: a label for each image, or a share for each class of each image.
struct Targets {
  const std::int64_t* labels;  // null: shares
  const float* shares;
  const float* sample_weight;  // of each image's cross-entropy; null: 1
};

// Logits, gradient and shares are (batch, classes), labels and sample_weight (batch); the three losses are one float
// each.
GDFQ_KERNEL(distillation_loss, const float* student, const float* teacher, const Targets& targets, std::int64_t batch,
            std::int64_t classes, const DistillationWeights& weights, float* loss, float* cross_entropy, float* kl,
            float* gradient)

}  // namespace gdfq
