#include "od_map.h"

#include "cpu.h"

#if defined(__GNUC__) && defined(__x86_64__)
#define WSI_HAVE_AVX2_BUILD
#include <immintrin.h>

#include <cstring>
#endif

namespace wsi {
namespace {

void map_pixels_portable(const OdMap& map, const uint8_t* rgb, int64_t n_px, uint8_t* out) {
  const float *tables = map.tables, bias = map.bias;
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
#define WSI_AVX2 __attribute__((target("avx2")))
#define WSI_AVX2_INLINE __attribute__((target("avx2"), always_inline)) inline

struct Tables {
  const char *red, *green, *blue;
};

// Where the rows of 24 values begin in their tables, in bytes. Half of the values are loaded one by one and half are
// shifted out of words: a core that is busy with table rows has room for some of either, and for no more of one.
WSI_AVX2_INLINE void row_offsets(const uint8_t* rgb, uint64_t* offset) {
#pragma GCC unroll 3
  for (int i = 0; i < 24; i += 8) {
    uint32_t word;
    std::memcpy(&word, rgb + i, 4);
    offset[i] = word << 4 & 0xff0;
    offset[i + 1] = word >> 4 & 0xff0;
    offset[i + 2] = word >> 12 & 0xff0;
    offset[i + 3] = word >> 20 & 0xff0;
#pragma GCC unroll 4
    for (int k = 4; k < 8; ++k) offset[i + k] = static_cast<uint64_t>(rgb[i + k]) << 4;
  }
}

WSI_AVX2_INLINE __m128 row(const char* table, uint64_t offset) {
  return _mm_loadu_ps(reinterpret_cast<const float*>(table + offset));
}

WSI_AVX2_INLINE __m128 product(const Tables& t, const uint64_t* offset) {
  return _mm_mul_ps(_mm_mul_ps(row(t.red, offset[0]), row(t.green, offset[1])), row(t.blue, offset[2]));
}

// Two pixels as 32-bit integers, of 0 to 255 where clamped. Rows are multiplied in halves, whose loads cost nothing.
template <bool kClamp>
WSI_AVX2_INLINE __m256i map_two(const Tables& t, const uint64_t* a, const uint64_t* b, __m256 bias) {
  __m256 value = _mm256_insertf128_ps(_mm256_castps128_ps256(product(t, a)), product(t, b), 1);
  value = _mm256_add_ps(value, bias);
  if (kClamp) value = _mm256_min_ps(value, _mm256_set1_ps(255.0f));
  return _mm256_cvttps_epi32(value);
}

// Eight pixels a step, packed to bytes; each half is stored as 16 bytes of which the last four are overwritten.
template <bool kClamp>
WSI_AVX2 void map_pixels_avx2(const OdMap& map, const uint8_t* rgb, int64_t n_px, uint8_t* out) {
  const __m256i drop_fourth = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1,  //
                                               0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
  const __m256 bias8 = _mm256_set1_ps(map.bias);
  const char* bytes = reinterpret_cast<const char*>(map.tables);
  const Tables t = {bytes, bytes + 4096, bytes + 8192};
  int64_t i = 0;
  for (; i + 10 <= n_px; i += 8) {  // two pixels more, so that the last four bytes are still ours
    uint64_t at[24];
    row_offsets(rgb + 3 * i, at);
    const __m256i low =
        _mm256_packs_epi32(map_two<kClamp>(t, at, at + 12, bias8), map_two<kClamp>(t, at + 3, at + 15, bias8));
    const __m256i high =
        _mm256_packs_epi32(map_two<kClamp>(t, at + 6, at + 18, bias8), map_two<kClamp>(t, at + 9, at + 21, bias8));
    const __m256i mapped = _mm256_shuffle_epi8(_mm256_packus_epi16(low, high), drop_fourth);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 3 * i), _mm256_castsi256_si128(mapped));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 3 * i + 12), _mm256_extracti128_si256(mapped, 1));
  }
  map_pixels_portable(map, rgb + 3 * i, n_px - i, out + 3 * i);
}

// The largest factors of a table, by channel.
WSI_AVX2_INLINE __m128 largest(const float* table) {
  __m256 found[4] = {};
  for (int i = 0; i < 1024; i += 32)
    for (int k = 0; k < 4; ++k) found[k] = _mm256_max_ps(found[k], _mm256_loadu_ps(table + i + 8 * k));
  const __m256 all = _mm256_max_ps(_mm256_max_ps(found[0], found[1]), _mm256_max_ps(found[2], found[3]));
  return _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// Whether no product leaves the range of 32-bit integers: then packing to bytes clamps, and the kernel need not.
// Products of floats round monotonically, so that none is above that of the largest factors.
WSI_AVX2 bool fits_int32(const OdMap& map) {
  const float* t = map.tables;
  const __m128 product = _mm_mul_ps(_mm_mul_ps(largest(t), largest(t + 1024)), largest(t + 2048));
  const __m128 fits = _mm_cmplt_ps(_mm_add_ps(product, _mm_set1_ps(map.bias)), _mm_set1_ps(2147483648.0f));
  return (_mm_movemask_ps(fits) & 7) == 7;
}

#endif

}  // namespace

template <>
Kernel<OdMap> fastest(const OdMap& map) {
#if defined(WSI_HAVE_AVX2_BUILD)
  static const bool have_avx2 = __builtin_cpu_supports("avx2");
  if (have_avx2) return fits_int32(map) ? map_pixels_avx2<false> : map_pixels_avx2<true>;
#endif
  return map_pixels_portable;
}

template <>
Kernel<OdMap> portable<OdMap>() {
  return map_pixels_portable;
}

WSI_BUILD_CPU(OdMap)

}  // namespace wsi
