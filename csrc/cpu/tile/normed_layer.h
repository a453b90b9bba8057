// A pointwise layer after a LayerNorm, or without one: weight @ LN(x) + bias.
//
// With x the normalised pixels, LayerNorm's weight and bias go into those of the layer: weight' = weight * gain and
// bias' = bias + weight @ shift. So the gradients of all four parameters follow from the sums over the pixels of ds x^T
// and of ds.
#pragma once

#include "cpu/tile/linear.h"
#include "cpu/tile/pixel_sums.h"

namespace seemore::SEEMORE_ISA {

template <class A, class Cell = A>
class NormedLayer {
 public:
  NormedLayer(const Parameter& norm_weight, const Parameter& norm_bias, const Parameter& weight, const Parameter& bias,
              int64_t rows, int64_t channels)
      : forward(rows, channels),
        backward(channels, rows),
        has_norm_(norm_weight.data),
        rows_(rows),
        channels_(channels),
        weight_(rows * channels),
        gain_(channels),
        shift_(channels) {
    read_values<A>(weight_, weight, rows * channels);
    for (int64_t c = 0; c < channels; ++c) gain_[c] = 1, shift_[c] = 0;
    if (has_norm_) read_values<A>(gain_, norm_weight, channels), read_values<A>(shift_, norm_bias, channels);
    const auto one = [](int64_t) { return A{1}; };
    const auto gain = [&](int64_t c) { return gain_[c]; };
    forward.pack([&](int64_t r, int64_t c) { return weight_[r * channels + c]; }, one, gain);
    backward.pack([&](int64_t c, int64_t r) { return weight_[r * channels + c]; }, gain, one);
    for (int64_t r = 0; r < rows; ++r) {
      double sum = value_of<A>(bias, r);
      for (int64_t c = 0; c < channels; ++c) sum += static_cast<double>(weight_[r * channels + c]) * shift_[c];
      forward.bias(r) = static_cast<A>(sum);
    }
  }

  bool has_norm() const { return has_norm_; }

  // Of a part's sums: for each row those of ds x^T, then that of ds.
  int64_t sums() const { return rows_ * columns(); }

  // Adds up the products of ds (rows, zero beyond the pixels) and normalised pixels.
  void add_gradients(A* sums, const A* ds, int64_t ds_row_stride, const A* x, int64_t x_row_stride,
                     int64_t width) const {
    add_outer<A, Cell>(sums, columns(), ds, ds_row_stride, rows_, x, x_row_stride, channels_, width);
    for (int64_t r = 0; r < rows_; ++r)
      sums[r * columns() + channels_] += total<A>(row_sum(ds + r * ds_row_stride, width));
  }

  void write_gradients(const A* sums, const Parameter& dnorm_weight, const Parameter& dnorm_bias,
                       const Parameter& dweight, const Parameter& dbias) const {
    for (int64_t r = 0; r < rows_; ++r) {
      const A of_bias = sums[r * columns() + channels_];
      set_value(dbias, r, of_bias);
      for (int64_t c = 0; c < channels_; ++c) {
        set_value(dweight, r * channels_ + c, sums[r * columns() + c] * gain_[c] + of_bias * shift_[c]);
      }
    }
    for (int64_t c = 0; c < channels_ && has_norm_; ++c) {
      double dgain = 0, dshift = 0;
      for (int64_t r = 0; r < rows_; ++r) {
        dgain += static_cast<double>(weight_[r * channels_ + c]) * sums[r * columns() + c];
        dshift += static_cast<double>(weight_[r * channels_ + c]) * sums[r * columns() + channels_];
      }
      set_value(dnorm_weight, c, dgain);
      set_value(dnorm_bias, c, dshift);
    }
  }

  Linear<A, Cell> forward, backward;  // of normalised pixels, and to their gradient

 private:
  int64_t columns() const { return channels_ + 1; }

  bool has_norm_;
  int64_t rows_, channels_;
  Buffer<A> weight_, gain_, shift_;
};

}  // namespace seemore::SEEMORE_ISA
