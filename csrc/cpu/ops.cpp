// The elementwise ops on the CPU: check, lay out, pick the loops, walk. What each op means stands in
// lesa_kernels/reference.py.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/pass.h"

namespace lesa::cpu {
namespace {

Tensor predict(const std::vector<Tensor>& history, const Tensor& weight, const Tensor& bias, const Tensor& gain) {
  check_predict("predict", history, weight, bias, gain);
  Tensor out = fresh_pages_like(history[0]);
  Pass pass;
  pass.add(out);
  for (const Tensor& feature : history) {
    pass.add(feature);
  }
  pass.lay_out("predict", shape_of(out));
  for_feature(out.scalar_type(), [&]<typename T>() {
    const auto w = read_parameter<T>(weight, 1, static_cast<std::int64_t>(history.size()));
    const accumulate_t<T> b = read_scalar<T>(bias), scale = read_scalar<T>(gain);
    const Rows<T> map{w.data(), &b, static_cast<int>(history.size()), 1, pass.past_cache()};
    const auto loop = chosen().of<T>().predict;
    parallel_walk(pass.geometry(), pass.streams(), 1,
                  [&](void* const* pointers, std::int64_t count) { loop(map, scale, pointers + 1, pointers, count); });
  });
  return out;
}

std::vector<Tensor> forecast(const std::vector<Tensor>& history, const Tensor& coefficients, const Tensor& offsets) {
  check_history("forecast", history);
  check_rows("forecast", coefficients, offsets, history.size(), {"history", 0}, history[0]);
  std::vector<Tensor> outputs;
  Pass pass;
  for (std::int64_t m = 0; m < coefficients.size(0); ++m) {
    outputs.push_back(fresh_pages_like(history[0]));
    pass.add(outputs.back());
  }
  for (const Tensor& feature : history) {
    pass.add(feature);
  }
  pass.lay_out("forecast", shape_of(history[0]));
  for_feature(history[0].scalar_type(), [&]<typename T>() { run_forecast<T>(pass, coefficients, offsets); });
  return outputs;
}

void forecast_into(const Tensor& ring, const Tensor& coefficients, const Tensor& offsets,
                   const std::vector<std::int64_t>& read, const std::vector<std::int64_t>& write) {
  check_forecast_into(ring, coefficients, offsets, read, write);
  Pass pass;
  for (const std::int64_t slot : write) {
    pass.add(source_of_slot(ring, slot), ring.element_size());
  }
  for (const std::int64_t slot : read) {
    pass.add(source_of_slot(ring, slot), ring.element_size());
  }
  pass.lay_out("forecast_into", slot_shape(ring));
  for_feature(ring.scalar_type(), [&]<typename T>() { run_forecast<T>(pass, coefficients, offsets); });
}

// Converts by way of float32, as Tensor.copy_ does.
template <typename From, typename To>
void convert(const From* from, To* to, std::int64_t count) {
  if constexpr (std::is_same_v<From, float>) {
    chosen().of<To>().from_float(from, to, count);
  } else if constexpr (std::is_same_v<To, float>) {
    chosen().of<From>().to_float(from, to, count);
  } else {
    constexpr std::int64_t kPart = 1024;
    float part[kPart];
    for (std::int64_t i = 0; i < count; i += kPart) {
      const std::int64_t length = std::min(kPart, count - i);
      chosen().of<From>().to_float(from + i, part, length);
      chosen().of<To>().from_float(part, to + i, length);
    }
  }
}

template <typename From, typename To>
void run_push(const Pass& pass) {
  parallel_walk(pass.geometry(), pass.streams(), 1, [](void* const* pointers, std::int64_t count) {
    if constexpr (std::is_same_v<From, To>) {
      std::memmove(pointers[0], pointers[1], count * sizeof(To));
    } else {
      convert(static_cast<const From*>(pointers[1]), static_cast<To*>(pointers[0]), count);
    }
  });
}

void push(const Tensor& ring, const Tensor& feature, std::int64_t slot) {
  check_push(ring, feature, slot);
  Pass pass;
  pass.add(source_of_slot(ring, slot), ring.element_size());
  pass.add(feature);
  pass.lay_out("push", slot_shape(ring));
  check_overlap("push", {"feature"}, pass.geometry(), pass.operand(0), ring.element_size(), pass.operand(1),
                feature.element_size());
  for_feature(ring.scalar_type(), [&]<typename To>() {
    for_feature(feature.scalar_type(), [&]<typename From>() { run_push<From, To>(pass); });
  });
}

}  // namespace
}  // namespace lesa::cpu

STABLE_TORCH_LIBRARY_IMPL(lesa, CPU, m) {
  m.impl("predict", TORCH_BOX(&lesa::cpu::predict));
  m.impl("forecast", TORCH_BOX(&lesa::cpu::forecast));
  m.impl("forecast_into", TORCH_BOX(&lesa::cpu::forecast_into));
  m.impl("push", TORCH_BOX(&lesa::cpu::push));
}
