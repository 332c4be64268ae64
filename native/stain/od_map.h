// Any fixed 3x3 map in optical density as a product of three table rows. Specification: wsi/native/twin.py.
#pragma once
#include "map.h"

namespace wsi {

// out_c = floor(clamp(T[0][r][c] * T[1][g][c] * T[2][b][c] + bias, 0, 255)).
// Tables are not negative, their products finite (see od_tables in wsi/stain/transform.py), and -1 < bias <= 1.
struct OdMap {
  const float* tables;  // (3, 256, 4): for each value of each input channel red, green, blue, and one for alignment
  float bias;
};

}  // namespace wsi
