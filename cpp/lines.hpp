// Lines of input that are needed soon, asked for one by one in the order of their addresses.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gemma4_moe {

constexpr int64_t line_bytes = 64;

// Goes through the lines of a block, row after row, without an end: the caller counts them.
struct Lines {
  const char* at;
  const char* row_end;  // of the row that `at` is in
  ptrdiff_t stride;     // from row to row
  ptrdiff_t row_bytes;  // whole lines

  // The same line again and again. Once it is there, asking for it costs nothing.
  static Lines only(const char* line) { return {line, line + line_bytes, 0, line_bytes}; }

  // Asks for a line in the second-level cache, and goes on to the next.
  void fetch() {
    __builtin_prefetch(at, 0, 2);
    at += line_bytes;
    if (at == row_end) {
      at += stride - row_bytes;
      row_end += stride;
    }
  }

  void fetch(int64_t lines) {
    for (; lines > 0; --lines) fetch();
  }
};

}  // namespace gemma4_moe
