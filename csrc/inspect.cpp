// The inspection module: what the compiled libraries say of themselves, and the host-side parts of the kernels, as
// Python objects: the walk that a pass takes through memory and the conversions of 16-bit floats, for a look and for
// tests.
//
// pybind11 cannot use Python's limited API, so this module fits the one Python it was built for, unlike the libraries
// of ops. It therefore links to none of them: it finds a library that is already in the process and asks it, and the
// same C functions answer lesa.status() on every Python.

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "arithmetic.h"
#include "strides.h"

namespace py = pybind11;

namespace {

struct CloseLibrary {
  void operator()(void* handle) const { dlclose(handle); }
};

using Handle = std::unique_ptr<void, CloseLibrary>;

// RTLD_NOLOAD: inspecting must never load kernels into the dispatcher.
Handle find_library(const std::string& path) {
  Handle handle(dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD));
  if (!handle) {
    throw std::invalid_argument("lesa_kernels._inspect.facts: path must name a library that is loaded, got " + path);
  }
  return handle;
}

py::object facts(const std::string& path, const std::string& function) {
  const Handle handle = find_library(path);
  using Info = const char* (*)();
  const auto info = reinterpret_cast<Info>(dlsym(handle.get(), function.c_str()));
  if (info == nullptr) {
    throw std::invalid_argument("lesa_kernels._inspect.facts: function must be exported by " + path + ", got " +
                                function);
  }
  return py::module_::import("json").attr("loads")(info());
}

// This module's own build, which ran with the compiler of the CPU library.
py::dict build() {
  py::dict result;
  result["compiler"] = __VERSION__;
  result["cplusplus"] = __cplusplus;
  result["pybind11"] =
      py::str("{}.{}.{}").format(PYBIND11_VERSION_MAJOR, PYBIND11_VERSION_MINOR, PYBIND11_VERSION_MICRO);
  result["python"] = PY_VERSION;
  return result;
}

// The order in which a pass visits the elements of its tensors: merged dimensions, the last one innermost.
struct Walk {
  std::vector<std::int64_t> sizes;
  std::vector<std::vector<std::int64_t>> strides;
  bool contiguous;
};

Walk walk(const std::vector<std::int64_t>& sizes, const std::vector<std::vector<std::int64_t>>& strides) {
  if (strides.empty()) {
    throw std::invalid_argument("lesa_kernels._inspect.walk: strides must hold one list per tensor, got none");
  }
  std::vector<lesa::Source> sources;
  for (const auto& tensor : strides) {
    if (tensor.size() != sizes.size()) {
      throw std::invalid_argument("lesa_kernels._inspect.walk: each of strides must have " +
                                  std::to_string(sizes.size()) + " entries like sizes, got " +
                                  std::to_string(tensor.size()));
    }
    sources.push_back({nullptr, tensor.data()});
  }
  std::vector<lesa::Operand> operands(sources.size());
  const lesa::Geometry geometry = lesa::merge_dimensions(sizes, sources, operands);
  if (geometry.dims == 0) {
    throw std::invalid_argument("lesa_kernels._inspect.walk: at most " + std::to_string(lesa::kMaxDims) +
                                " dimensions may be left after merging");
  }
  Walk result{{geometry.sizes, geometry.sizes + geometry.dims}, {}, geometry.contiguous};
  for (const lesa::Operand& operand : operands) {
    result.strides.emplace_back(operand.strides, operand.strides + geometry.dims);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_inspect, module) {
  module.doc() =
      "What the compiled libraries of lesa_kernels say of themselves, and the host-side parts of the kernels.";
  module.def("facts", &facts, py::arg("path"), py::arg("function"),
             "Return what a loaded library says of itself: its path, the name of its C function that returns JSON.");
  module.def("build", &build, "Return with what this module was compiled.");

  py::class_<Walk>(module, "Walk", "The order in which a pass visits the elements of its tensors.")
      .def_readonly("sizes", &Walk::sizes, "Merged dimensions, the last one innermost.")
      .def_readonly("strides", &Walk::strides, "Per tensor its strides in elements along the merged dimensions.")
      .def_readonly("contiguous", &Walk::contiguous, "Whether one dimension is left and every stride is 1.");
  module.def("walk", &walk, py::arg("sizes"), py::arg("strides"),
             "Return the walk of a pass over tensors of one shape, given each tensor's strides in elements.");

  module.def("widen_float16", [](std::uint16_t bits) { return lesa::widen(lesa::float16{bits}); }, py::arg("bits"));
  module.def("widen_bfloat16", [](std::uint16_t bits) { return lesa::widen(lesa::bfloat16{bits}); }, py::arg("bits"));
  module.def("narrow_float16", [](float value) { return lesa::narrow<lesa::float16>(value).bits; }, py::arg("value"));
  module.def("narrow_bfloat16", [](float value) { return lesa::narrow<lesa::bfloat16>(value).bits; }, py::arg("value"));
}
