// The blocks that products read, and the packing of rows and weights into them.
//
// A product's right factor [K, N] is stored in panels of columns (panels.h); a panel is [K, width]
// floats, or [K / 2, width] pairs of bf16. So the panel that begins at column c starts at element
// c * K, and a whole factor takes K * round_up(N, 16) elements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "gemm.h"
#include "panels.h"
#include "simd.h"

namespace moe_fast {

constexpr int64_t kDepth = 768;  // of a product's K at a time, so that panels stay in the cache
constexpr int64_t kGroup = 32;   // rows are padded to multiples of it, so that kernels are few

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// The size of equal blocks of at most `most` rows (a multiple of kGroup). They replace full blocks
// and a small last one, because each block reads the weights again, however few its rows.
inline int64_t even_blocks(int64_t rows, int64_t most) {
  const int64_t blocks = (rows + most - 1) / most;
  return round_up((rows + blocks - 1) / blocks, kGroup);
}

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }
inline const char* at(const void* data, Dtype dtype, int64_t element) {
  return static_cast<const char*>(data) + element * bytes_of(dtype);
}
inline char* at(void* data, Dtype dtype, int64_t element) {
  return static_cast<char*>(data) + element * bytes_of(dtype);
}

// Scratch memory that grows when needed and is never cleared. Each thread keeps its own between
// calls, because new memory costs a page fault per 4 KiB, as much as the work in it.
class Buffer {
 public:
  // Memory for `count` elements; growing loses the contents. get(0) returns it as the last call
  // did.
  template <typename T>
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (kExact ? count > 0 && bytes != size_ : bytes > size_) {
      data_.reset();
      size_ = 0;
      void* memory = nullptr;
      if (posix_memalign(&memory, 64, bytes) != 0) throw std::bad_alloc();
      data_.reset(memory);
      size_ = bytes;
    }
    return static_cast<T*>(data_.get());
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr bool kExact = true;  // so that a write past the end is always detected
#else
  static constexpr bool kExact = false;
#endif
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

// `count` values from `first` on as floats, or null if the tensor is absent.
inline const float* load_floats(const void* data, Dtype dtype, int64_t first,
                                int64_t count, Buffer& buffer) {
  if (data == nullptr) return nullptr;
  float* out = buffer.get<float>(count);
  simd().load(at(data, dtype, first), dtype, out, count);
  return out;
}

// Writes floats [rows, columns] as rows of `dtype`, `ld` apart.
inline void store_matrix(const float* from, int64_t rows, int64_t columns, Dtype dtype, void* to,
                  int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    simd().store(from + r * columns, dtype, at(to, dtype, r * ld), columns);
  }
}

// Writes zeros to `count` rows of `size` elements, from row `first` on.
inline void zero_rows(void* data, Dtype dtype, int64_t first, int64_t count, int64_t size) {
  if (count == 0 || size == 0) return;  // then data may be null
  std::memset(at(data, dtype, first * size), 0,
              static_cast<size_t>(count * size * bytes_of(dtype)));
}

// Prefetches memory that will be read soon; does nothing for null.
inline void prefetch(const void* data, int64_t bytes) {
#if defined(__GNUC__)
  if (data == nullptr) return;
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(data) + i);
  }
#endif
}

// Reordered rows of a tensor [*, dim]: row i is the tensor's row index[i].
struct RowSource {
  const void* data;
  Dtype dtype;
  int64_t dim;
  const int64_t* index;
  const void* row(int64_t i) const { return at(data, dtype, index[i] * dim); }
};

// A left factor [M, K], in place or copied: its data and leading dimension.
template <typename G>
struct LeftFactor {
  const G* data;
  int64_t ld;
};

// `rows` rows of `columns` elements of `dtype`, `ld` apart, as a left factor of G for a right one of
// `width` columns. The rows are used in place if their dtype allows it. Without AMX tiles, bf16 rows
// for few columns are copied first: oneDNN reads many rows at once, in pieces too short for the
// processor's prefetching, while a copy reads one row after the other (4 to 10 against 16 GB/s of
// weights, width 16).
template <typename G>
LeftFactor<G> left_factor(const Gemm& gemm, const void* data, Dtype dtype, int64_t ld, int64_t rows,
                          int64_t columns, int64_t width, Buffer& buffer) {
  constexpr Dtype wanted = std::is_same_v<G, float> ? Dtype::f32 : Dtype::bf16;
  constexpr int64_t kFew = 48;
  if (dtype == wanted &&
      (dtype == Dtype::f32 || width > kFew || gemm.fits_tiles(rows, columns))) {
    return {static_cast<const G*>(data), ld};
  }
  G* copy = buffer.get<G>(rows * columns);
  for (int64_t r = 0; r < rows; ++r) {
    const char* row = at(data, dtype, r * ld);
    if constexpr (std::is_same_v<G, float>) {
      simd().load(row, dtype, copy + r * columns, columns);
    } else {
      std::memcpy(copy + r * columns, row, static_cast<size_t>(columns) * sizeof(G));
    }
  }
  return {copy, columns};
}

inline void run(const Gemm& gemm, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  gemm.f32(m, n, k, a, lda, b, ldb, c, ldc, add);
}
inline void run(const Gemm& gemm, int64_t m, int64_t n, int64_t k, const Bf16* a, int64_t lda,
                const Bf16* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  gemm.bf16(m, n, k, a, lda, b, ldb, c, ldc, add);
}

// tiles (+)= A [m, k] B: one contiguous tile [m, width] per panel of B.
template <typename G>
void multiply_tiles(const Gemm& gemm, LeftFactor<G> a, int64_t m, int64_t k, const G* b, int64_t n,
                    float* tiles) {
  if constexpr (std::is_same_v<G, Bf16>) {
    if (gemm.fits_tiles(m, k)) return gemm.tiles(m, n, k, a.data, a.ld, b, tiles, 0, false);
  }
  for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
    const int64_t depth = std::min(kDepth, k - k0);
    for (int64_t column = 0, width; column < n; column += width) {
      width = panel_width(n, column);
      run(gemm, m, width, depth, a.data + k0, a.ld, b + column * k + k0 * width, width,
          tiles + column * m, width, k0 > 0);
    }
  }
}

// C [m, n] (+)= A [m, k] B, C row-major.
template <typename G>
void multiply(const Gemm& gemm, LeftFactor<G> a, int64_t m, int64_t k, const G* b, int64_t n,
              float* c, int64_t ldc, bool add) {
  if constexpr (std::is_same_v<G, Bf16>) {
    if (gemm.fits_tiles(m, k) && n % 16 == 0) {
      return gemm.tiles(m, n, k, a.data, a.ld, b, c, ldc, add);
    }
  }
  constexpr int64_t kRows = 128;
  for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
    const int64_t depth = std::min(kDepth, k - k0);
    for (int64_t i = 0; i < m; i += kRows) {
      for (int64_t column = 0, width; column < n; column += width) {
        width = panel_width(n, column);
        run(gemm, std::min(kRows, m - i), std::min(width, n - column), depth,
            a.data + i * a.ld + k0, a.ld, b + column * k + k0 * width, width, c + i * ldc + column,
            ldc, add || k0 > 0);
      }
    }
  }
}

// Transposes up to 16 rows at a time: out[c * ld + j] = rows[j][c].
inline void transpose_floats(const float* rows, int64_t row_ld, int64_t num_rows, int64_t n,
                             float* out, int64_t ld) {
  for (int64_t r = 0; r < num_rows; r += 16) {
    const int64_t here = std::min<int64_t>(16, num_rows - r);
    const uint32_t* pointers[16];
    for (int64_t j = 0; j < here; ++j) {
      pointers[j] = reinterpret_cast<const uint32_t*>(rows + (r + j) * row_ld);
    }
    simd().transpose(pointers, here, n, reinterpret_cast<uint32_t*>(out + r), ld);
  }
}

// Packs rows first .. first + count as the columns of a right factor [dim, count].
template <typename G>
void pack_columns(const RowSource& source, int64_t first, int64_t count, G* panels,
                  Buffer& buffer) {
  constexpr int64_t pair = sizeof(float) / sizeof(G);
  const bool convert = sizeof(G) == sizeof(float) && source.dtype != Dtype::f32;
  float* converted = convert ? buffer.get<float>(16 * source.dim) : nullptr;
  for (int64_t j = 0; j < count; j += 16) {
    const int64_t here = std::min<int64_t>(16, count - j);
    const uint32_t* rows[16];
    for (int64_t i = 0; i < here; ++i) {
      const void* row = source.row(first + j + i);
      if (convert) {
        simd().load(row, source.dtype, converted + i * source.dim, source.dim);
        row = converted + i * source.dim;
      }
      rows[i] = static_cast<const uint32_t*>(row);
    }
    const int64_t column = panel_of(count, j);
    auto* out = reinterpret_cast<uint32_t*>(panels + column * source.dim) + (j - column);
    simd().transpose(rows, here, source.dim / pair, out, panel_width(count, column));
  }
}

// Packs row k (float) or rows k and k + 1 (bf16) of a right factor [depth, n]; null stands for
// zeros.
template <typename G>
void put_rows(const void* a, const void* b, Dtype dtype, int64_t k, int64_t depth, int64_t n,
              G* panels) {
  for (int64_t column = 0, width; column < n; column += width) {
    width = panel_width(n, column);
    const int64_t used = std::min(width, n - column);
    auto* out = reinterpret_cast<uint32_t*>(panels + column * depth + k * width);
    const auto from = [&](const void* row) {
      return row == nullptr ? nullptr : at(row, dtype, column);
    };
    if constexpr (std::is_same_v<G, float>) {
      if (a == nullptr) {
        std::memset(out, 0, static_cast<size_t>(used) * sizeof(float));
      } else {
        simd().load(from(a), dtype, reinterpret_cast<float*>(out), used);
      }
    } else {
      static constexpr uint32_t zeros[kPanel] = {};
      const void* lower = a == nullptr ? static_cast<const void*>(zeros) : from(a);
      const void* upper = b == nullptr ? static_cast<const void*>(zeros) : from(b);
      if (dtype == Dtype::f32) {
        simd().round_pairs(static_cast<const float*>(lower), static_cast<const float*>(upper),
                             out, used);
      } else {
        simd().interleave(static_cast<const uint16_t*>(lower),
                            static_cast<const uint16_t*>(upper), out, used);
      }
    }
    std::memset(out + used, 0, static_cast<size_t>(width - used) * sizeof(uint32_t));
  }
}

// Packs a right factor [depth, n] whose row k is row(k); null stands for zeros.
template <typename G, typename Row>
void pack_rows(Row row, Dtype dtype, int64_t depth, int64_t n, G* panels) {
  constexpr int64_t step = sizeof(float) / sizeof(G);
  constexpr int64_t ahead = 8;  // rows are pieces of longer ones, which processors do not prefetch
  for (int64_t k = 0; k < depth; k += step) {
    for (int64_t next = k + ahead; next < std::min(k + ahead + step, depth); ++next) {
      prefetch(row(next), n * bytes_of(dtype));
    }
    put_rows(row(k), step == 1 ? nullptr : row(k + 1), dtype, k, depth, n, panels);
  }
}

// Packs a right factor [depth, n] of rows that are `ld` apart. Those that become floats are packed 16
// at a time, because a call for each piece of 48 columns would cost as much as its work.
template <typename G>
void pack_matrix(const void* data, Dtype dtype, int64_t ld, int64_t depth, int64_t n, G* panels) {
  if constexpr (!std::is_same_v<G, float>) {
    pack_rows([&](int64_t k) { return at(data, dtype, k * ld); }, dtype, depth, n, panels);
  } else {
    constexpr int64_t kStep = 16;
    for (int64_t k = 0; k < depth; k += kStep) {
      const int64_t rows = std::min(kStep, depth - k);
      for (int64_t next = k + kStep; next < std::min(k + 2 * kStep, depth); ++next) {
        prefetch(at(data, dtype, next * ld), n * bytes_of(dtype));
      }
      for (int64_t column = 0, width; column < n; column += width) {
        width = panel_width(n, column);
        const int64_t used = std::min(width, n - column);
        float* out = panels + column * depth + k * width;
        simd().load_rows(at(data, dtype, k * ld + column), dtype, ld, rows, used, out, width);
        for (int64_t r = 0; used < width && r < rows; ++r) {
          std::fill(out + r * width + used, out + (r + 1) * width, 0.0f);
        }
      }
    }
  }
}

// Rounds `num_rows` <= 32 rows of floats, `row_ld` apart, to G and writes them transposed, to
// out[c * ld + r] for r < 32, with zeros from num_rows on. `buffer` holds pairs of rows.
template <typename G>
void put_transposed(const float* rows, int64_t row_ld, int64_t num_rows, int64_t n, G* out,
                    int64_t ld, Buffer& buffer) {
  if constexpr (std::is_same_v<G, float>) {
    for (int64_t r = 0; r < kGroup; r += 16) {
      const int64_t here = std::clamp<int64_t>(num_rows - r, 0, 16);
      const uint32_t* pointers[16];
      for (int64_t j = 0; j < here; ++j) {
        pointers[j] = reinterpret_cast<const uint32_t*>(rows + (r + j) * row_ld);
      }
      simd().transpose(pointers, here, n, reinterpret_cast<uint32_t*>(out + r), ld);
    }
  } else {
    const int64_t pairs = (num_rows + 1) / 2;
    uint32_t* words = buffer.get<uint32_t>((pairs + 1) * n);
    auto* zeros = reinterpret_cast<float*>(words + pairs * n);
    std::memset(zeros, 0, static_cast<size_t>(n) * sizeof(float));
    const uint32_t* pointers[16];
    for (int64_t p = 0; p < pairs; ++p) {
      const float* upper = 2 * p + 1 < num_rows ? rows + (2 * p + 1) * row_ld : zeros;
      simd().round_pairs(rows + 2 * p * row_ld, upper, words + p * n, n);
      pointers[p] = words + p * n;
    }
    simd().transpose(pointers, pairs, n, reinterpret_cast<uint32_t*>(out), ld / 2);
  }
}

}  // namespace moe_fast
