// Describes the library to lesa.status() and the inspection module, which look the function up by name. In a .cu file
// because only nvcc knows the architectures it compiles for.
#include <cuda_runtime_api.h>

#include <sstream>
#include <string>

#include "cuda/launch_config.h"

namespace {

std::string describe() {
  using namespace lesa::cuda;
  std::ostringstream json;
  json << R"({"cuda": ")" << CUDART_VERSION / 1000 << '.' << CUDART_VERSION % 1000 / 10 << R"(", "architectures": [)";
  const char* separator = "";
  for (const int architecture : {__CUDA_ARCH_LIST__}) {
    json << separator << '"' << architecture / 10 << '"';
    separator = ", ";
  }
  json << R"(], "threads_per_block": )" << kThreads << R"(, "vector_bytes": )" << kVectorBytes
       << R"(, "loads_in_flight": )" << kLoadsInFlight << "}";
  return json.str();
}

}  // namespace

// JSON: CUDA version and architectures of the build, how kernels are launched. Needs no GPU; valid for good.
extern "C" __attribute__((visibility("default"))) const char* lesa_cuda_info() {
  static const std::string text = describe();
  return text.c_str();
}
