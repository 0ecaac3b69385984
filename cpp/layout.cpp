#include "layout.hpp"

#include <algorithm>
#include <cstdlib>

namespace gemma4_moe {
namespace {

bool joins(const Axis& outer, const Axis& inner) {
  return outer.src == inner.src * inner.size && outer.dst == inner.dst * inner.size &&
         outer.scale == inner.scale * inner.size;
}

std::vector<Axis> simplified(std::vector<Axis> axes) {
  axes.erase(std::remove_if(axes.begin(), axes.end(), [](const Axis& a) { return a.size == 1; }), axes.end());
  std::stable_sort(axes.begin(), axes.end(),
                   [](const Axis& a, const Axis& b) { return std::abs(a.dst) > std::abs(b.dst); });
  std::vector<Axis> joined;
  for (const Axis& axis : axes) {
    if (!joined.empty() && joins(joined.back(), axis)) {
      joined.back() = {joined.back().size * axis.size, axis.src, axis.dst, axis.scale};
    } else {
      joined.push_back(axis);
    }
  }
  return joined;
}

}  // namespace

Layout plan_layout(std::vector<Axis> axes, DType in, DType out) {
  Layout layout{Loop::elements, simplified(std::move(axes)), {1, 0, 0, 0}, {1, size_of(in), size_of(out), 0}};
  auto& outer = layout.outer;
  if (!outer.empty()) {
    layout.row = outer.back();
    outer.pop_back();
  }
  if (layout.row.dst != size_of(out) || layout.row.scale != 0) return layout;
  if (layout.row.src == size_of(in)) {
    layout.loop = Loop::rows;
    return layout;
  }
  auto column = std::find_if(outer.begin(), outer.end(),
                             [in](const Axis& a) { return a.src == size_of(in) && a.scale == 0; });
  if (column != outer.end()) {
    layout.loop = Loop::tiles;
    layout.column = *column;
    outer.erase(column);
  }
  return layout;
}

int64_t Layout::outer_size() const {
  int64_t product = 1;
  for (const Axis& axis : outer) product *= axis.size;
  return product;
}

Offsets offsets_at(const std::vector<Axis>& outer, int64_t index) {
  Offsets at;
  for (auto axis = outer.rbegin(); axis != outer.rend(); ++axis) {
    int64_t here = index % axis->size;
    index /= axis->size;
    at.src += here * axis->src;
    at.dst += here * axis->dst;
    at.scale += here * axis->scale;
  }
  return at;
}

}  // namespace gemma4_moe
