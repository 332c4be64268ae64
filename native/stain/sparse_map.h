// Non-negative, sparse amounts of two stains, shown in other colours. Specification: wsi/native/twin.py.
#pragma once
#include "clones.h"
#include "map.h"

namespace wsi {

struct SparseMap {
  const float* density;  // (256,) optical density of each byte
  const float* values;   // (24,) two rows of 4 for each stain (16), its powers of two in red, green and blue (6),
                         // the light of glass, bias
};

// Only + - * and comparisons in this order, and the twin does the same in NumPy: the bits agree.
namespace sparse {

WSI_INLINE float affine(const float* m, float r, float g, float b) { return m[0] * r + m[1] * g + m[2] * b + m[3]; }

// Both rows are amounts if their condition holds: of the stain alone, and beside the other. The smaller one is right.
WSI_INLINE float amount(const float* m, float r, float g, float b) {
  const float alone = affine(m, r, g, b), beside = affine(m + 4, r, g, b), least = alone < beside ? alone : beside;
  return least > 0.0f ? least : 0.0f;
}

// 2^x for x of -24 to 16: the whole part goes into the exponent, the rest (-1/2 to 1/2) into a polynomial.
WSI_INLINE float power_of_two(float x) {
  x = x > -24.0f ? x : -24.0f;
  x = x < 16.0f ? x : 16.0f;
  const int32_t whole = static_cast<int32_t>(x + 64.5f) - 64;
  const float f = x - static_cast<float>(whole);
  float p = 0.00015461445f;
  p = p * f + 0.0013400428f;
  p = p * f + 0.009618057f;
  p = p * f + 0.05550327f;
  p = p * f + 0.2402265f;
  p = p * f + 0.6931472f;
  p = p * f + 1.0f;
#if defined(__CUDA_ARCH__)
  return p * __int_as_float((whole + 127) << 23);
#else
  union { int32_t i; float f; } power = {(whole + 127) << 23};
  return p * power.f;
#endif
}

// Densities in, bytes out.
WSI_INLINE void map_pixel(float r, float g, float b, const float* v, int32_t* bytes) {
  const float first = amount(v, r, g, b), second = amount(v + 8, r, g, b);
  for (int c = 0; c < 3; ++c) {
    float value = v[22] * power_of_two(first * v[16 + c] + second * v[19 + c]) + v[23];
    value = value > 0.0f ? value : 0.0f;
    bytes[c] = static_cast<int32_t>(value < 255.0f ? value : 255.0f);
  }
}

}  // namespace sparse

}  // namespace wsi
