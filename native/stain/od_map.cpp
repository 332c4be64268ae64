#include "od_map.h"

#include "planes.h"

#if defined(__GNUC__) && defined(__x86_64__)
#define WSI_HAVE_AVX2_BUILD
#include <immintrin.h>
#endif

namespace wsi {
namespace {

inline void map_pixels_portable(const uint8_t* rgb, int64_t n_px, const float* tables, float bias, uint8_t* out) {
  for (int64_t i = 0; i < n_px; ++i) {
    const float *red = tables + 4 * rgb[3 * i], *green = tables + 4 * (256 + rgb[3 * i + 1]),
                *blue = tables + 4 * (512 + rgb[3 * i + 2]);
    for (int c = 0; c < 3; ++c) {
      const float value = red[c] * green[c] * blue[c] + bias;  // above -1, which truncates to 0
      out[3 * i + c] = static_cast<uint8_t>(static_cast<int>(value < 255.0f ? value : 255.0f));
    }
  }
}

#if defined(WSI_HAVE_AVX2_BUILD)

// The products of two pixels, a table row each in either half, as 32-bit integers of 0 to 255.
__attribute__((target("avx2"), always_inline)) inline __m256i map_two(const uint8_t* a, const uint8_t* b,
                                                                      const float* tables, __m256 bias) {
  __m256 factor[3];
  for (int k = 0; k < 3; ++k)
    factor[k] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(tables + 4 * (256 * k + a[k]))),
                                     _mm_loadu_ps(tables + 4 * (256 * k + b[k])), 1);
  const __m256 value = _mm256_add_ps(_mm256_mul_ps(_mm256_mul_ps(factor[0], factor[1]), factor[2]), bias);
  return _mm256_cvttps_epi32(_mm256_min_ps(value, _mm256_set1_ps(255.0f)));
}

// Eight pixels a step, packed to bytes; each half is stored as 16 bytes of which the last four are overwritten.
__attribute__((target("avx2"))) void map_pixels_avx2(const uint8_t* rgb, int64_t n_px, const float* tables, float bias,
                                                     uint8_t* out) {
  const __m256i drop_fourth = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1,  //
                                               0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
  const __m256 bias8 = _mm256_set1_ps(bias);
  int64_t i = 0;
  for (; i + 10 <= n_px; i += 8) {  // two pixels more, so that the last four bytes are still ours
    const uint8_t* px = rgb + 3 * i;
    const __m256i low =
        _mm256_packs_epi32(map_two(px, px + 12, tables, bias8), map_two(px + 3, px + 15, tables, bias8));
    const __m256i high =
        _mm256_packs_epi32(map_two(px + 6, px + 18, tables, bias8), map_two(px + 9, px + 21, tables, bias8));
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_packus_epi16(low, high), drop_fourth);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 3 * i), _mm256_castsi256_si128(bytes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 3 * i + 12), _mm256_extracti128_si256(bytes, 1));
  }
  map_pixels_portable(rgb + 3 * i, n_px - i, tables, bias, out + 3 * i);
}

#endif

void map_pixels(const uint8_t* rgb, int64_t n_px, const float* tables, float bias, uint8_t* out) {
#if defined(WSI_HAVE_AVX2_BUILD)
  static const bool have_avx2 = __builtin_cpu_supports("avx2");
  if (have_avx2) return map_pixels_avx2(rgb, n_px, tables, bias, out);
#endif
  map_pixels_portable(rgb, n_px, tables, bias, out);
}

}  // namespace

void od_map(const uint8_t* rgb, int64_t n_px, const float* tables, float bias, uint8_t* out) {
  map_pixels(rgb, n_px, tables, bias, out);
}

void od_map_portable(const uint8_t* rgb, int64_t n_px, const float* tables, float bias, uint8_t* out) {
  map_pixels_portable(rgb, n_px, tables, bias, out);
}

template <typename Element>
void od_map_planes(const uint8_t* rgb, int64_t n_images, int64_t n_px, const float* tables, float bias,
                   const Element* levels, Element* out) {
  map_to_planes(rgb, n_images, n_px, levels, out, [=](const uint8_t* from, int64_t n, uint8_t* to) {
    map_pixels(from, n, tables, bias, to);
  });
}

template void od_map_planes(const uint8_t*, int64_t, int64_t, const float*, float, const uint16_t*, uint16_t*);
template void od_map_planes(const uint8_t*, int64_t, int64_t, const float*, float, const uint32_t*, uint32_t*);

}  // namespace wsi
