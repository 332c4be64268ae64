// What all stain kernels offer, on either device. A map is a small struct of tables: OdMap, SparseMap, LabMap.
// Specification: wsi/native/twin.py.
#pragma once
#include <cstdint>

namespace wsi {

// rgb, out: (n_px, 3), not overlapping.
template <typename Map>
void map_bytes(const Map& map, const uint8_t* rgb, int64_t n_px, uint8_t* out);

// What map_bytes is on the oldest processor of its kind; the same bytes, for tests.
template <typename Map>
void map_bytes_portable(const Map& map, const uint8_t* rgb, int64_t n_px, uint8_t* out);

// How (n_images, 3, n_px) lies in memory: by channels, or by pixels (which frameworks call channels-last).
enum class Layout { kPlanes, kPixels };

// map_bytes, and from there to a network's input: levels[c][byte], elements of 2 or 4 bytes, whose bits are moved and
// not computed with. rgb: (n_images, n_px, 3). levels: (3, 256). out: (n_images, 3, n_px).
template <typename Map, typename Element>
void map_tensor(const Map& map, const uint8_t* rgb, int64_t n_images, int64_t n_px, const Element* levels,
                Layout layout, Element* out);

// The CUDA twins: all pointers on the device, queued on the stream and not waited for; 0 or a cudaError_t.
template <typename Map>
int map_bytes_cuda(const Map& map, const uint8_t* rgb, int64_t n_px, uint8_t* out, void* stream);
template <typename Map, typename Element>
int map_tensor_cuda(const Map& map, const uint8_t* rgb, int64_t n_images, int64_t n_px, const Element* levels,
                    Layout layout, Element* out, void* stream);

}  // namespace wsi
