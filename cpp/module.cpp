// The Python binding. Everything is checked on the Python side; here addresses are trusted.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "move.hpp"
#include "pages.hpp"
#include "product.hpp"

namespace nb = nanobind;
using namespace gemma4_moe;

namespace {

const Kernels* kernels_named(const std::string& name) {
  for (const Kernels* each : available_kernels()) {
    if (name.empty() || each->name == name) return each;
  }
  throw std::invalid_argument("no instruction set " + name + " here");
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* each : available_kernels()) names.emplace_back(each->name);
  return names;
}

Move move_of(const std::vector<int64_t>& shape, uintptr_t src, int in, const std::vector<int64_t>& src_strides,
             uintptr_t dst, int out, const std::vector<int64_t>& dst_strides, uintptr_t scale, int threads,
             const std::string& instruction_set) {
  if (src_strides.size() != shape.size() || dst_strides.size() != shape.size() || in < 0 || in >= dtypes || out < 0 ||
      out >= dtypes) {
    throw std::invalid_argument("strides don't fit the shape, or unknown dtype");
  }
  const auto* factors = reinterpret_cast<const float*>(scale);
  Move move{reinterpret_cast<const char*>(src), static_cast<DType>(in), reinterpret_cast<char*>(dst),
            static_cast<DType>(out), factors, {}, threads, kernels_named(instruction_set)};
  for (size_t i = 0; i < shape.size(); ++i) {
    move.axes.push_back({shape[i], src_strides[i], dst_strides[i], i == 0 && factors != nullptr ? 1 : 0});
  }
  return move;
}

void scale_cast(const std::vector<int64_t>& shape, uintptr_t src, int in, const std::vector<int64_t>& src_strides,
                uintptr_t dst, int out, const std::vector<int64_t>& dst_strides, uintptr_t scale, int threads,
                const std::string& instruction_set) {
  Move move = move_of(shape, src, in, src_strides, dst, out, dst_strides, scale, threads, instruction_set);
  nb::gil_scoped_release released;
  run(move);
}

void scale_add_cast(const std::vector<int64_t>& shape, uintptr_t src, int in, const std::vector<int64_t>& src_strides,
                    uintptr_t dst, int out, const std::vector<int64_t>& dst_strides, uintptr_t scale, uintptr_t left,
                    int64_t left_stride, uintptr_t right, int64_t rank, uintptr_t acts, int threads,
                    const std::string& instruction_set) {
  Move move = move_of(shape, src, in, src_strides, dst, out, dst_strides, scale, threads, instruction_set);
  if (shape.size() != 3) throw std::invalid_argument("not experts, rows and columns");
  Product product{reinterpret_cast<const float*>(left), reinterpret_cast<const float*>(right),
                  reinterpret_cast<const bool*>(acts), left_stride, rank};
  nb::gil_scoped_release released;
  run_with_product(move, product);
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "Transposes, scales and casts raw buffers. Use gemma4_moe.kernels, which checks its arguments.";
  m.def("instruction_sets", &instruction_sets, "Names of the instruction sets that this processor can run, best first.");
  m.def("advise_large_pages", &advise_large_pages, nb::arg("address"), nb::arg("nbytes"),
        "Let memory that nothing was written to yet come in large pages, where the system has them.");
  m.def("scale_add_cast", &scale_add_cast, nb::arg("shape"), nb::arg("src"), nb::arg("src_dtype"),
        nb::arg("src_strides"), nb::arg("dst"), nb::arg("dst_dtype"), nb::arg("dst_strides"), nb::arg("scale"),
        nb::arg("left"), nb::arg("left_stride"), nb::arg("right"), nb::arg("rank"), nb::arg("acts"), nb::arg("threads"),
        nb::arg("instruction_set"),
        "Write round(src * scale + left @ right) to dst, each [experts, rows, columns]. left [rows, rank] of an expert "
        "and right [rank, columns] are contiguous fp32, the former left_stride elements apart; acts is the address of a "
        "bool for each expert. All else is as in scale_cast. Releases the GIL.");
  m.def("scale_cast", &scale_cast, nb::arg("shape"), nb::arg("src"), nb::arg("src_dtype"), nb::arg("src_strides"),
        nb::arg("dst"), nb::arg("dst_dtype"), nb::arg("dst_strides"), nb::arg("scale"), nb::arg("threads"),
        nb::arg("instruction_set"),
        "Write round(src * scale) to dst. Strides are in bytes; scale is the address of one fp32 for each index of "
        "axis 0, or 0; instruction_set is a name or \"\" for the best. Releases the GIL.");
}
