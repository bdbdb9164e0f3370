#include "cpu/info.h"

#include <sstream>
#include <string>

#include "cpu/isa.h"
#include "cpu/walk.h"

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang";
constexpr const char* kVersion = __clang_version__;
#else
constexpr const char* kCompiler = "gcc";
constexpr const char* kVersion = __VERSION__;
#endif

// The names of the instruction sets that were compiled, or of those among them that this processor runs, as JSON.
std::string names(bool only_supported) {
  std::string list;
  for (const lesa::cpu::Isa* isa : lesa::cpu::compiled()) {
    if (!only_supported || lesa::cpu::supported(*isa)) {
      list += (list.empty() ? "\"" : ", \"") + std::string(isa->name) + "\"";
    }
  }
  return "[" + list + "]";
}

std::string describe() {
  using namespace lesa::cpu;
  std::ostringstream json;
  json << R"({"compiler": ")" << kCompiler << ' ' << kVersion << R"(", "chosen": ")" << chosen().name
       << R"(", "vector_bits": )" << chosen().vector_bits << R"(, "compiled": )" << names(false) << R"(, "supported": )"
       << names(true) << R"(, "grain_bytes": )" << kGrainBytes << R"(, "past_cache_bytes": )" << kPastCacheBytes
       << R"(, "unit_elements": )" << kUnit << R"(, "gathered_elements": )" << kGathered << "}";
  return json.str();
}

}  // namespace

const char* lesa_cpu_info() {
  thread_local std::string text;
  text = describe();
  return text.c_str();
}

int lesa_cpu_set_isa(const char* name) { return lesa::cpu::choose(name) ? 0 : 1; }
