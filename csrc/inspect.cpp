// The inspection module: the facts that the compiled libraries report, and the host-side parts of the kernels for
// tests, as Python objects.
//
// pybind11 cannot use Python's limited API, so this module fits the one Python it was built for, unlike the libraries
// of ops. It therefore links to none of them: it finds a library that is already in the process, and the same C
// functions answer lesa.status() on every Python.

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "arithmetic.h"
#include "strides.h"

namespace py = pybind11;

namespace {

using Sizes = std::vector<std::int64_t>;

py::object facts(const std::string& path, const std::string& function) {
  // RTLD_NOLOAD: inspecting must never load kernels into the dispatcher.
  const std::unique_ptr<void, int (*)(void*)> handle(dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD), dlclose);
  if (!handle) {
    throw std::invalid_argument("lesa_kernels._inspect.facts: path must name a library that is loaded, got " + path);
  }
  const auto info = reinterpret_cast<const char* (*)()>(dlsym(handle.get(), function.c_str()));
  if (info == nullptr) {
    throw std::invalid_argument("lesa_kernels._inspect.facts: function must be exported by " + path + ", got " +
                                function);
  }
  return py::module_::import("json").attr("loads")(info());
}

std::tuple<Sizes, std::vector<Sizes>, bool> merge_dimensions(const Sizes& sizes, const std::vector<Sizes>& strides) {
  std::vector<lesa::TensorView> views;
  for (const Sizes& tensor : strides) {
    if (tensor.size() != sizes.size()) {
      throw std::invalid_argument("lesa_kernels._inspect.merge_dimensions: each of strides must have " +
                                  std::to_string(sizes.size()) + " entries like sizes, got " +
                                  std::to_string(tensor.size()));
    }
    views.push_back({nullptr, tensor.data(), 1});
  }
  std::vector<lesa::Operand> operands(views.size());
  const lesa::MergedShape merged = lesa::merge_dimensions(sizes, views, operands);
  std::vector<Sizes> operand_strides;
  for (const lesa::Operand& operand : operands) {
    operand_strides.emplace_back(operand.strides, operand.strides + merged.dims);
  }
  return {{merged.sizes, merged.sizes + merged.dims}, operand_strides, merged.contiguous};
}

}  // namespace

PYBIND11_MODULE(_inspect, module) {
  module.doc() =
      "The facts that the compiled libraries of lesa_kernels report, and the host-side parts of the kernels.";
  module.def("facts", &facts, py::arg("path"), py::arg("function"),
             "Return the facts that a loaded library reports: its path, the name of its C function that returns JSON.");
  module.def(
      "merge_dimensions", &merge_dimensions, py::arg("sizes"), py::arg("strides"),
      "Merge the dimensions of tensors of one shape, given each one's strides in elements: return the sizes, each "
      "tensor's strides, and whether one dimension of stride 1 is left.");
  module.def("widen_float16", [](std::uint16_t bits) { return lesa::widen(lesa::float16{bits}); }, py::arg("bits"));
  module.def("widen_bfloat16", [](std::uint16_t bits) { return lesa::widen(lesa::bfloat16{bits}); }, py::arg("bits"));
  module.def("narrow_float16", [](float value) { return lesa::narrow<lesa::float16>(value).bits; }, py::arg("value"));
  module.def("narrow_bfloat16", [](float value) { return lesa::narrow<lesa::bfloat16>(value).bits; }, py::arg("value"));
}
