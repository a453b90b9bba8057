// norm_pointwise on the CPU: a task takes a block of pixels with all their channels.
//
// With x the normalised pixels, LayerNorm's weight and bias go into those of the layer: weight' = weight * gain and
// bias' = bias + weight @ shift. So the sums over the pixels of ds x^T and of ds are all that the gradients of all four
// parameters are made of.

#include "norm_pointwise.h"

#include "layers.h"

namespace seemore::SEEMORE_ISA {
namespace {

constexpr int64_t kPixels = 1024;  // of a block: the gradients' blocks of 36 and 72 channels fit the second cache

// The layer's parameters in the type of sums, and packed.
template <class A>
struct Layer {
  Layer(const NormPointwise& in)
      : has_norm(in.norm_weight.data),
        channels(in.size.channels),
        rows(in.out_channels),
        weight(rows * channels),
        gain(channels),
        shift(channels),
        forward(rows, channels),
        backward(channels, rows) {
    for (int64_t i = 0; i < rows * channels; ++i) weight[i] = value_of<A>(in.weight, i);
    for (int64_t c = 0; c < channels; ++c) {
      gain[c] = has_norm ? value_of<A>(in.norm_weight, c) : 1;
      shift[c] = has_norm ? value_of<A>(in.norm_bias, c) : 0;
    }
    forward.pack([&](int64_t r, int64_t c) { return weight[r * channels + c] * gain[c]; });
    backward.pack([&](int64_t c, int64_t r) { return weight[r * channels + c] * gain[c]; });
    for (int64_t r = 0; r < rows; ++r) {
      double sum = value_of<A>(in.bias, r);
      for (int64_t c = 0; c < channels; ++c) sum += static_cast<double>(weight[r * channels + c]) * shift[c];
      forward.bias(r) = static_cast<A>(sum);
    }
  }

  bool has_norm;
  int64_t channels, rows;
  Buffer<A> weight, gain, shift;
  Weights<A> forward, backward;
};

template <class A>
void run_forward(const NormPointwise& in, const TypedImage& residual, const TypedImage& y) {
  const Layer<A> layer(in);
  const Blocks blocks(kPixels, in.size, in.x, residual, y);
  const int64_t span = blocks.largest();
  const bool is_gelu = in.activation == Activation::gelu;
  for_each_range(blocks.count(), [&](int64_t begin, int64_t end) {
    const Block<A> x(layer.channels, span), out(layer.rows, span), more(residual.view.data ? layer.rows : 0, span);
    const Block<A> scale(1, span);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t count = blocks.width(b), width = round_up(count, kLanes<A>);
      load_image(x, in.x, blocks.size, blocks.place(b, layer.channels, span), count);
      if (layer.has_norm) normalise_pixels<A>(x, span, layer.channels, width, scale, static_cast<A>(in.eps));
      const Place place = blocks.place(b, layer.rows, span);
      if (residual.view.data) load_image(more, residual, blocks.size, place, count);
      layer.forward(x, span, width, [&](int64_t row, int64_t i, const auto& sums) {
        each_vector(sums, layer.rows - row, [&](int64_t r, int64_t v, Vec<A> sum) {
          const int64_t at = (row + r) * span + i + v;
          if (is_gelu) sum = gelu<A>(sum);
          store(out + at, residual.view.data ? sum + load(more + at) : sum);
        });
      });
      store_image(y, place, out, count);
    }
  });
}

template <class A>
void run_backward(const NormPointwise& in, const NormPointwiseGradients& grad) {
  const Layer<A> layer(in);
  const Blocks blocks(kPixels, in.size, in.x, grad.dy, grad.dx);
  const int64_t span = blocks.largest(), columns = layer.channels + 1, sums = layer.rows * columns;
  const Buffer<A> partial(blocks.count() * sums);
  for_each_range(blocks.count(), [&](int64_t begin, int64_t end) {
    const Block<A> x(layer.channels, span), ds(layer.rows, span), dx(layer.channels, span), scale(1, span);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t count = blocks.width(b), width = round_up(count, kLanes<A>);
      const Place x_place = blocks.place(b, layer.channels, span);
      load_image(x, in.x, blocks.size, x_place, count);
      if (layer.has_norm) normalise_pixels<A>(x, span, layer.channels, width, scale, static_cast<A>(in.eps));
      load_image(ds, grad.dy, blocks.size, blocks.place(b, layer.rows, span), count);
      clear_tail(ds, layer.rows, count);
      if (in.activation == Activation::gelu) {
        layer.forward(x, span, width, [&](int64_t row, int64_t i, const auto& s) {
          each_vector(s, layer.rows - row, [&](int64_t r, int64_t v, Vec<A> sum) {
            A* const at = ds + (row + r) * span + i + v;
            store(at, load(at) * gelu_gradient<A>(sum));
          });
        });
        clear_tail(ds, layer.rows, count);
      }
      clear_tail(x, layer.channels, count);
      A* const own = partial + b * sums;
      std::memset(own, 0, sums * sizeof(A));
      add_outer<A>(own, columns, ds, span, layer.rows, x, span, layer.channels, width);
      for (int64_t r = 0; r < layer.rows; ++r) own[r * columns + layer.channels] = total<A>(row_sum(ds[r], width));
      layer.backward(dx, span, ds, span, width);
      if (layer.has_norm) normalise_backward<A>(dx, x, span, layer.channels, width, scale);
      store_image(grad.dx, x_place, dx, count);
    }
  });
  const Buffer<A> total(sums);
  add_up<A>(total, partial, blocks.count(), sums);
  for (int64_t r = 0; r < layer.rows; ++r) {
    const A dbias = total[r * columns + layer.channels];
    set_value(grad.dbias, r, dbias);
    for (int64_t c = 0; c < layer.channels; ++c) {
      set_value(grad.dweight, r * layer.channels + c, total[r * columns + c] * layer.gain[c] + dbias * layer.shift[c]);
    }
  }
  for (int64_t c = 0; c < layer.channels && layer.has_norm; ++c) {
    double dgain = 0, dshift = 0;
    for (int64_t r = 0; r < layer.rows; ++r) {
      dgain += static_cast<double>(layer.weight[r * layer.channels + c]) * total[r * columns + c];
      dshift += static_cast<double>(layer.weight[r * layer.channels + c]) * total[r * columns + layer.channels];
    }
    set_value(grad.dnorm_weight, c, dgain);
    set_value(grad.dnorm_bias, c, dshift);
  }
}

}  // namespace

void norm_pointwise(const NormPointwise& in, const TypedImage& residual, const TypedImage& y) {
  in.is_double ? run_forward<double>(in, residual, y) : run_forward<float>(in, residual, y);
}

void norm_pointwise_backward(const NormPointwise& in, const NormPointwiseGradients& grad) {
  in.is_double ? run_backward<double>(in, grad) : run_backward<float>(in, grad);
}

}  // namespace seemore::SEEMORE_ISA
