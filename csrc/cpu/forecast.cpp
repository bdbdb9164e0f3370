// forecast, forecast_into and push on the CPU: check, iterate. What each op means stands in
// lesa_kernels/ops/forecast.py.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/cpu_common.h"

namespace lesa::cpu {
namespace {

void run_rows(const TensorIterator& iterator, const Tensor& like, const Tensor& coefficients, const Tensor& offsets) {
  for_feature(like.scalar_type(), [&]<typename T>() {
    const std::int64_t rows = coefficients.size(0), inputs = coefficients.size(1);
    const auto c = read_parameter<T>(coefficients, rows, inputs);
    const auto d = read_parameter<T>(offsets, 1, rows);
    run_forecast<T>(iterator,
                    {c.data(), d.data(), static_cast<int>(inputs), static_cast<int>(rows), iterator.streaming()});
  });
}

std::vector<Tensor> forecast(const std::vector<Tensor>& history, const Tensor& coefficients, const Tensor& offsets) {
  check_history("forecast", history);
  check_rows("forecast", coefficients, offsets, history.size(), {"history", 0}, history[0]);
  std::vector<Tensor> outputs;
  TensorIterator iterator;
  for (std::int64_t m = 0; m < coefficients.size(0); ++m) {
    outputs.push_back(fresh_pages_like(history[0]));
    iterator.add_output(outputs.back());
  }
  iterator.add_inputs(history);
  iterator.build("forecast", shape_of(history[0]));
  run_rows(iterator, history[0], coefficients, offsets);
  return outputs;
}

void forecast_into(const Tensor& ring, const Tensor& coefficients, const Tensor& offsets,
                   const std::vector<std::int64_t>& read, const std::vector<std::int64_t>& write) {
  check_forecast_into(ring, coefficients, offsets, read, write);
  TensorIterator iterator;
  for (const std::int64_t slot : write) {
    iterator.add_output(view_of_slot(ring, slot));
  }
  for (const std::int64_t slot : read) {
    iterator.add_input(view_of_slot(ring, slot));
  }
  iterator.build("forecast_into", slot_shape(ring));
  run_rows(iterator, ring, coefficients, offsets);
}

void push(const Tensor& ring, const Tensor& feature, std::int64_t slot) {
  check_push(ring, feature, slot);
  TensorIterator iterator;
  iterator.add_output(view_of_slot(ring, slot));
  iterator.add_input(feature);
  iterator.build("push", slot_shape(ring));
  for_feature(ring.scalar_type(), [&]<typename To>() {
    for_feature(feature.scalar_type(), [&]<typename From>() { run_copy<From, To>(iterator); });
  });
}

}  // namespace
}  // namespace lesa::cpu

STABLE_TORCH_LIBRARY_IMPL(lesa, CPU, m) {
  m.impl("forecast", TORCH_BOX(&lesa::cpu::forecast));
  m.impl("forecast_into", TORCH_BOX(&lesa::cpu::forecast_into));
  m.impl("push", TORCH_BOX(&lesa::cpu::push));
}
