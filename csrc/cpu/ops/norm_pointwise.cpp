// norm_pointwise on the CPU: a task takes a block of pixels with all their channels.

#include "params/norm_pointwise.h"

#include "cpu/simd/math.h"
#include "cpu/tile/layer_norm.h"
#include "cpu/tile/normed_layer.h"

namespace seemore::SEEMORE_ISA {
namespace {

constexpr int64_t kPixels = 1024;  // of a block: the gradients' blocks of 36 and 72 channels fit the second cache

template <class A, class Cell>
NormedLayer<A, Cell> layer_of(const NormPointwise& in) {
  return {in.norm_weight, in.norm_bias, in.weight, in.bias, in.out_channels, in.size.channels};
}

template <class A, class Cell>
void run_forward(Precision<A, Cell>, const NormPointwise& in, const TypedImage& residual, const TypedImage& y) {
  const NormedLayer<A, Cell> layer = layer_of<A, Cell>(in);
  const int64_t channels = in.size.channels, rows = in.out_channels;
  const Blocks blocks(kPixels, in.size, in.x, residual, y);
  const int64_t row_stride = blocks.row_stride();
  const bool is_gelu = in.activation == Activation::gelu;
  for_each_range(blocks.count(), [&](int64_t begin, int64_t end) {
    const Block<A> x(channels, row_stride), out(rows, row_stride), more(residual.view.data ? rows : 0, row_stride),
        scale(1, row_stride);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t count = blocks.width(b), width = round_up(count, kLanes<A>);
      load_image(x, in.x, blocks.size, blocks.place(b, channels, row_stride), count);
      if (layer.has_norm()) normalise_pixels<A>(x, row_stride, channels, width, scale, static_cast<A>(in.eps));
      const Place place = blocks.place(b, rows, row_stride);
      if (residual.view.data) load_image(more, residual, blocks.size, place, count);
      Prefetcher next = blocks.prefetch(in.x, b + 1, end, channels, rows, width);
      layer.forward(x, row_stride, width, [&](int64_t row, int64_t i, const auto& sums) {
        next.advance();
        each_vector(sums, rows - row, [&](int64_t r, int64_t v, Vec<A> sum) {
          const int64_t at = (row + r) * row_stride + i + v;
          if (is_gelu) sum = gelu<A>(sum);
          store(out + at, residual.view.data ? sum + load(more + at) : sum);
        });
      });
      store_image(y, place, out, count);
    }
  });
}

template <class A, class Cell>
void run_backward(Precision<A, Cell>, const NormPointwise& in, const NormPointwiseGradients& grad) {
  const NormedLayer<A, Cell> layer = layer_of<A, Cell>(in);
  const int64_t channels = in.size.channels, rows = in.out_channels;
  const Blocks blocks(kPixels, in.size, in.x, grad.dy, grad.dx);
  const int64_t row_stride = blocks.row_stride();
  const Buffer<A> partial(blocks.count() * layer.sums());
  for_each_range(blocks.count(), [&](int64_t begin, int64_t end) {
    const Block<A> x(channels, row_stride), ds(rows, row_stride), dx(channels, row_stride), scale(1, row_stride);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t count = blocks.width(b), width = round_up(count, kLanes<A>);
      const Place x_place = blocks.place(b, channels, row_stride);
      load_image(x, in.x, blocks.size, x_place, count);
      if (layer.has_norm()) normalise_pixels<A>(x, row_stride, channels, width, scale, static_cast<A>(in.eps));
      load_image(ds, grad.dy, blocks.size, blocks.place(b, rows, row_stride), count);
      Prefetcher next_x = blocks.prefetch(in.x, b + 1, end, channels, rows, width);
      if (in.activation == Activation::gelu) {
        layer.forward(x, row_stride, width, [&](int64_t row, int64_t i, const auto& s) {
          next_x.advance();
          each_vector(s, rows - row, [&](int64_t r, int64_t v, Vec<A> sum) {
            A* const at = ds + (row + r) * row_stride + i + v;
            store(at, load(at) * gelu_gradient<A>(sum));
          });
        });
      }
      clear_tail(ds, rows, count);
      clear_tail(x, channels, count);
      A* const own = partial + b * layer.sums();
      std::memset(own, 0, layer.sums() * sizeof(A));
      layer.add_gradients(own, ds, row_stride, x, row_stride, width);
      Prefetcher next_dy = blocks.prefetch(grad.dy, b + 1, end, rows, channels, width);
      layer.backward(ds, row_stride, width, [&](int64_t row, int64_t i, const auto& sums) {
        next_dy.advance();
        each_vector(sums, channels - row,
                    [&](int64_t r, int64_t v, Vec<A> sum) { store(dx + (row + r) * row_stride + i + v, sum); });
      });
      if (layer.has_norm()) normalise_backward<A>(dx, x, row_stride, channels, width, scale);
      store_image(grad.dx, x_place, dx, count);
    }
  });
  const Buffer<A> sums(layer.sums());
  add_up<A>(sums, partial, blocks.count(), layer.sums());
  layer.write_gradients(sums, grad.dnorm_weight, grad.dnorm_bias, grad.dweight, grad.dbias);
}

}  // namespace

void norm_pointwise(const NormPointwise& in, const TypedImage& residual, const TypedImage& y) {
  with_precision(in.is_double, in.weight, [&](auto precision) { run_forward(precision, in, residual, y); });
}

void norm_pointwise_backward(const NormPointwise& in, const NormPointwiseGradients& grad) {
  with_precision(in.is_double, in.weight, [&](auto precision) { run_backward(precision, in, grad); });
}

}  // namespace seemore::SEEMORE_ISA
