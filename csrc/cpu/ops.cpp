// The ops on the CPU: check, lay out, pick the loops, walk. What each op means stands in lesa_kernels/reference.py.
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "contract.h"
#include "cpu/isa.h"
#include "cpu/walk.h"

namespace lesa::cpu {
namespace {

static_assert(kMaxHistory == kMaxInputs && kMaxForecasts == kMaxRows && kMaxHistory + kMaxForecasts == kMaxStreams);

// The tensors of one elementwise pass in the order in which the loops take them: outputs first.
class Pass {
 public:
  void add(Source source, std::size_t bytes) {
    sources_[count_] = source;
    streams_[count_++].bytes = static_cast<std::int64_t>(bytes);
  }

  void add(const Tensor& tensor) { add(source_of(tensor), tensor.element_size()); }

  // Merges dimensions; to be called once all tensors are in.
  void lay_out(const char* op, Shape shape) {
    geometry_ = lesa::lay_out(op, shape, {sources_.data(), count_}, operands_);
    for (std::size_t i = 0; i < count_; ++i) {
      streams_[i].data = static_cast<char*>(operands_[i].data);
      streams_[i].strides = operands_[i].strides;
    }
  }

  const Operand& operand(std::size_t index) const { return operands_[index]; }
  const Geometry& geometry() const { return geometry_; }
  std::span<const Stream> streams() const { return {streams_.data(), count_}; }

 private:
  std::size_t count_ = 0;
  Geometry geometry_;
  std::array<Source, kMaxStreams> sources_;
  std::array<Operand, kMaxStreams> operands_;
  std::array<Stream, kMaxStreams> streams_;
};

// Calls body.operator()<T>() for the features' type; the checks have admitted no other.
template <typename Body>
void for_feature(ScalarType dtype, Body&& body) {
  for_dtype<float, float16, bfloat16, double>(dtype, body);
}

template <typename T>
std::vector<accumulate_t<T>> read_parameter(const Tensor& tensor, std::int64_t rows, std::int64_t columns) {
  const auto parameter = parameter_of<T>(tensor);
  std::vector<accumulate_t<T>> values;
  values.reserve(rows * columns);
  for (std::int64_t m = 0; m < rows; ++m) {
    for (std::int64_t k = 0; k < columns; ++k) {
      values.push_back(parameter.at(m, k));
    }
  }
  return values;
}

template <typename T>
accumulate_t<T> read_scalar(const Tensor& tensor) {
  return parameter_of<T>(tensor).at(0, 0);
}

template <typename T>
bool past_cache(const Pass& pass, std::int64_t rows) {
  return pass.geometry().numel * rows * static_cast<std::int64_t>(sizeof(T)) >= kPastCacheBytes;
}

// Runs M rows over a pass of M outputs and K inputs.
template <typename T>
void run_forecast(const Pass& pass, const Rows<T>& map) {
  const auto forecast = chosen().of<T>().forecast;
  parallel_walk(pass.geometry(), pass.streams(), map.rows, [&](void* const* pointers, std::int64_t count) {
    forecast(map, pointers + map.rows, pointers, count);
  });
}

template <typename T>
void run_forecast(const Pass& pass, const Tensor& coefficients, const Tensor& offsets) {
  const std::int64_t rows = coefficients.size(0), inputs = coefficients.size(1);
  const auto c = read_parameter<T>(coefficients, rows, inputs);
  const auto d = read_parameter<T>(offsets, 1, rows);
  run_forecast<T>(pass,
                  {c.data(), d.data(), static_cast<int>(inputs), static_cast<int>(rows), past_cache<T>(pass, rows)});
}

Tensor predict(const std::vector<Tensor>& history, const Tensor& weight, const Tensor& bias, const Tensor& gain) {
  check_predict("predict", history, weight, bias, gain);
  Tensor out = fresh_like(history[0]);
  Pass pass;
  pass.add(out);
  for (const Tensor& feature : history) {
    pass.add(feature);
  }
  pass.lay_out("predict", shape_of(out));
  for_feature(out.scalar_type(), [&]<typename T>() {
    const auto w = read_parameter<T>(weight, 1, static_cast<std::int64_t>(history.size()));
    const accumulate_t<T> b = read_scalar<T>(bias), scale = read_scalar<T>(gain);
    const Rows<T> map{w.data(), &b, static_cast<int>(history.size()), 1, past_cache<T>(pass, 1)};
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
    outputs.push_back(fresh_like(history[0]));
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

// Elements that one partial sum covers: fixed, so that sums do not depend on the number of threads.
constexpr std::int64_t kSummed = 8192;

// Returns S_k = sum(grad * history[k]) for k < K, then S_b = sum(grad), from partial sums added in order.
template <typename T>
std::vector<double> sums_with(const Pass& pass) {
  const std::size_t inputs = pass.streams().size() - 1;
  const std::int64_t parts = (pass.geometry().numel + kSummed - 1) / kSummed;
  std::vector<double> partial(parts * (inputs + 1), 0.0), sums(inputs + 1, 0.0);
  const Kernels<T>& loops = chosen().of<T>();
  parallel_blocks(pass.streams(), parts, kSummed, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t part = first; part < last; ++part) {
      double* into = partial.data() + part * (inputs + 1);
      const std::int64_t end = std::min((part + 1) * kSummed, pass.geometry().numel);
      walk(pass.geometry(), pass.streams(), 0, part * kSummed, end, [&](void* const* pointers, std::int64_t count) {
        const auto* grad = static_cast<const T*>(pointers[inputs]);
        for (std::size_t k = 0; k < inputs; ++k) {
          into[k] += loops.dot(grad, static_cast<const T*>(pointers[k]), count);
        }
        into[inputs] += loops.sum(grad, count);
      });
    }
  });
  for (std::int64_t part = 0; part < parts; ++part) {
    for (std::size_t k = 0; k <= inputs; ++k) {
      sums[k] += partial[part * (inputs + 1) + k];
    }
  }
  return sums;
}

// Writes values into a fresh tensor of a parameter's shape and dtype (float32 or T).
template <typename T>
Tensor parameter_gradient(const Tensor& parameter, std::span<const double> values) {
  Tensor gradient = fresh_like(parameter);
  for (std::size_t k = 0; k < values.size(); ++k) {
    if (gradient.scalar_type() == ScalarType::Float) {
      static_cast<float*>(gradient.data_ptr())[k] = static_cast<float>(values[k]);
    } else {
      static_cast<T*>(gradient.data_ptr())[k] = narrow<T>(static_cast<accumulate_t<T>>(values[k]));
    }
  }
  return gradient;
}

// history[k] enters the forecast with gain * weight[k], the newest with 1 more: its gradient is a forecast from grad.
template <typename T>
std::vector<Tensor> history_gradients(const Tensor& grad, std::span<const accumulate_t<T>> weight,
                                      accumulate_t<T> gain) {
  std::vector<accumulate_t<T>> factors, zeros(weight.size(), 0);
  std::vector<Tensor> gradients;
  Pass pass;
  for (std::size_t k = 0; k < weight.size(); ++k) {
    factors.push_back(gain * weight[k] + (k + 1 == weight.size() ? 1 : 0));
    gradients.push_back(fresh_like(grad));
    pass.add(gradients.back());
  }
  pass.add(grad);
  pass.lay_out("predict_backward", shape_of(grad));
  const int rows = static_cast<int>(weight.size());
  run_forecast<T>(pass, {factors.data(), zeros.data(), 1, rows, past_cache<T>(pass, rows)});
  return gradients;
}

using Gradients = std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor>;

// The pass holds the history, then grad.
template <typename T>
Gradients gradients(const Pass& pass, const Tensor& grad, const Tensor& weight, const Tensor& bias, const Tensor& gain,
                    bool history_needs_grad) {
  const std::size_t inputs = pass.streams().size() - 1;
  const auto w = read_parameter<T>(weight, 1, static_cast<std::int64_t>(inputs));
  const accumulate_t<T> b = read_scalar<T>(bias), scale = read_scalar<T>(gain);
  std::vector<double> sums = sums_with<T>(pass);
  double for_gain = b * sums[inputs];
  for (std::size_t k = 0; k < inputs; ++k) {
    for_gain += w[k] * sums[k];
  }
  for (double& sum : sums) {
    sum *= scale;
  }
  const std::span<const double> scaled(sums);
  return {history_needs_grad ? history_gradients<T>(grad, w, scale) : std::vector<Tensor>{},
          parameter_gradient<T>(weight, scaled.first(inputs)), parameter_gradient<T>(bias, scaled.last(1)),
          parameter_gradient<T>(gain, {&for_gain, 1})};
}

Gradients predict_backward(const Tensor& grad, const std::vector<Tensor>& history, const Tensor& weight,
                           const Tensor& bias, const Tensor& gain, bool history_needs_grad) {
  check_predict("predict_backward", history, weight, bias, gain);
  check_like("predict_backward", {"grad"}, grad, {"history", 0}, history[0]);
  Pass pass;
  for (const Tensor& feature : history) {
    pass.add(feature);
  }
  pass.add(grad);
  pass.lay_out("predict_backward", shape_of(grad));
  std::optional<Gradients> result;
  for_feature(grad.scalar_type(),
              [&]<typename T>() { result = gradients<T>(pass, grad, weight, bias, gain, history_needs_grad); });
  return *std::move(result);
}

}  // namespace
}  // namespace lesa::cpu

STABLE_TORCH_LIBRARY_IMPL(lesa, CPU, m) {
  m.impl("predict", TORCH_BOX(&lesa::cpu::predict));
  m.impl("predict_backward", TORCH_BOX(&lesa::cpu::predict_backward));
  m.impl("forecast", TORCH_BOX(&lesa::cpu::forecast));
  m.impl("forecast_into", TORCH_BOX(&lesa::cpu::forecast_into));
  m.impl("push", TORCH_BOX(&lesa::cpu::push));
}
