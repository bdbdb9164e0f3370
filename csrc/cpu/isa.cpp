// Chooses the instruction set, and describes the library to lesa.status(), the inspection module and the tests, which
// look its two C functions up by name.
#include "cpu/isa.h"

#include <atomic>
#include <initializer_list>
#include <sstream>
#include <string>
#include <string_view>

#include "cpu/iterate.h"

namespace lesa::cpu {
namespace {

constexpr std::initializer_list<const Isa*> kCompiled = {
#if defined(__x86_64__)
    &kAvx512, &kAvx2,
#endif
    &kBaseline};

// Whether this processor can run it.
bool is_supported(const Isa* isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == &kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (isa == &kAvx2) {
    return avx2;
  }
#endif
  return isa == &kBaseline;
}

// The supported one of a name, the widest for "auto"; null if there is none.
const Isa* find_isa(std::string_view name) {
  for (const Isa* isa : kCompiled) {
    if ((name == "auto" || name == isa->name) && is_supported(isa)) {
      return isa;
    }
  }
  return nullptr;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{find_isa("auto")};
  return isa;
}

// The names of the instruction sets that were compiled, or of those among them that this processor runs, as JSON.
std::string names(bool only_supported) {
  std::string list;
  for (const Isa* isa : kCompiled) {
    if (!only_supported || is_supported(isa)) {
      list += (list.empty() ? "\"" : ", \"") + std::string(isa->name) + "\"";
    }
  }
  return "[" + list + "]";
}

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

std::string describe() {
  std::ostringstream json;
  json << R"({"compiler": ")" << kCompiler << R"(", "chosen": ")" << chosen_isa().name << R"(", "vector_bits": )"
       << chosen_isa().vector_bits << R"(, "compiled": )" << names(false) << R"(, "supported": )" << names(true)
       << R"(, "grain_bytes": )" << kGrainBytes << R"(, "streaming_bytes": )" << kStreamingBytes << "}";
  return json.str();
}

}  // namespace

const Isa& chosen_isa() { return *current().load(std::memory_order_relaxed); }

}  // namespace lesa::cpu

extern "C" {

// JSON: compiler, instruction sets compiled, supported and chosen, sizes that shape the work. Valid until the next
// call.
__attribute__((visibility("default"))) const char* lesa_cpu_info() {
  thread_local std::string text;
  text = lesa::cpu::describe();
  return text.c_str();
}

// Forces an instruction set by name ("avx512", "avx2", "baseline"; "auto" undoes it). 0 on success, 1 if there is no
// such one here. For tests: results of calls in flight on other threads may come from either.
__attribute__((visibility("default"))) int lesa_cpu_set_isa(const char* name) {
  const lesa::cpu::Isa* isa = lesa::cpu::find_isa(name);
  if (isa != nullptr) {
    lesa::cpu::current().store(isa, std::memory_order_relaxed);
  }
  return isa == nullptr;
}

}  // extern "C"
