#include "cpu/isa.h"

#include <atomic>

namespace lesa::cpu {
namespace {

const Isa* widest() {
  for (const Isa* isa : compiled()) {
    if (supported(*isa)) {
      return isa;
    }
  }
  return &kBaseline;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{widest()};
  return isa;
}

}  // namespace

std::span<const Isa* const> compiled() {
#if defined(__x86_64__)
  static constexpr const Isa* kAll[] = {&kAvx512, &kAvx2, &kBaseline};
#else
  static constexpr const Isa* kAll[] = {&kBaseline};
#endif
  return kAll;
}

bool supported(const Isa& isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (&isa == &kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (&isa == &kAvx2) {
    return avx2;
  }
#endif
  return &isa == &kBaseline;
}

const Isa& chosen() { return *current().load(std::memory_order_relaxed); }

bool choose(std::string_view name) {
  if (name == "auto") {
    current().store(widest(), std::memory_order_relaxed);
    return true;
  }
  for (const Isa* isa : compiled()) {
    if (name == isa->name && supported(*isa)) {
      current().store(isa, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace lesa::cpu
