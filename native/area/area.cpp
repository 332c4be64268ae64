#include "area.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__GNUC__) && defined(__x86_64__)
#define WSI_HAVE_AVX2_BUILD
#include <immintrin.h>
#endif

namespace wsi {
namespace {

// The source pixels of each output column, and how much of each the column covers: the same for every row.
struct Columns {
  std::vector<int64_t> first;  // (out_w,) the first source pixel
  std::vector<int64_t> begin;  // (out_w + 1,) where its covers start
  std::vector<double> cover;   // in 1/4096 px

  Columns(const int64_t* edges, int64_t n) {
    begin.push_back(0);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t left = edges[i], right = edges[i + 1];
      first.push_back(left >> kFixedPointBits);
      for (int64_t x = first.back(); x << kFixedPointBits < right; ++x)
        cover.push_back(static_cast<double>(std::min(right, (x + 1) << kFixedPointBits) -
                                            std::max(left, x << kFixedPointBits)));
      begin.push_back(static_cast<int64_t>(cover.size()));
    }
  }
};

// Every product and sum below is a whole number under 2^52: exact in a double, in any order.
inline void average_row_portable(const uint32_t* sums, const Columns& columns, const int64_t* edges_x, int64_t out_w,
                                 double height, uint8_t* out) {
  for (int64_t ox = 0; ox < out_w; ++ox) {
    double sum[3] = {0, 0, 0};
    const uint32_t* px = sums + 3 * columns.first[ox];
    for (int64_t i = columns.begin[ox]; i < columns.begin[ox + 1]; ++i, px += 3)
      for (int c = 0; c < 3; ++c) sum[c] += columns.cover[i] * px[c];
    const double inverse = 1.0 / (height * static_cast<double>(edges_x[ox + 1] - edges_x[ox]));
    for (int c = 0; c < 3; ++c) out[3 * ox + c] = static_cast<uint8_t>(sum[c] * inverse + 0.5);
  }
}

#if defined(WSI_HAVE_AVX2_BUILD)

// The three channels of a pixel, and the red of the next, in the lanes of a register. `sums` has a pixel to spare.
__attribute__((target("avx2"))) void average_row_avx2(const uint32_t* sums, const Columns& columns,
                                                      const int64_t* edges_x, int64_t out_w, double height,
                                                      uint8_t* out) {
  const __m256d half = _mm256_set1_pd(0.5);
  const __m128i pack = _mm_setr_epi8(0, 4, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  for (int64_t ox = 0; ox < out_w; ++ox) {
    __m256d sum = _mm256_setzero_pd();
    const uint32_t* px = sums + 3 * columns.first[ox];
    for (int64_t i = columns.begin[ox]; i < columns.begin[ox + 1]; ++i, px += 3) {
      const __m256d value = _mm256_cvtepi32_pd(_mm_loadu_si128(reinterpret_cast<const __m128i*>(px)));  // below 2^31
      sum = _mm256_add_pd(sum, _mm256_mul_pd(_mm256_broadcast_sd(&columns.cover[i]), value));
    }
    const double inverse = 1.0 / (height * static_cast<double>(edges_x[ox + 1] - edges_x[ox]));
    const __m128i level =
        _mm256_cvttpd_epi32(_mm256_add_pd(_mm256_mul_pd(sum, _mm256_set1_pd(inverse)), half));
    const uint32_t bytes = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_shuffle_epi8(level, pack)));
    std::memcpy(out + 3 * ox, &bytes, 3);
  }
}

__attribute__((target("avx2"))) void add_row_avx2(const uint8_t* row, uint32_t cover, int64_t n, uint32_t* sums) {
  for (int64_t i = 0; i < n; ++i) sums[i] += cover * row[i];
}

#endif

inline void add_row_portable(const uint8_t* row, uint32_t cover, int64_t n, uint32_t* sums) {
  for (int64_t i = 0; i < n; ++i) sums[i] += cover * row[i];
}

}  // namespace

void area_average(const uint8_t* source, int64_t w, int64_t source_stride,
                  const int64_t* edges_y, int64_t out_h, const int64_t* edges_x, int64_t out_w,
                  uint8_t* out, int64_t out_stride, uint32_t* row_sums) {
  auto add_row = add_row_portable;
  auto average_row = average_row_portable;
#if defined(WSI_HAVE_AVX2_BUILD)
  static const bool have_avx2 = __builtin_cpu_supports("avx2");
  if (have_avx2) add_row = add_row_avx2, average_row = average_row_avx2;
#endif
  const Columns columns(edges_x, out_w);
  const int64_t x_begin = edges_x[0] >> kFixedPointBits;
  const int64_t x_end = std::min(w, (edges_x[out_w] + kOnePixel - 1) >> kFixedPointBits);
  for (int64_t oy = 0; oy < out_h; ++oy) {
    const int64_t top = edges_y[oy], bottom = edges_y[oy + 1];
    std::memset(row_sums + 3 * x_begin, 0, sizeof(uint32_t) * 3 * (x_end - x_begin));
    for (int64_t y = top >> kFixedPointBits; y << kFixedPointBits < bottom; ++y) {
      const int64_t cover = std::min(bottom, (y + 1) << kFixedPointBits) - std::max(top, y << kFixedPointBits);
      add_row(source + y * source_stride + 3 * x_begin, static_cast<uint32_t>(cover), 3 * (x_end - x_begin),
              row_sums + 3 * x_begin);
    }
    average_row(row_sums, columns, edges_x, out_w, static_cast<double>(bottom - top), out + oy * out_stride);
  }
}

}  // namespace wsi
