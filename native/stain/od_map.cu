#include <cuda_runtime.h>

#include "od_map.h"
#include "planes.cuh"

namespace wsi {
namespace {

__device__ __forceinline__ uint8_t to_byte(float value) {  // above -1, which truncates to 0
  return static_cast<uint8_t>(static_cast<int>(value < 255.0f ? value : 255.0f));
}

// The tables lie in shared memory (12 KiB): a row is one 16-byte load. Compiled without contraction (-fmad=false).
__device__ __forceinline__ void map_pixel(const uint8_t* px, const float4* tables, float bias, uint8_t* out) {
  const float4 r = tables[px[0]], g = tables[256 + px[1]], b = tables[512 + px[2]];
  out[0] = to_byte(r.x * g.x * b.x + bias);
  out[1] = to_byte(r.y * g.y * b.y + bias);
  out[2] = to_byte(r.z * g.z * b.z + bias);
}

__device__ __forceinline__ void stage(const float* tables, float4* shared) {
  for (int i = threadIdx.x; i < 768; i += kThreads)
    shared[i] = make_float4(tables[4 * i], tables[4 * i + 1], tables[4 * i + 2], tables[4 * i + 3]);
  __syncthreads();
}

__global__ void map_pixels(const uint8_t* rgb, int64_t n_px, const float* tables, float bias, uint8_t* out) {
  __shared__ float4 shared[768];
  stage(tables, shared);
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n_px; i += stride)
    map_pixel(rgb + 3 * i, shared, bias, out + 3 * i);
}

// Four pixels a thread: three 4-byte words in and out. For arrays that begin at a multiple of 4.
__global__ void map_quads(const uint32_t* rgb, int64_t n_quads, const float* tables, float bias, uint32_t* out) {
  __shared__ float4 shared[768];
  stage(tables, shared);
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n_quads; i += stride) {
    union { uint32_t words[3]; uint8_t bytes[12]; } in, mapped;
    for (int k = 0; k < 3; ++k) in.words[k] = rgb[3 * i + k];
    for (int k = 0; k < 4; ++k) map_pixel(in.bytes + 3 * k, shared, bias, mapped.bytes + 3 * k);
    for (int k = 0; k < 3; ++k) out[3 * i + k] = mapped.words[k];
  }
}

template <typename Element>
__global__ void map_planes(const uint8_t* rgb, int64_t n_px, int64_t px_per_image, const float* tables, float bias,
                           const Element* levels, Element* out) {
  __shared__ float4 shared[768];
  __shared__ Element shared_levels[768];
  for (int i = threadIdx.x; i < 768; i += kThreads) shared_levels[i] = levels[i];
  stage(tables, shared);
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n_px; i += stride) {
    uint8_t px[3];
    map_pixel(rgb + 3 * i, shared, bias, px);
    store_planes(i, px_per_image, px, shared_levels, out);
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 4 == 0; }

}  // namespace

int od_map_cuda(const uint8_t* rgb, int64_t n_px, const float* tables, float bias, uint8_t* out, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t n_quads = aligned(rgb) && aligned(out) ? n_px / 4 : 0, rest = n_px - 4 * n_quads;
  if (n_quads > 0)
    map_quads<<<blocks_for(n_quads), kThreads, 0, queue>>>(reinterpret_cast<const uint32_t*>(rgb), n_quads, tables,
                                                           bias, reinterpret_cast<uint32_t*>(out));
  if (rest > 0)
    map_pixels<<<blocks_for(rest), kThreads, 0, queue>>>(rgb + 12 * n_quads, rest, tables, bias, out + 12 * n_quads);
  return static_cast<int>(cudaGetLastError());
}

template <typename Element>
int od_map_planes_cuda(const uint8_t* rgb, int64_t n_images, int64_t n_px, const float* tables, float bias,
                       const Element* levels, Element* out, void* stream) {
  const int64_t all = n_images * n_px;
  if (all > 0)
    map_planes<<<blocks_for(all), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(rgb, all, n_px, tables, bias,
                                                                                   levels, out);
  return static_cast<int>(cudaGetLastError());
}

template int od_map_planes_cuda(const uint8_t*, int64_t, int64_t, const float*, float, const uint16_t*, uint16_t*,
                                void*);
template int od_map_planes_cuda(const uint8_t*, int64_t, int64_t, const float*, float, const uint32_t*, uint32_t*,
                                void*);

}  // namespace wsi
