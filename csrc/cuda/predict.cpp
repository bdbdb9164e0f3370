// predict, predict_backward and predict_l1 on CUDA: check, allocate, launch. What each op means stands in
// lesa_kernels/ops/predict.py.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/cuda_common.h"

namespace lesa::cuda {
namespace {

// The arguments of predict.
struct Arguments {
  const std::vector<Tensor>& history;
  const Tensor& weight;
  const Tensor& bias;
  const Tensor& gain;

  template <typename T>
  LinearMap<T> map() const {
    return {parameter_of<T>(weight), parameter_of<T>(bias), parameter_of<T>(gain)};
  }
};

Tensor predict(const std::vector<Tensor>& history, const Tensor& weight, const Tensor& bias, const Tensor& gain) {
  check_predict("predict", history, weight, bias, gain);
  const DeviceGuard guard(history[0].get_device_index());
  const Target target = target_of("predict", history[0]);
  Tensor out = fresh_like(history[0]);
  std::vector<TensorView> views = views_of(history);
  views.push_back(view_of(out));
  const Tensors tensors = merge_tensors("predict", shape_of(out), views, history.size());
  for_feature(out.scalar_type(), [&]<typename T>() {
    ForecastKernels<T>::combine(tensors, Arguments{history, weight, bias, gain}.map<T>(), target);
  });
  return out;
}

// What a reduction writes.
struct Outputs {
  Tensor weight, bias, gain;
  std::optional<Tensor> loss, factors;

  explicit Outputs(const Arguments& like)
      : weight(fresh_like(like.weight)), bias(fresh_like(like.bias)), gain(fresh_like(like.gain)) {}
};

float* floats_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<float*>(tensor->data_ptr()) : nullptr;
}

// Reduces the history and `other`, which is the forecast's gradient, or the target if a loss is wanted.
template <typename T>
void reduce(const Arguments& arguments, const Tensor& other, const std::optional<Tensor>& forecast,
            const Outputs& outputs, const Target& target) {
  std::vector<TensorView> views = views_of(arguments.history);
  views.push_back(view_of(other));
  if (forecast) {
    views.push_back(view_of(*forecast));
  }
  const Tensors tensors = merge_tensors(target.op, shape_of(other), views, arguments.history.size());
  const Tensor workspace = fresh(other, {PredictKernels<T>::workspace(tensors.num_inputs, target)}, ScalarType::Double);
  const Gradients gradients{result_of(outputs.weight), result_of(outputs.bias), result_of(outputs.gain),
                            floats_of(outputs.loss), floats_of(outputs.factors)};
  PredictKernels<T>::reduce(tensors, arguments.map<T>(), static_cast<double*>(workspace.data_ptr()), gradients, target);
}

// d history[k] = factors[k] * grad: a forecast from grad alone.
template <typename T>
std::vector<Tensor> history_gradients(const Tensor& grad, std::size_t count, float* factors, const Target& target) {
  std::vector<Tensor> gradients;
  std::vector<TensorView> views = views_of({grad});
  for (std::size_t k = 0; k < count; ++k) {
    gradients.push_back(fresh_like(grad));
    views.push_back(view_of(gradients.back()));
  }
  const LinearMap<T> map{{factors, 1, 0, true}, {factors + count, 0, 0, true}, {}};
  ForecastKernels<T>::combine(merge_tensors(target.op, shape_of(grad), views, 1), map, target);
  return gradients;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor> predict_backward(const Tensor& grad,
                                                                         const std::vector<Tensor>& history,
                                                                         const Tensor& weight, const Tensor& bias,
                                                                         const Tensor& gain, bool history_needs_grad) {
  const char* op = "predict_backward";
  check_predict(op, history, weight, bias, gain);
  check_like(op, {"grad"}, grad, {"history", 0}, history[0]);
  const DeviceGuard guard(grad.get_device_index());
  const Target target = target_of(op, grad);
  const Arguments arguments{history, weight, bias, gain};
  Outputs outputs(arguments);
  std::vector<Tensor> of_history;
  for_feature(grad.scalar_type(), [&]<typename T>() {
    if (history_needs_grad) {
      outputs.factors = fresh(grad, {static_cast<std::int64_t>(history.size()) + 1}, ScalarType::Float);
    }
    reduce<T>(arguments, grad, std::nullopt, outputs, target);
    if (history_needs_grad) {
      of_history = history_gradients<T>(grad, history.size(), floats_of(outputs.factors), target);
    }
  });
  return {std::move(of_history), outputs.weight, outputs.bias, outputs.gain};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> predict_l1(const std::vector<Tensor>& history, const Tensor& truth,
                                                      const Tensor& weight, const Tensor& bias, const Tensor& gain,
                                                      std::optional<Tensor> out) {
  check_predict_l1(history, truth, weight, bias, gain, out);
  const DeviceGuard guard(truth.get_device_index());
  const Target target = target_of("predict_l1", truth);
  const Arguments arguments{history, weight, bias, gain};
  Outputs outputs(arguments);
  outputs.loss = fresh(truth, {}, ScalarType::Float);
  for_feature(truth.scalar_type(), [&]<typename T>() { reduce<T>(arguments, truth, out, outputs, target); });
  return {*outputs.loss, outputs.weight, outputs.bias, outputs.gain};
}

}  // namespace
}  // namespace lesa::cuda

STABLE_TORCH_LIBRARY_IMPL(lesa, CUDA, m) {
  m.impl("predict", TORCH_BOX(&lesa::cuda::predict));
  m.impl("predict_backward", TORCH_BOX(&lesa::cuda::predict_backward));
  m.impl("predict_l1", TORCH_BOX(&lesa::cuda::predict_l1));
}
