// The loops with the 128-bit vectors that every 64-bit processor has, in the compiler's portable notation.
#include <cstring>

#include "cpu/isa.h"

namespace lesa::cpu::baseline {

using Floats [[gnu::vector_size(16)]] = float;
using Doubles [[gnu::vector_size(16)]] = double;
using Words [[gnu::vector_size(16)]] = std::uint32_t;
using Halves [[gnu::vector_size(8)]] = std::uint16_t;
inline constexpr int kSumRegisters = 12;
inline constexpr int kVectors = 4;
inline constexpr int kSingleVectors = kVectors;

inline Floats fill(float value) { return Floats{value, value, value, value}; }
inline Doubles fill(double value) { return Doubles{value, value}; }

inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return a * b + c; }

template <typename V>
inline V load_bytes(const void* from) {
  V values;
  std::memcpy(&values, from, sizeof(V));
  return values;
}

inline Floats load(const float* from) { return load_bytes<Floats>(from); }
inline Doubles load(const double* from) { return load_bytes<Doubles>(from); }
inline Floats load(const float16* from) {
  return Floats{widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3])};
}
inline Floats load(const bfloat16* from) {
  return std::bit_cast<Floats>(__builtin_convertvector(load_bytes<Halves>(from), Words) << 16);
}

inline Doubles load_double(const float* from) { return Doubles{from[0], from[1]}; }

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof(values)); }
inline void store(double* to, Doubles values) { std::memcpy(to, &values, sizeof(values)); }
inline void store(float16* to, Floats values) {
  for (int i = 0; i < 4; ++i) {
    to[i] = narrow<float16>(values[i]);
  }
}
inline void store(bfloat16* to, Floats values) {
  const Words bits = std::bit_cast<Words>(values);
  const Words high = bits >> 16;
  const Words rounded = (bits + 0x7fff + (high & 1)) >> 16;
  const Words result = values == values ? rounded : high | 0x40;
  const Halves packed = __builtin_convertvector(result, Halves);
  std::memcpy(to, &packed, sizeof(packed));
}

// Portable code has no such store.
template <typename T, typename V>
inline void stream(T* to, V values) {
  store(to, values);
}
inline void fence() {}

// sign_of for every lane.
template <typename V>
inline V signs_of(V errors) {
  const V zeros{}, ones = zeros + 1;
  return errors > zeros ? ones : errors < zeros ? -ones : errors;
}

inline double to_double(Doubles values) { return values[0] + values[1]; }
inline double to_double(Floats values) {
  return (static_cast<double>(values[0]) + values[1]) + (static_cast<double>(values[2]) + values[3]);
}

#include "cpu/isa.inc"

}  // namespace lesa::cpu::baseline

namespace lesa::cpu {
constinit const Isa kBaseline{"baseline", 128, baseline::kAllKernels, baseline::kAllKanKernels};
}
