// In a .cu file because only nvcc knows the architectures it compiles for.
#include <cuda_runtime_api.h>

#include <sstream>
#include <string>

#include "cuda/info.h"
#include "cuda/plan.h"

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
  json << R"(], "threads_per_block": )" << kThreads << R"(, "least_blocks_per_multiprocessor": )" << kResidentBlocks
       << R"(, "vector_bytes": )" << kVectorBytes << R"(, "loads_in_flight": )" << kLoadsInFlight
       << R"(, "exact_history_lengths": [)";
  separator = "";
  for (int inputs = 1; inputs <= kExactInputs; ++inputs) {
    json << separator << inputs;
    separator = ", ";
  }
  json << R"(], "rounded_history_lengths": [16, 32, )" << kMostInputs << "]}";
  return json.str();
}

}  // namespace

const char* lesa_cuda_info() {
  static const std::string text = describe();
  return text.c_str();
}
