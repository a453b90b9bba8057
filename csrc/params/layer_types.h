// Images and parameters of the trained layers of the CPU library, each of a type of its own, as under autocast.
#pragma once

#include "params/views.h"

namespace seemore {

struct TypedImage {
  Image view;
  DType dtype;
};

// A parameter, contiguous; null where there is none.
struct Parameter {
  void* data;
  DType dtype;
};

}  // namespace seemore
