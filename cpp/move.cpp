// Cuts the work into pieces that suit the caches, hands them to threads, and fetches the next piece while one is done.
//
// Tiles are visited so that every line of both tensors is touched once: an input block of `block_rows` rows and about
// `block_row_bytes` of each is asked into the second-level cache, line after line by address, while the block
// before it is transposed. From there each tile's lines are asked into the first-level cache one tile ahead. The tiles'
// kernels do the asking, between their other steps. Within a block, the tiles of one column strip follow each other,
// which writes `block_rows` consecutive elements of each output row.

#include "move.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "arithmetic.hpp"
#include "pool.hpp"

namespace gemma4_moe {
namespace {

constexpr int64_t block_rows = 128;
constexpr int64_t block_row_bytes = 1408;  // 128 such rows are a third of a 512 KiB second-level cache
constexpr int64_t piece_bytes = 64 << 10;  // of contiguous rows
constexpr int64_t thread_bytes = 256 << 10;  // less is not worth waking a thread for
constexpr int64_t stream_bytes = 4 << 20;    // smaller results are left in the caches

// All that the pieces of one call share.
struct Call {
  const Move& move;
  Layout layout;
  int64_t in, out;  // bytes of an element
  const PairKernels& kernels;
  StridedKernel strided;
  bool stream;
};

// How the elements under one scale are to be treated.
enum class Treatment { copy, convert, strided };

Treatment treatment(const Call& call, float scale) {
  if (call.move.in == call.move.out && scale == 1.0f) return Treatment::copy;
  return std::isfinite(scale) ? Treatment::convert : Treatment::strided;
}

float scale_at(const Call& call, ptrdiff_t offset) {
  return call.move.scale == nullptr ? 1.0f : call.move.scale[offset];
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A part of one matrix: `rows` × `columns` elements, rows along the output's contiguous axis.
struct Block {
  const char* src;
  char* dst;
  int64_t rows, columns;
  float scale;
};

class TileWork {
 public:
  explicit TileWork(const Call& call)
      : call_(call), tile_columns_(tile_columns(call.move.in)) {
    int64_t strips = ceil_div(call.layout.column.size * call.in, block_row_bytes);
    block_columns_ = ceil_div(ceil_div(call.layout.column.size, strips), tile_columns_) * tile_columns_;
    down_ = ceil_div(call.layout.row.size, block_rows);
    across_ = ceil_div(call.layout.column.size, block_columns_);
  }

  int64_t pieces() const { return call_.layout.outer_size() * down_ * across_; }

  void run(int64_t begin, int64_t end) const {
    Block block = block_at(begin);
    for (int64_t piece = begin; piece < end; ++piece) {
      Block next = piece + 1 < end ? block_at(piece + 1) : Block{nullptr, nullptr, 0, 0, 0};
      transpose(block, next);
      block = next;
    }
  }

 private:
  Block block_at(int64_t piece) const {
    const Layout& layout = call_.layout;
    int64_t column = piece % across_ * block_columns_;
    int64_t row = piece / across_ % down_ * block_rows;
    Offsets at = offsets_at(layout.outer, piece / across_ / down_);
    return {call_.move.src + at.src + row * layout.row.src + column * call_.in,
            call_.move.dst + at.dst + row * call_.out + column * layout.column.dst,
            std::min(block_rows, layout.row.size - row), std::min(block_columns_, layout.column.size - column),
            scale_at(call_, at.scale)};
  }

  void transpose(const Block& block, const Block& next) const {
    Treatment how = treatment(call_, block.scale);
    Lines lines = Lines::only(block.src);
    int64_t row_lines = ceil_div(next.columns * call_.in, line_bytes), left = next.rows * row_lines;
    if (left > 0) lines = {next.src, next.src + row_lines * line_bytes, call_.layout.row.src, row_lines * line_bytes};
    int64_t tiles = ceil_div(block.rows, tile_rows) * ceil_div(block.columns, tile_columns_);
    int64_t surplus = std::max<int64_t>(0, ceil_div(left, tiles) - tile_rows);  // where this block is the smaller one
    for (int64_t c = 0; c < block.columns; c += tile_columns_) {
      for (int64_t r = 0; r < block.rows; r += tile_rows) {
        lines.fetch(surplus);
        tile(block, r, c, how, lines);
        left -= tile_rows + surplus;
        if (left <= 0) lines = Lines::only(block.src);
      }
    }
  }

  void tile(const Block& block, int64_t r, int64_t c, Treatment how, Lines& lines) const {
    ptrdiff_t src_stride = call_.layout.row.src, dst_stride = call_.layout.column.dst;
    const char* src = block.src + r * src_stride + c * call_.in;
    char* dst = block.dst + r * call_.out + c * dst_stride;
    int64_t rows = std::min(tile_rows, block.rows - r), columns = std::min(tile_columns_, block.columns - c);
    bool whole = rows == tile_rows && columns == tile_columns_;
    bool done = false;
    if (how != Treatment::strided && whole) {
      done = choose(how, call_.stream)(src, src_stride, dst, dst_stride, block.scale, after(block, r, c), lines);
    } else if (how != Treatment::strided) {
      done = partial(choose(how, false), src, dst, rows, columns, block.scale, lines);
    }
    for (int64_t i = 0; !done && i < columns; ++i) {
      call_.strided(src + i * call_.in, src_stride, dst + i * dst_stride, call_.out, rows, &block.scale, 0);
    }
  }

  // Where the next tile's input begins; this one's if it is the block's last.
  const char* after(const Block& block, int64_t r, int64_t c) const {
    if (r + tile_rows < block.rows) return block.src + (r + tile_rows) * call_.layout.row.src + c * call_.in;
    return block.src + (c + tile_columns_ < block.columns ? c + tile_columns_ : c) * call_.in;
  }

  TileKernel choose(Treatment how, bool stream) const {
    if (how == Treatment::copy) return stream ? call_.kernels.stream_copy_tile : call_.kernels.copy_tile;
    return stream ? call_.kernels.stream_tile : call_.kernels.tile;
  }

  // A tile at the edge: through a whole one on the stack.
  bool partial(TileKernel kernel, const char* src, char* dst, int64_t rows, int64_t columns, float scale,
               Lines& lines) const {
    alignas(line_bytes) char whole_in[tile_rows * line_bytes] = {};
    alignas(line_bytes) char whole_out[tile_columns(DType::bf16) * tile_rows * size_of(DType::fp32)];  // the largest
    int64_t line = tile_rows * call_.out;
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(whole_in + i * line_bytes, src + i * call_.layout.row.src, columns * call_.in);
    }
    bool done = kernel(whole_in, line_bytes, whole_out, line, scale, whole_in, lines);
    for (int64_t i = 0; done && i < columns; ++i) {
      std::memcpy(dst + i * call_.layout.column.dst, whole_out + i * line, rows * call_.out);
    }
    return done;
  }

  const Call& call_;
  int64_t tile_columns_;
  int64_t block_columns_, down_, across_;
};

// Rows of any stride: contiguous ones by the row kernels, others element by element. A piece is a part of a long row,
// or some short rows.
class RowWork {
 public:
  explicit RowWork(const Call& call) : call_(call), rows_(call.layout.outer_size()) {
    int64_t row_bytes = call.layout.row.size * call.in;
    parts_ = std::max<int64_t>(1, row_bytes / piece_bytes);
    part_ = ceil_div(ceil_div(call.layout.row.size, parts_), line_bytes) * line_bytes;
    parts_ = ceil_div(call.layout.row.size, part_);
    group_ = std::max<int64_t>(1, piece_bytes / row_bytes);
  }

  int64_t pieces() const { return ceil_div(rows_, group_) * parts_; }

  void run(int64_t begin, int64_t end) const {
    for (int64_t piece = begin; piece < end; ++piece) {
      int64_t first = piece / parts_ * group_, from = piece % parts_ * part_;
      int64_t n = std::min(part_, call_.layout.row.size - from);
      for (int64_t row = first; row < std::min(rows_, first + group_); ++row) convert(row, from, n);
    }
  }

 private:
  void convert(int64_t row, int64_t from, int64_t n) const {
    const Axis& axis = call_.layout.row;
    Offsets at = offsets_at(call_.layout.outer, row);
    const char* src = call_.move.src + at.src + from * axis.src;
    char* dst = call_.move.dst + at.dst + from * axis.dst;
    const float* scale = call_.move.scale == nullptr ? nullptr : call_.move.scale + at.scale + from * axis.scale;
    Treatment how = call_.layout.loop == Loop::rows ? treatment(call_, scale_at(call_, at.scale)) : Treatment::strided;
    if (how == Treatment::strided) {
      call_.strided(src, axis.src, dst, axis.dst, n, scale, axis.scale);
    } else if (how == Treatment::convert) {
      (call_.stream ? call_.kernels.stream_row : call_.kernels.row)(src, dst, n, scale == nullptr ? 1.0f : *scale);
    } else if (src != dst) {
      if (call_.stream) {
        call_.kernels.stream_copy_row(src, dst, n, 1.0f);
      } else {
        std::memcpy(dst, src, n * call_.out);
      }
    }
  }

  const Call& call_;
  int64_t rows_;
  int64_t parts_, part_;  // parts of a row, and a part's elements
  int64_t group_;         // rows of a piece
};

// Threads take runs of neighbouring pieces, several each, so that a slow one delays nobody for long.
template <class Work>
void divide(const Work& work, int threads, bool stream) {
  int64_t pieces = work.pieces(), run = std::max<int64_t>(1, pieces / (threads * 16));
  std::atomic<int64_t> next{0};
  run_on_threads(threads, [&] {
    StandardArithmetic standard;
    for (int64_t begin; (begin = next.fetch_add(run)) < pieces;) work.run(begin, std::min(begin + run, pieces));
#if defined(__x86_64__)
    if (stream) _mm_sfence();  // streaming stores are ordered by nothing else
#else
    (void)stream;
#endif
  });
}

// Whether results may bypass the caches: large ones, where every whole tile or row begins at an aligned address.
bool may_stream(const Move& move, const Layout& layout, int64_t bytes) {
  int64_t alignment = move.kernels->alignment;
  if (alignment == 0 || bytes < stream_bytes || move.src == move.dst) return false;
  if (layout.loop == Loop::rows) {  // the kernel goes element by element to the first aligned address
    alignment = size_of(move.out);
  }
  bool aligned = reinterpret_cast<uintptr_t>(move.dst) % alignment == 0 && layout.column.dst % alignment == 0;
  for (const Axis& axis : layout.outer) aligned = aligned && axis.dst % alignment == 0;
  return aligned;
}

}  // namespace

void run(const Move& move) {
  int64_t elements = 1;
  for (const Axis& axis : move.axes) elements *= axis.size;
  if (elements == 0) return;
  const PairKernels& kernels = move.kernels->pairs[static_cast<int>(move.in)][static_cast<int>(move.out)];
  Call call{move,
            plan_layout(move.axes, move.in, move.out),
            size_of(move.in),
            size_of(move.out),
            kernels,
            strided_kernel(move.in, move.out),
            false};
  call.stream = may_stream(move, call.layout, elements * call.out);
  int64_t useful = std::max<int64_t>(1, elements * (call.in + call.out) / thread_bytes);
  int threads = static_cast<int>(std::min<int64_t>(std::max(1, move.threads), useful));
  if (call.layout.loop == Loop::tiles) {
    divide(TileWork(call), threads, call.stream);
  } else {
    divide(RowWork(call), threads, call.stream);
  }
}

}  // namespace gemma4_moe
