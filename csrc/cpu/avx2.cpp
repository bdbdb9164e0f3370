// The loops with 256-bit vectors.
#include "cpu/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

// As in avx512.cpp: nothing but this namespace is compiled for AVX2.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace lesa::cpu::avx2 {

using Floats = __m256;
using Doubles = __m256d;
inline constexpr int kSumRegisters = 12;
inline constexpr int kVectors = 4;
inline constexpr int kSingleVectors = 12;

inline Floats fill(float value) { return _mm256_set1_ps(value); }
inline Doubles fill(double value) { return _mm256_set1_pd(value); }

inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }

inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline Doubles load(const double* from) { return _mm256_loadu_pd(from); }
inline Floats load(const float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Floats load(const bfloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline Doubles load_double(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }

inline __m128i pack(const float16*, Floats values) {
  return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Rounded to bfloat16, in the lower 16 bits of each word.
inline __m256i rounded(Floats values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}
inline __m128i pack(const bfloat16*, Floats values) {
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(values), 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded(values), quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
}

inline void store(float* to, Floats values) { _mm256_storeu_ps(to, values); }
inline void store(double* to, Doubles values) { _mm256_storeu_pd(to, values); }
template <typename T>
inline void store(T* to, Floats values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), pack(to, values));
}

inline void stream(float* to, Floats values) { _mm256_stream_ps(to, values); }
inline void stream(double* to, Doubles values) { _mm256_stream_pd(to, values); }
template <typename T>
inline void stream(T* to, Floats values) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), pack(to, values));
}
inline void fence() { _mm_sfence(); }

// Two vectors of sums; as in avx512.cpp, a NaN among them needs no mask.
template <bool kStreaming>
inline void put_sums(bfloat16* to, Floats first, Floats second) {
  constexpr int kInOrder = 0b11'01'10'00;  // packing goes by halves of the vectors
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(first), rounded(second)), kInOrder);
  if constexpr (kStreaming) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), packed);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
  }
}

// sign_of for every lane.
inline Floats signs_of(Floats errors) {
  const Floats ones = _mm256_or_ps(_mm256_and_ps(errors, fill(-0.0f)), fill(1.0f));
  return _mm256_blendv_ps(errors, ones, _mm256_cmp_ps(errors, fill(0.0f), _CMP_NEQ_OQ));
}
inline Doubles signs_of(Doubles errors) {
  const Doubles ones = _mm256_or_pd(_mm256_and_pd(errors, fill(-0.0)), fill(1.0));
  return _mm256_blendv_pd(errors, ones, _mm256_cmp_pd(errors, fill(0.0), _CMP_NEQ_OQ));
}

inline double to_double(Doubles values) {
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(values), _mm256_extractf128_pd(values, 1));
  return _mm_cvtsd_f64(pair) + _mm_cvtsd_f64(_mm_unpackhi_pd(pair, pair));
}
inline double to_double(Floats values) {
  return to_double(_mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(values)),
                                 _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1))));
}

#include "cpu/isa.inc"

}  // namespace lesa::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace lesa::cpu {
constinit const Isa kAvx2{"avx2", 256, avx2::kAllKernels, avx2::kAllKanKernels};
}
#endif
