// The loops with 512-bit vectors.
#include "cpu/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

// Only what stands between the pragmas is compiled for AVX-512: an inline function of a shared header must not be, the
// linker could pick that copy for every caller.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own _mm512_undefined (its bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif

namespace lesa::cpu::avx512 {

using Floats = __m512;
using Doubles = __m512d;
inline constexpr int kSumRegisters = 24;
inline constexpr int kVectors = 8;
inline constexpr int kSingleVectors = kVectors;

inline Floats fill(float value) { return _mm512_set1_ps(value); }
inline Doubles fill(double value) { return _mm512_set1_pd(value); }

inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Doubles load(const double* from) { return _mm512_loadu_pd(from); }
inline Floats load(const float16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Floats load(const bfloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline Doubles load_double(const float* from) { return _mm512_cvtps_pd(_mm256_loadu_ps(from)); }

inline __m256i pack(const float16*, Floats values) {
  return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Rounded to bfloat16, in the upper 16 bits. Not vcvtneps2bf16: it takes subnormal numbers for zero.
inline __m512i rounded(Floats values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
inline __m256i pack(const bfloat16*, Floats values) {
  const __m512i quiet = _mm512_or_si512(_mm512_castps_si512(values), _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded(values), nan, quiet), 16));
}

inline void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
inline void store(double* to, Doubles values) { _mm512_storeu_pd(to, values); }
template <typename T>
inline void store(T* to, Floats values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), pack(to, values));
}

inline void stream(float* to, Floats values) { _mm512_stream_ps(to, values); }
inline void stream(double* to, Doubles values) { _mm512_stream_pd(to, values); }
template <typename T>
inline void stream(T* to, Floats values) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), pack(to, values));
}
inline void fence() { _mm_sfence(); }

// Two vectors of sums. A NaN among bfloat16 sums has zeros below the 16 bits that are kept, because those of features
// and parameters have (cpu_common.h), so rounding leaves it a NaN and needs no mask: forecast_into is a third faster.
template <bool kStreaming>
inline void put_sums(bfloat16* to, Floats first, Floats second) {
  alignas(64) static constexpr std::uint16_t kHighHalves[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                                23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                                45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i packed = _mm512_permutex2var_epi16(rounded(first), _mm512_load_si512(kHighHalves), rounded(second));
  if constexpr (kStreaming) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), packed);
  } else {
    _mm512_storeu_si512(to, packed);
  }
}

// sign_of for every lane.
inline Floats signs_of(Floats errors) {
  const Floats ones = _mm512_or_ps(_mm512_and_ps(errors, fill(-0.0f)), fill(1.0f));
  return _mm512_mask_mov_ps(errors, _mm512_cmp_ps_mask(errors, fill(0.0f), _CMP_NEQ_OQ), ones);
}
inline Doubles signs_of(Doubles errors) {
  const Doubles ones = _mm512_or_pd(_mm512_and_pd(errors, fill(-0.0)), fill(1.0));
  return _mm512_mask_mov_pd(errors, _mm512_cmp_pd_mask(errors, fill(0.0), _CMP_NEQ_OQ), ones);
}

inline double to_double(Doubles values) { return _mm512_reduce_add_pd(values); }
inline double to_double(Floats values) {
  return to_double(_mm512_cvtps_pd(_mm512_castps512_ps256(values)) +
                   _mm512_cvtps_pd(_mm512_extractf32x8_ps(values, 1)));
}

#include "cpu/isa.inc"

}  // namespace lesa::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC diagnostic pop
#pragma GCC pop_options
#endif

namespace lesa::cpu {
constinit const Isa kAvx512{"avx512", 512, avx512::kAllKernels, avx512::kAllKanKernels};
}
#endif
