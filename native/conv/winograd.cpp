#include "winograd.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <algorithm>
#include <atomic>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#define WSI_INLINE inline __attribute__((always_inline))
#define WSI_UNROLL _Pragma("GCC unroll 8")

namespace wsi {
namespace {

constexpr int64_t kTiles = 48;  // of 4 x 4 output pixels, worked on at once: their transforms stay in the L2 cache
constexpr int64_t kApart = 16;  // floats between the 36 planes of a transform, lest all fall on one set of the L1 cache

template <int kWidth>
struct Vector {
  typedef float type __attribute__((vector_size(4 * kWidth)));
};

template <typename Vec>
WSI_INLINE void load(const float* p, Vec& v) { __builtin_memcpy(&v, p, sizeof(Vec)); }
template <typename Vec>
WSI_INLINE void store(float* p, const Vec& v) { __builtin_memcpy(p, &v, sizeof(Vec)); }

// B^T applied to a column of the input, A^T to one of the products (see wsi.native.twin). Lavin and Gray take 0, 1, -1, 2,
// -2 and infinity as points of interpolation; p, -p, q, -q with p q = 1 leave less than half of the rounding error.
constexpr float kP = 0.70710678118654752f, kQ = 1.41421356237309505f;  // 1 / sqrt(2), sqrt(2)

template <typename Vec>
WSI_INLINE void transform_input(const Vec (&d)[6], Vec (&v)[6]) {
  const Vec a = d[4] - 2 * d[2], b = kP * (d[3] - 2 * d[1]), c = d[4] - 0.5f * d[2], e = kQ * (d[3] - 0.5f * d[1]);
  v[0] = d[0] - 2.5f * d[2] + d[4];
  v[1] = a + b;
  v[2] = a - b;
  v[3] = c + e;
  v[4] = c - e;
  v[5] = d[1] - 2.5f * d[3] + d[5];
}

template <typename Vec>
WSI_INLINE void transform_output(const Vec (&m)[6], Vec (&y)[4]) {
  const Vec a = m[1] + m[2], b = kP * (m[1] - m[2]), c = m[3] + m[4], d = kQ * (m[3] - m[4]);
  y[0] = m[0] + a + c;
  y[1] = b + d;
  y[2] = 0.5f * a + 2 * c;
  y[3] = 0.5f * b + 2 * d + m[5];
}

// c (rows, kPanel), rows `c_step` apart = a (rows, k), rows `k` apart, times b (k, kPanel).
template <typename Vec, int kRows>
WSI_INLINE void multiply_rows(const float* a, const float* b, int64_t k, float* c, int64_t c_step) {
  constexpr int kWidth = sizeof(Vec) / sizeof(float), kVecs = kPanel / kWidth;
  Vec sum[kRows][kVecs] = {};
  for (int64_t i = 0; i < k; ++i) {
    WSI_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      Vec factors;
      load(b + i * kPanel + v * kWidth, factors);
      WSI_UNROLL
      for (int row = 0; row < kRows; ++row) sum[row][v] += a[row * k + i] * factors;
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int v = 0; v < kVecs; ++v) store(c + row * c_step + v * kWidth, sum[row][v]);
}

template <typename Vec, int kRows>
WSI_INLINE void multiply(const float* a, const float* b, int64_t n, int64_t k, float* c, int64_t c_step) {
  int64_t row = 0;
  for (; row + kRows <= n; row += kRows) multiply_rows<Vec, kRows>(a + row * k, b, k, c + row * c_step, c_step);
  for (; row < n; ++row) multiply_rows<Vec, 1>(a + row * k, b, k, c + row * c_step, c_step);
}

// A part of the work: some tiles, and some of the output channels.
struct Part {
  int64_t first_tile, tiles, first_panel, panels;
};

struct Scratch {
  explicit Scratch(const Convolution& f)
      : v_step(kTiles * f.c_in + kApart), m_step(kTiles * f.c_out + kApart), v(new float[kTransformed * v_step]),
        m(new float[kTransformed * m_step]), zeros(f.c_in) {}
  int64_t v_step, m_step;      // floats from one of the 36 planes to the next
  std::unique_ptr<float[]> v;  // transformed input (36, tiles, c_in)
  std::unique_ptr<float[]> m;  // products (36, tiles, channels of the part)
  std::vector<float> zeros;    // what lies outside the image
};

template <int kWidth, int kRows>
WSI_INLINE void convolve(const Convolution& f, const Part& part, Scratch& s) {
  using Vec = typename Vector<kWidth>::type;
  const int64_t rows = (f.h + 3) / 4, columns = (f.w + 3) / 4, channels = part.panels * kPanel;
  for (int64_t t = 0; t < part.tiles; ++t) {
    const int64_t tile = part.first_tile + t, image = tile / (rows * columns);
    const int64_t y0 = tile / columns % rows * 4 - 1, x0 = tile % columns * 4 - 1;
    const float* from[6][6];
    for (int64_t i = 0; i < 6; ++i)
      for (int64_t j = 0; j < 6; ++j) {
        const bool inside = y0 + i >= 0 && y0 + i < f.h && x0 + j >= 0 && x0 + j < f.w;
        from[i][j] = inside ? f.x + ((image * f.h + y0 + i) * f.w + x0 + j) * f.c_in : s.zeros.data();
      }
    for (int64_t c = 0; c < f.c_in; c += kWidth) {
      Vec half[6][6];
      WSI_UNROLL
      for (int j = 0; j < 6; ++j) {
        Vec d[6], v[6];
        WSI_UNROLL
        for (int i = 0; i < 6; ++i) load(from[i][j] + c, d[i]);
        transform_input(d, v);
        WSI_UNROLL
        for (int i = 0; i < 6; ++i) half[i][j] = v[i];
      }
      WSI_UNROLL
      for (int i = 0; i < 6; ++i) {
        Vec v[6];
        transform_input(half[i], v);
        WSI_UNROLL
        for (int j = 0; j < 6; ++j) store(&s.v[(6 * i + j) * s.v_step + t * f.c_in + c], v[j]);
      }
    }
  }
  for (int64_t k = 0; k < kTransformed; ++k)
    for (int64_t p = 0; p < part.panels; ++p) {
      const float* filters = f.filters + (k * (f.c_out / kPanel) + part.first_panel + p) * f.c_in * kPanel;
      multiply<Vec, kRows>(&s.v[k * s.v_step], filters, part.tiles, f.c_in, &s.m[k * s.m_step + p * kPanel], channels);
    }
  for (int64_t t = 0; t < part.tiles; ++t) {
    const int64_t tile = part.first_tile + t, image = tile / (rows * columns);
    const int64_t y0 = tile / columns % rows * 4, x0 = tile % columns * 4;
    for (int64_t c = 0; c < channels; c += kWidth) {
      Vec half[4][6];
      WSI_UNROLL
      for (int j = 0; j < 6; ++j) {
        Vec m[6], y[4];
        WSI_UNROLL
        for (int i = 0; i < 6; ++i) load(&s.m[(6 * i + j) * s.m_step + t * channels + c], m[i]);
        transform_output(m, y);
        WSI_UNROLL
        for (int i = 0; i < 4; ++i) half[i][j] = y[i];
      }
      const int64_t channel = part.first_panel * kPanel + c;
      Vec bias;
      load(f.bias + channel, bias);
      for (int i = 0; i < 4 && y0 + i < f.h; ++i) {
        Vec y[4];
        transform_output(half[i], y);
        for (int j = 0; j < 4 && x0 + j < f.w; ++j)
          store(f.y + ((image * f.h + y0 + i) * f.w + x0 + j) * f.c_out + channel, y[j] + bias);
      }
    }
  }
}

// Rows a step are as many as leave every sum in a register.
__attribute__((target("avx512f,fma"))) void convolve_avx512(const Convolution& f, const Part& part, Scratch& s) {
  convolve<16, 8>(f, part, s);
}

__attribute__((target("avx2,fma"))) void convolve_avx2(const Convolution& f, const Part& part, Scratch& s) {
  convolve<8, 3>(f, part, s);
}

}  // namespace

Instructions best_instructions() {
  if (__builtin_cpu_supports("avx512f")) return Instructions::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Instructions::kAvx2;
  return Instructions::kNone;
}

void winograd(const Convolution& f, int64_t threads, Instructions instructions) {
  const auto kernel = instructions == Instructions::kAvx512 ? convolve_avx512 : convolve_avx2;
  const int64_t tiles = f.n * ((f.h + 3) / 4) * ((f.w + 3) / 4), chunks = (tiles + kTiles - 1) / kTiles;
  const int64_t panels = f.c_out / kPanel;
  if (chunks == 0) return;
  // Where there are fewer chunks of tiles than threads, several share a chunk, each for some of the output channels.
  const int64_t shares = std::min(panels, (threads + chunks - 1) / chunks), parts = chunks * shares;
  std::vector<Scratch> scratch;
  for (int64_t i = 0; i < std::min(threads, parts); ++i) scratch.emplace_back(f);
  std::atomic<int64_t> next{0};
  auto work = [&](Scratch& own) {
    for (int64_t i; (i = next++) < parts;) {
      const int64_t tile = i / shares * kTiles, share = i % shares, panel = share * panels / shares;
      kernel(f, {tile, std::min(kTiles, tiles - tile), panel, (share + 1) * panels / shares - panel}, own);
    }
  };
  std::vector<std::thread> others;
  others.reserve(scratch.size());
  try {
    for (size_t i = 1; i < scratch.size(); ++i) others.emplace_back(work, std::ref(scratch[i]));
  } catch (const std::system_error&) {  // no more threads may start here: those there are do all the work
  }
  work(scratch[0]);
  for (auto& other : others) other.join();
}

}  // namespace wsi

#else

namespace wsi {
Instructions best_instructions() { return Instructions::kNone; }
void winograd(const Convolution&, int64_t, Instructions) {}
}  // namespace wsi

#endif
