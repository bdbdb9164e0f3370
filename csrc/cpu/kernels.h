// The inner loops of the CPU ops as function pointers, one set per instruction set (isa.h picks one at run time). They
// run over plain pointers to consecutive elements: strides, threads and tensors are the business of walk.h and ops.cpp.
#pragma once

#include <cstdint>
#include <tuple>

#include "arithmetic.h"

namespace lesa::cpu {

// The most inputs and rows of one call (the contract's limits).
inline constexpr int kMaxInputs = 64;
inline constexpr int kMaxRows = 64;

// M rows of coefficients over K inputs: row m yields sum_k coefficients[m * K + k] * input[k] + offsets[m].
template <typename T>
struct Rows {
  const accumulate_t<T>* coefficients;
  const accumulate_t<T>* offsets;
  int inputs;
  int rows;
  bool past_cache;  // store so that the outputs do not go through the cache, where their addresses allow it
};

template <typename T>
struct Kernels {
  // outputs[m][i] from inputs[k][i], i < count, all of type T. Every element's reads come before its writes, so outputs
  // may be inputs.
  void (*forecast)(const Rows<T>& map, const void* const* inputs, void* const* outputs, std::int64_t count);
  // outputs[0][i] = inputs[K - 1][i] + gain * (the single row of map).
  void (*predict)(const Rows<T>& map, accumulate_t<T> gain, const void* const* inputs, void* const* outputs,
                  std::int64_t count);
  // Sum of a[i] * b[i], and of a[i]; the order of the additions depends on count alone.
  double (*dot)(const T* a, const T* b, std::int64_t count);
  double (*sum)(const T* a, std::int64_t count);
  // 16-bit and float32 elements to and from float32.
  void (*to_float)(const T* from, float* to, std::int64_t count);
  void (*from_float)(const float* from, T* to, std::int64_t count);
};

struct Isa {
  const char* name;
  int vector_bits;
  std::tuple<Kernels<float>, Kernels<float16>, Kernels<bfloat16>, Kernels<double>> kernels;

  template <typename T>
  const Kernels<T>& of() const {
    return std::get<Kernels<T>>(kernels);
  }
};

}  // namespace lesa::cpu
