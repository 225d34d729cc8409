// The columns of a product's right factor are divided into panels of 48, the last ones 16 to 48 wide.
#pragma once

#include <cstdint>

namespace moe_fast {

constexpr int64_t kPanel = 48;  // 3 vectors of 16 floats: the fastest in oneDNN's AVX-512 kernel

// The width of the panel that begins at `column` of n. Where 48 and 16 columns would be left, two
// panels have 32: a product with 16 columns takes nearly as long as one with 32.
inline int64_t panel_width(int64_t n, int64_t column) {
  const int64_t left = (n - column + 15) / 16 * 16;
  if (left == 64) return 32;
  return left < kPanel ? left : kPanel;
}

// The first column of the panel that holds `column`.
inline int64_t panel_of(int64_t n, int64_t column) {
  const int64_t panel = column / kPanel * kPanel;
  const int64_t before = panel - kPanel, left = (n - panel + 15) / 16 * 16;
  if (left == 64) return column < panel + 32 ? panel : panel + 32;
  if (left == 16 && before >= 0) return before + 32;
  return panel;
}

}  // namespace moe_fast
