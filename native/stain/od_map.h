// Any fixed 3x3 map in optical density as a product of three table rows. Specification: wsi/native/twin.py.
#pragma once
#include <cstdint>

namespace wsi {

// One row of four floats for each value of each input channel: red, green, blue, and one for alignment.
constexpr int kOdTableSize = 3 * 256 * 4;

// rgb, out: (n_px, 3), not overlapping. out_c = floor(clamp(T[0][r][c] * T[1][g][c] * T[2][b][c] + bias, 0, 255)).
// Tables are not negative, their products finite (see od_tables in wsi/stain/transform.py), and -1 < bias <= 1.
void od_map(const uint8_t* rgb, int64_t n_px, const float* tables, float bias, uint8_t* out);

// What od_map is where the processor has no AVX2; the same bytes, for tests.
void od_map_portable(const uint8_t* rgb, int64_t n_px, const float* tables, float bias, uint8_t* out);

// The same, and from there to planes: out[i][c][p] = levels[c][mapped], elements of 2 or 4 bytes.
// rgb: (n_images, n_px, 3). levels: (3, 256). out: (n_images, 3, n_px).
template <typename Element>
void od_map_planes(const uint8_t* rgb, int64_t n_images, int64_t n_px, const float* tables, float bias,
                   const Element* levels, Element* out);

// The CUDA twins: all pointers on the device, queued on the stream and not waited for; 0 or a cudaError_t.
int od_map_cuda(const uint8_t* rgb, int64_t n_px, const float* tables, float bias, uint8_t* out, void* stream);
template <typename Element>
int od_map_planes_cuda(const uint8_t* rgb, int64_t n_images, int64_t n_px, const float* tables, float bias,
                       const Element* levels, Element* out, void* stream);

}  // namespace wsi
