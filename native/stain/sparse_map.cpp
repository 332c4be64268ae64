#include "sparse_map.h"

#include "cpu.h"

namespace wsi {
namespace {

constexpr int kBlock = 256;

// Table look-ups apart from arithmetic, so that the compiler makes vector code of the arithmetic.
WSI_INLINE void map_blocks(const SparseMap& map, const uint8_t* rgb, int64_t n_px, uint8_t* out) {
  const float* density = map.density;
  float v[24];
  std::copy(map.values, map.values + 24, v);  // a local copy: no store below can change it
  for (int64_t start = 0; start < n_px; start += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, n_px - start));
    float r[kBlock] = {}, g[kBlock] = {}, b[kBlock] = {};
    int32_t mapped[3][kBlock];
    for (int i = 0; i < n; ++i) {
      const uint8_t* px = rgb + 3 * (start + i);
      r[i] = density[px[0]], g[i] = density[px[1]], b[i] = density[px[2]];
    }
    for (int i = 0; i < kBlock; ++i) {
      int32_t bytes[3];
      sparse::map_pixel(r[i], g[i], b[i], v, bytes);
      mapped[0][i] = bytes[0], mapped[1][i] = bytes[1], mapped[2][i] = bytes[2];
    }
    uint8_t* to = out + 3 * start;
    for (int i = 0; i < n; ++i)
      for (int c = 0; c < 3; ++c) to[3 * i + c] = static_cast<uint8_t>(mapped[c][i]);
  }
}

WSI_CLONES void map_pixels(const SparseMap& map, const uint8_t* rgb, int64_t n_px, uint8_t* out) {
  map_blocks(map, rgb, n_px, out);
}

void map_pixels_portable(const SparseMap& map, const uint8_t* rgb, int64_t n_px, uint8_t* out) {
  map_blocks(map, rgb, n_px, out);
}

}  // namespace

template <>
Kernel<SparseMap> fastest(const SparseMap&) {
  return map_pixels;
}

template <>
Kernel<SparseMap> portable<SparseMap>() {
  return map_pixels_portable;
}

WSI_BUILD_CPU(SparseMap)

}  // namespace wsi
