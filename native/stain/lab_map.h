// Reinhard's colour transfer: each channel of CIELAB scaled and shifted. Specification: wsi/native/twin.py.
#pragma once
#include "clones.h"
#include "map.h"

namespace wsi {

constexpr int kLabCodes = 16384;  // steps of linear light that the way back to bytes tells apart

struct LabMap {
  const float* linear;   // (256,) linear light of each byte
  const uint8_t* codes;  // (kLabCodes,) byte of each step of linear light
  const float* values;   // (26,) to XYZ (9, by rows, white is 1), from XYZ (9), scale (3), shift (3), ramp (2)
};

// Only + - * / and comparisons in this order, and the twin does the same in NumPy: the bits agree.
namespace lab {

WSI_INLINE float cube_root(float x) {  // x > 0: a start from the exponent, then two steps of Halley's iteration
#if defined(__CUDA_ARCH__)
  float y = __int_as_float(__float_as_int(x) / 3 + 709921077);
#else
  union { float f; int32_t i; } bits = {x};
  bits.i = bits.i / 3 + 709921077;
  float y = bits.f;
#endif
  for (int step = 0; step < 2; ++step) {
    const float cube = y * y * y;
    y = y * ((cube + (x + x)) / ((cube + cube) + x));
  }
  return y;
}

// CIE 15: the cube root above (6/29)^3, a straight line below.
WSI_INLINE float response(float x) {
  const float root = cube_root(x > 0.008856452f ? x : 0.008856452f);
  return x > 0.008856452f ? root : 7.787037f * x + 0.13793103f;
}

WSI_INLINE float inverse_response(float f) {
  return f > 0.20689656f ? f * f * f : (f - 0.13793103f) * 0.12841855f;
}

WSI_INLINE float row(const float* m, float a, float b, float c) { return m[0] * a + m[1] * b + m[2] * c; }

WSI_INLINE int32_t code(float light) {
  float step = light * (kLabCodes - 1) + 0.5f;
  step = step > 0.0f ? step : 0.0f;
  return static_cast<int32_t>(step < kLabCodes - 1 ? step : kLabCodes - 1);
}

// Linear light in, codes of linear light out.
WSI_INLINE void map_pixel(float r, float g, float b, const float* v, int32_t* codes) {
  const float fx = response(row(v, r, g, b)), fy = response(row(v + 3, r, g, b)), fz = response(row(v + 6, r, g, b));
  const float L = 116.0f * fy - 16.0f, A = 500.0f * (fx - fy), B = 200.0f * (fy - fz);
  float weight = v[24] - L * v[25];  // 1 in tissue, falling to 0 at white
  weight = weight > 0.0f ? weight : 0.0f;
  weight = weight < 1.0f ? weight : 1.0f;
  const float L1 = L + weight * ((L * v[18] + v[21]) - L);
  const float A1 = A + weight * ((A * v[19] + v[22]) - A);
  const float B1 = B + weight * ((B * v[20] + v[23]) - B);
  const float gy = (L1 + 16.0f) * 0.00862069f;
  const float x = inverse_response(gy + A1 * 0.002f), y = inverse_response(gy), z = inverse_response(gy - B1 * 0.005f);
  codes[0] = code(row(v + 9, x, y, z));
  codes[1] = code(row(v + 12, x, y, z));
  codes[2] = code(row(v + 15, x, y, z));
}

}  // namespace lab

}  // namespace wsi
