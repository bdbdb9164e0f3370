// Checks of the ops' arguments, once, at the op's boundary: the same contract in the same words as in lesa_kernels/ops,
// which tests/ops/test_refusals.py compares. A refusal says the op, the argument, what is required and what came.
// Letters: K history length, M forecasts.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "arithmetic.h"
#include "overlap.h"
#include "strides.h"

namespace lesa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr std::int64_t kMaxHistory = 64;
inline constexpr std::int64_t kMaxForecasts = 64;

// An argument as messages name it: `weight`, or `history[2]` where it has an index.
struct Name {
  const char* text;
  std::int64_t index = -1;
};

struct Shape {
  const std::int64_t* sizes;
  std::size_t dims;
};

inline std::ostream& operator<<(std::ostream& out, Name name) {
  out << name.text;
  return name.index < 0 ? out : out << '[' << name.index << ']';
}

inline std::ostream& operator<<(std::ostream& out, Shape shape) {
  out << '(';
  for (std::size_t d = 0; d < shape.dims; ++d) {
    out << (d ? ", " : "") << shape.sizes[d];
  }
  return out << (shape.dims == 1 ? ",)" : ")");
}

inline Shape shape_of(const Tensor& tensor) { return {tensor.sizes().data(), tensor.sizes().size()}; }

// Throws what Python sees as RuntimeError. Not STD_TORCH_CHECK: it would put the place in our source before the
// message.
template <typename... Parts>
[[noreturn]] void refuse(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "lesa::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A dtype as Python names it.
inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: break;  // Python's name is torch's own in small letters, as in float8_e4m3fn
  }
  std::string name = torch::headeronly::toString(dtype);
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
  return name;
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu() || tensor.device().type() == torch::headeronly::DeviceType::Meta) {
    return tensor.is_cpu() ? "cpu" : "meta";
  }
  const auto index = std::to_string(tensor.get_device_index());
  return tensor.is_cuda() ? "cuda:" + index
                          : "device type " + std::to_string(static_cast<int>(tensor.device().type())) + ":" + index;
}

// Which ScalarType a C++ type stands for.
template <typename T>
inline constexpr ScalarType dtype_of = ScalarType::Undefined;
template <>
inline constexpr ScalarType dtype_of<float> = ScalarType::Float;
template <>
inline constexpr ScalarType dtype_of<float16> = ScalarType::Half;
template <>
inline constexpr ScalarType dtype_of<bfloat16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType dtype_of<double> = ScalarType::Double;
// Calls body.operator()<T>() for the one of Types that dtype stands for; false if it is none of them.
template <typename... Types, typename Body>
bool for_dtype(ScalarType dtype, Body&& body) {
  return ((dtype == dtype_of<Types> ? (body.template operator()<Types>(), true) : false) || ...);
}

// A tensor and its name.
struct Argument {
  Name name;
  const Tensor& tensor;
};

// Python's None arrives as a tensor that is not there.
inline void check_defined(const char* op, std::initializer_list<Argument> arguments) {
  for (const Argument& argument : arguments) {
    if (!argument.tensor.defined()) {
      refuse(op, argument.name, " must be a tensor, got None");
    }
  }
}

// float64 has kernels on the CPU only.
inline void check_feature(const char* op, Name name, const Tensor& tensor) {
  check_defined(op, {{name, tensor}});
  const ScalarType dtype = tensor.scalar_type();
  const bool common = dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  if (!common && !(dtype == ScalarType::Double && tensor.is_cpu())) {
    refuse(op, name, " must have a dtype of float32, float16, bfloat16", tensor.is_cpu() ? ", float64" : "", ", got ",
           dtype_name(dtype));
  }
}

inline void check_device(const char* op, Name name, const Tensor& tensor, Name like_name, const Tensor& like) {
  if (!(tensor.device() == like.device())) {
    refuse(op, name, " must be on ", device_name(like), " like ", like_name, ", got ", device_name(tensor));
  }
}

inline bool same_sizes(Shape a, Shape b) { return std::equal(a.sizes, a.sizes + a.dims, b.sizes, b.sizes + b.dims); }

inline void check_like(const char* op, Name name, const Tensor& tensor, Name like_name, const Tensor& like) {
  check_defined(op, {{name, tensor}});
  if (!same_sizes(shape_of(tensor), shape_of(like))) {
    refuse(op, name, " must have shape ", shape_of(like), " like ", like_name, ", got ", shape_of(tensor));
  }
  if (tensor.scalar_type() != like.scalar_type()) {
    refuse(op, name, " must have dtype ", dtype_name(like.scalar_type()), " like ", like_name, ", got ",
           dtype_name(tensor.scalar_type()));
  }
  check_device(op, name, tensor, like_name, like);
}

// 1 to kMaxHistory features of one shape, dtype and device.
inline void check_features(const char* op, const char* name, const std::vector<Tensor>& features) {
  if (features.empty() || features.size() > kMaxHistory) {
    refuse(op, name, " must hold 1 to ", kMaxHistory, " tensors, got ", features.size());
  }
  check_feature(op, {name, 0}, features[0]);
  for (std::size_t k = 1; k < features.size(); ++k) {
    check_like(op, {name, static_cast<std::int64_t>(k)}, features[k], {name, 0}, features[0]);
  }
}

inline void check_history(const char* op, const std::vector<Tensor>& history) {
  check_features(op, "history", history);
}

// A parameter is float32 or of the features' dtype, each on its own.
inline void check_parameter(const char* op, Name name, const Tensor& tensor, Name like_name, const Tensor& like) {
  const ScalarType dtype = tensor.scalar_type(), features = like.scalar_type();
  if (dtype != ScalarType::Float && dtype != features) {
    refuse(op, name, " must have dtype float32", features == ScalarType::Float ? "" : " or " + dtype_name(features),
           " (", like_name, "'s), got ", dtype_name(dtype));
  }
  check_device(op, name, tensor, like_name, like);
}

inline void check_vector(const char* op, Name name, const Tensor& tensor, std::int64_t size, Name like_name,
                         const Tensor& like) {
  if (tensor.dim() != 1 || tensor.size(0) != size) {
    refuse(op, name, " must have shape ", Shape{&size, 1}, ", got ", shape_of(tensor));
  }
  check_parameter(op, name, tensor, like_name, like);
}

inline void check_shaped(const char* op, Name name, const Tensor& tensor, Shape shape, Name like_name,
                         const Tensor& like) {
  if (!same_sizes(shape_of(tensor), shape)) {
    refuse(op, name, " must have shape ", shape, ", got ", shape_of(tensor));
  }
  check_parameter(op, name, tensor, like_name, like);
}

// A scalar may have any shape of one element.
inline void check_scalar(const char* op, Name name, const Tensor& tensor, Name like_name, const Tensor& like) {
  if (tensor.numel() != 1) {
    refuse(op, name, " must hold one element, got shape ", shape_of(tensor));
  }
  check_parameter(op, name, tensor, like_name, like);
}

inline void check_predict(const char* op, const std::vector<Tensor>& history, const Tensor& weight, const Tensor& bias,
                          const Tensor& gain) {
  check_defined(op, {{{"weight"}, weight}, {{"bias"}, bias}, {{"gain"}, gain}});
  check_history(op, history);
  check_vector(op, {"weight"}, weight, static_cast<std::int64_t>(history.size()), {"history", 0}, history[0]);
  check_scalar(op, {"bias"}, bias, {"history", 0}, history[0]);
  check_scalar(op, {"gain"}, gain, {"history", 0}, history[0]);
}

// coefficients [M, K] and offsets [M] for K inputs.
inline void check_rows(const char* op, const Tensor& coefficients, const Tensor& offsets, std::size_t inputs,
                       Name like_name, const Tensor& like) {
  check_defined(op, {{{"coefficients"}, coefficients}, {{"offsets"}, offsets}});
  if (coefficients.dim() != 2 || coefficients.size(1) != static_cast<std::int64_t>(inputs)) {
    refuse(op, "coefficients must have shape (M, ", inputs, "), got ", shape_of(coefficients));
  }
  const std::int64_t rows = coefficients.size(0);
  if (rows < 1 || rows > kMaxForecasts) {
    refuse(op, "coefficients must have 1 to ", kMaxForecasts, " rows, got ", rows);
  }
  check_parameter(op, {"coefficients"}, coefficients, like_name, like);
  check_vector(op, {"offsets"}, offsets, rows, like_name, like);
}

// A tensor is written, so no two of its elements may share memory, as those of expand and unfold do. A layout that only
// as_strided makes, of strides that the smaller ones reach beyond, is refused without a search.
inline void check_distinct_elements(const char* op, Name name, const Tensor& tensor) {
  if (tensor.is_contiguous()) {
    return;
  }
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    dims.emplace_back(strides[d], sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  std::int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (size > 1 && stride <= reach && tensor.numel() > 0) {
      refuse(op, name, " must not overlap itself in memory, got strides ", Shape{strides.data(), strides.size()},
             " for shape ", shape_of(tensor));
    }
    reach += stride * (size - 1);
  }
}

inline TensorView view_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.strides().data(), static_cast<std::int64_t>(tensor.element_size())};
}

// A slot of a ring as a tensor of its own, without making one.
inline TensorView view_of_slot(const Tensor& ring, std::int64_t slot) {
  const auto bytes = static_cast<std::int64_t>(ring.element_size());
  return {static_cast<char*>(ring.data_ptr()) + slot * ring.stride(0) * bytes, ring.strides().data() + 1, bytes};
}

// The shape of one slot of a ring.
inline Shape slot_shape(const Tensor& ring) { return {ring.sizes().data() + 1, ring.sizes().size() - 1}; }

inline std::int64_t bytes_between(const void* from, const void* to) {
  return static_cast<const char*>(to) - static_cast<const char*>(from);
}

inline void check_apart(const char* op, Argument written, std::initializer_list<Argument> others) {
  for (const Argument& other : others) {
    const TensorView to = view_of(written.tensor), from = view_of(other.tensor);
    const Shape shape = shape_of(written.tensor), other_shape = shape_of(other.tensor);
    if (share_memory({shape.sizes, shape.dims}, to, {other_shape.sizes, other_shape.dims}, from)) {
      refuse(op, written.name, " must not share memory with ", other.name, ", got memory that starts ",
             bytes_between(from.data, to.data), " bytes after its start");
    }
  }
}

inline void check_ring(const char* op, const Tensor& ring) {
  if (ring.dim() < 1) {
    refuse(op, "ring must have shape (slots, *feature), got ", shape_of(ring));
  }
  check_feature(op, {"ring"}, ring);
  check_distinct_elements(op, {"ring"}, ring);
}

inline void check_slot(const char* op, Name name, std::int64_t slot, const Tensor& ring) {
  if (slot < 0 || slot >= ring.size(0)) {
    refuse(op, name, " must be a slot in [0, ", ring.size(0), "), got ", slot);
  }
}

inline void check_read(const char* op, const std::vector<std::int64_t>& read, const Tensor& ring) {
  if (read.empty() || read.size() > kMaxHistory) {
    refuse(op, "read must name 1 to ", kMaxHistory, " slots, got ", read.size());
  }
  for (std::size_t k = 0; k < read.size(); ++k) {
    check_slot(op, {"read", static_cast<std::int64_t>(k)}, read[k], ring);
  }
}

// K slots to read and M distinct slots to write.
inline void check_forecast_into(const Tensor& ring, const Tensor& coefficients, const Tensor& offsets,
                                const std::vector<std::int64_t>& read, const std::vector<std::int64_t>& write) {
  const char* op = "forecast_into";
  check_defined(op, {{{"ring"}, ring}, {{"coefficients"}, coefficients}, {{"offsets"}, offsets}});
  check_ring(op, ring);
  check_read(op, read, ring);
  check_rows(op, coefficients, offsets, read.size(), {"ring"}, ring);
  if (static_cast<std::int64_t>(write.size()) != coefficients.size(0)) {
    refuse(op, "write must name ", coefficients.size(0), " slots (the rows of coefficients), got ", write.size());
  }
  for (std::size_t m = 0; m < write.size(); ++m) {
    check_slot(op, {"write", static_cast<std::int64_t>(m)}, write[m], ring);
    if (std::find(write.begin(), write.begin() + m, write[m]) != write.begin() + m) {
      refuse(op, "write must name distinct slots, got slot ", write[m], " twice");
    }
  }
  check_apart(op, {{"ring"}, ring}, {{{"coefficients"}, coefficients}, {{"offsets"}, offsets}});
}

inline void check_push(const Tensor& ring, const Tensor& feature, std::int64_t slot) {
  const char* op = "push";
  check_defined(op, {{{"ring"}, ring}});
  check_ring(op, ring);
  check_feature(op, {"feature"}, feature);
  const Shape wanted = slot_shape(ring);
  if (!same_sizes(shape_of(feature), wanted)) {
    refuse(op, "feature must have shape ", wanted, " like a slot of ring, got ", shape_of(feature));
  }
  check_device(op, {"feature"}, feature, {"ring"}, ring);
  check_slot(op, {"slot"}, slot, ring);
  const TensorView written = view_of_slot(ring, slot), read = view_of(feature);
  const std::span<const std::int64_t> sizes{wanted.sizes, wanted.dims};
  if (!is_same_view(sizes, written, read) && share_memory(sizes, read, sizes, written)) {
    refuse(op,
           "feature must be the slot that it is written to or share no memory with it, got another view of it that ",
           "starts ", bytes_between(written.data, read.data), " bytes after the slot");
  }
}

// A KAN layer of I inputs, O outputs and B bases: x [..., I], grid [I, B + order + 1], base_weight and spline_scaler
// [O, I], spline_weight [O, I, B].
inline void check_kan_linear(const char* op, const Tensor& x, const Tensor& grid, const Tensor& base_weight,
                             const Tensor& spline_weight, const Tensor& spline_scaler) {
  check_defined(op, {{{"grid"}, grid},
                     {{"base_weight"}, base_weight},
                     {{"spline_weight"}, spline_weight},
                     {{"spline_scaler"}, spline_scaler}});
  check_feature(op, {"x"}, x);
  if (x.dim() < 1) {
    refuse(op, "x must have shape (..., inputs), got ", shape_of(x));
  }
  const std::int64_t inputs = x.size(x.dim() - 1);
  if (base_weight.dim() != 2 || base_weight.size(1) != inputs) {
    refuse(op, "base_weight must have shape (outputs, ", inputs, "), got ", shape_of(base_weight));
  }
  const std::int64_t outputs = base_weight.size(0);
  if (spline_weight.dim() != 3 || spline_weight.size(0) != outputs || spline_weight.size(1) != inputs ||
      spline_weight.size(2) < 1) {
    refuse(op, "spline_weight must have shape (", outputs, ", ", inputs, ", bases), got ", shape_of(spline_weight));
  }
  const std::int64_t bases = spline_weight.size(2);
  if (grid.dim() != 2 || grid.size(0) != inputs || grid.size(1) < bases + 1) {
    refuse(op, "grid must have shape (", inputs, ", ", bases, " + order + 1), got ", shape_of(grid));
  }
  const std::int64_t weights[] = {outputs, inputs};
  check_parameter(op, {"grid"}, grid, {"x"}, x);
  check_parameter(op, {"base_weight"}, base_weight, {"x"}, x);
  check_parameter(op, {"spline_weight"}, spline_weight, {"x"}, x);
  check_shaped(op, {"spline_scaler"}, spline_scaler, {weights, 2}, {"x"}, x);
}

// The gradient of an output of this shape: of the dtype and on the device of another tensor.
inline void check_gradient(const char* op, const Tensor& grad, Shape shape, Name like_name, const Tensor& like) {
  check_defined(op, {{{"grad"}, grad}});
  if (!same_sizes(shape_of(grad), shape)) {
    refuse(op, "grad must have shape ", shape, ", got ", shape_of(grad));
  }
  if (grad.scalar_type() != like.scalar_type()) {
    refuse(op, "grad must have dtype ", dtype_name(like.scalar_type()), " like ", like_name, ", got ",
           dtype_name(grad.scalar_type()));
  }
  check_device(op, {"grad"}, grad, like_name, like);
}

// Merges dimensions (strides.h) or refuses what has too many.
inline MergedShape lay_out(const char* op, Shape shape, std::span<const TensorView> views,
                           std::span<Operand> operands) {
  const MergedShape merged = merge_dimensions({shape.sizes, shape.dims}, views, operands);
  if (merged.dims == 0) {
    refuse(op, "features must have at most ", kMaxDims, " dimensions that their strides do not merge, got shape ",
           shape);
  }
  return merged;
}

// All tensors have one shape and dtype.
inline void check_predict_l1(const std::vector<Tensor>& history, const Tensor& target, const Tensor& weight,
                             const Tensor& bias, const Tensor& gain, const std::optional<Tensor>& out) {
  const char* op = "predict_l1";
  check_predict(op, history, weight, bias, gain);
  check_like(op, {"target"}, target, {"history", 0}, history[0]);
  if (out) {
    check_like(op, {"out"}, *out, {"history", 0}, history[0]);
    check_distinct_elements(op, {"out"}, *out);
    const Argument written{{"out"}, *out};
    check_apart(op, written, {{{"target"}, target}, {{"weight"}, weight}, {{"bias"}, bias}, {{"gain"}, gain}});
    for (std::size_t k = 0; k < history.size(); ++k) {
      check_apart(op, written, {{{"history", static_cast<std::int64_t>(k)}, history[k]}});
    }
  }
}

// A parameter as kernels read it: [M, K], [M] or [K] (one row) or one element.
template <typename T>
Parameter<T> parameter_of(const Tensor& tensor) {
  const std::int64_t dims = tensor.dim();
  const bool is_scalar = tensor.numel() == 1;
  return {tensor.data_ptr(), dims == 2 && !is_scalar ? tensor.stride(0) : 0, is_scalar ? 0 : tensor.stride(dims - 1),
          tensor.scalar_type() == ScalarType::Float};
}

// A fresh row-major tensor of another's dtype and device.
inline Tensor fresh_like(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

}  // namespace lesa
