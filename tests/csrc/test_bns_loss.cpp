// Eq. 5 over several layers, against its expression in float64.
#include "kernels/bns_loss.h"

#include "testing.h"

using namespace gdfq;
using namespace gdfq::cpu;
using namespace gdfq::testing;

namespace {

void test_against_oracle(const std::vector<std::int64_t>& channels, bool average) {
  std::vector<std::vector<float>> values;
  std::int64_t all = 0;
  for (const std::int64_t count : channels) {
    for (unsigned k = 0; k < 4; ++k) values.push_back(random_values(count, static_cast<unsigned>(values.size())));
    all += count;
  }
  std::vector<LayerStatistics> layers;
  for (std::size_t l = 0; l < channels.size(); ++l) {
    const auto* of_layer = &values[4 * l];
    layers.push_back({of_layer[0].data(), of_layer[1].data(), of_layer[2].data(), of_layer[3].data(), channels[l]});
  }
  float loss = -1.0f;
  std::vector<float> gradient(static_cast<std::size_t>(2 * all), -1.0f);
  bns_loss(layers, average, &loss, gradient.data(), kSerial);

  double expected = 0.0;
  std::size_t place = 0;
  for (const LayerStatistics& layer : layers) {
    const double divisor = average ? static_cast<double>(layer.channels) * static_cast<double>(layers.size()) : 1.0;
    for (std::int64_t c = 0; c < layer.channels; ++c, ++place) {
      const double mean = static_cast<double>(layer.mean[c]) - static_cast<double>(layer.running_mean[c]);
      const double variance = static_cast<double>(layer.variance[c]) - static_cast<double>(layer.running_var[c]);
      expected += (mean * mean + variance * variance) / divisor;
      CHECK(close(gradient[place], 2.0 * mean / divisor, 1e-6));
      CHECK(close(gradient[place + static_cast<std::size_t>(all)], 2.0 * variance / divisor, 1e-6));
    }
  }
  CHECK(close(loss, expected, 1e-5));
}

}  // namespace

int main() {
  for (const bool average : {false, true}) {
    test_against_oracle({1}, average);
    test_against_oracle({15, 16, 17, 64, 3}, average);
  }
}
