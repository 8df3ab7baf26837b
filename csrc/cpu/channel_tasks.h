// Weights by output channel, many layers in one parallel loop.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "channels.h"

namespace gdfq::cpu {

// Some channels of one weight, about kBlock elements.
template <class Weight>
struct ChannelTask {
  const Weight* weight;
  std::int64_t first;
  std::int64_t last;
};

template <class Weight>
std::vector<ChannelTask<Weight>> channel_tasks(const std::vector<Weight>& weights) {
  std::vector<ChannelTask<Weight>> tasks;
  for (const Weight& weight : weights) {
    if (weight.length == 0) continue;
    const std::int64_t together = std::max<std::int64_t>(1, kBlock / weight.length);
    for (std::int64_t first = 0; first < weight.channels; first += together) {
      tasks.push_back({&weight, first, std::min(first + together, weight.channels)});
    }
  }
  return tasks;
}

}  // namespace gdfq::cpu
