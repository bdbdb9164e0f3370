// The ops that forecast and move features: check, lay out, launch. What each op means stands in
// lesa_kernels/reference.py.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

#include "cuda/entry.h"

namespace lesa::cuda {
namespace {

// Runs out[m] = sum_k coefficients[m, k] * in[k] + offsets[m] on the sources, K inputs and then the outputs; with a
// gain, predict.
void run(const char* op, const Tensor& like, Shape shape, const std::vector<Source>& sources, std::size_t inputs,
         const Tensor& coefficients, const Tensor& offsets, const Tensor* gain) {
  const DeviceGuard guard(like.get_device_index());
  const Target target = target_of(op, like);
  for_feature(like.scalar_type(), [&]<typename T>() {
    Combination<T> combination{};
    combination.operands.resize(sources.size());
    combination.geometry = lay_out(op, shape, sources, combination.operands);
    combination.num_inputs = static_cast<int>(inputs);
    combination.coefficients = parameter_of<T>(coefficients);
    combination.offsets = parameter_of<T>(offsets);
    if (gain != nullptr) {
      combination.gain = parameter_of<T>(*gain);
    }
    combine(combination, target);
  });
}

Tensor predict(const std::vector<Tensor>& history, const Tensor& weight, const Tensor& bias, const Tensor& gain) {
  check_predict("predict", history, weight, bias, gain);
  Tensor out = fresh_like(history[0]);
  std::vector<Source> sources = sources_of(history);
  sources.push_back(source_of(out));
  run("predict", out, shape_of(out), sources, history.size(), weight, bias, &gain);
  return out;
}

std::vector<Tensor> forecast(const std::vector<Tensor>& history, const Tensor& coefficients, const Tensor& offsets) {
  check_history("forecast", history);
  check_rows("forecast", coefficients, offsets, history.size(), {"history", 0}, history[0]);
  std::vector<Source> sources = sources_of(history);
  std::vector<Tensor> outputs;
  outputs.reserve(coefficients.size(0));
  for (std::int64_t m = 0; m < coefficients.size(0); ++m) {
    outputs.push_back(fresh_like(history[0]));
    sources.push_back(source_of(outputs.back()));
  }
  run("forecast", history[0], shape_of(history[0]), sources, history.size(), coefficients, offsets, nullptr);
  return outputs;
}

void forecast_into(const Tensor& ring, const Tensor& coefficients, const Tensor& offsets,
                   const std::vector<std::int64_t>& read, const std::vector<std::int64_t>& write) {
  check_forecast_into(ring, coefficients, offsets, read, write);
  std::vector<Source> sources = sources_of({});
  for (const std::int64_t slot : read) {
    sources.push_back(source_of_slot(ring, slot));
  }
  for (const std::int64_t slot : write) {
    sources.push_back(source_of_slot(ring, slot));
  }
  run("forecast_into", ring, slot_shape(ring), sources, read.size(), coefficients, offsets, nullptr);
}

void push(const Tensor& ring, const Tensor& feature, std::int64_t slot) {
  check_push(ring, feature, slot);
  const Source sources[] = {source_of_slot(ring, slot), source_of(feature)};
  Operand operands[2];
  const Geometry geometry = lay_out("push", slot_shape(ring), sources, operands);
  const auto& [to, from] = operands;
  check_overlap("push", {"feature"}, geometry, to, ring.element_size(), from, feature.element_size());
  const DeviceGuard guard(ring.get_device_index());
  const Target target = target_of("push", ring);
  for_feature(ring.scalar_type(), [&]<typename To>() {
    for_feature(feature.scalar_type(), [&]<typename From>() { copy<To, From>(geometry, to, from, target); });
  });
}

}  // namespace
}  // namespace lesa::cuda

STABLE_TORCH_LIBRARY_IMPL(lesa, CUDA, m) {
  m.impl("predict", TORCH_BOX(&lesa::cuda::predict));
  m.impl("forecast", TORCH_BOX(&lesa::cuda::forecast));
  m.impl("forecast_into", TORCH_BOX(&lesa::cuda::forecast_into));
  m.impl("push", TORCH_BOX(&lesa::cuda::push));
}
