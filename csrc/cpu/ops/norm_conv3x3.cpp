// norm_conv3x3 on the CPU: a band of rows slides through its stages, each of which lags behind the one before by the
// halo of the kernel.
//
//   n = LN(x);  s = conv(n);  h = activation(s);  y = W h
//
//   dh = W^T dy;  ds = dh activation'(s);  dn = conv transposed(ds);  dx = LN backward(dn)

#include "params/norm_conv3x3.h"

#include "cpu/ops/winograd.h"
#include "cpu/simd/math.h"
#include "cpu/tile/layer_norm.h"
#include "cpu/tile/normed_layer.h"

namespace seemore::SEEMORE_ISA {
namespace {

constexpr int64_t kPixels = 512;  // of a step

// The parameters in the accumulation type, and packed.
template <class A, class Cell>
struct NormConv3x3Weights {
  NormConv3x3Weights(const NormConv3x3& in, bool is_training)
      : has_norm(in.norm_weight.data),
        has_pointwise(in.weight_pw.data),
        is_gelu(in.activation == Activation::gelu),
        channels(in.size.channels),
        rows(in.conv_channels),
        out_rows(in.out_channels),
        gain(channels),
        shift(channels),
        forward(rows, channels),
        backward(is_training ? channels : 0, rows),
        pointwise({}, {}, in.weight_pw, in.bias_pw, has_pointwise ? out_rows : 0, rows) {
    if (has_norm) read_values<A>(gain, in.norm_weight, channels), read_values<A>(shift, in.norm_bias, channels);
    const Buffer<A> weight(rows * channels * 9);
    read_values<A>(weight, in.weight, rows * channels * 9);
    forward.template pack<false>([&](int64_t r, int64_t c) { return weight + (r * channels + c) * 9; });
    if (is_training) {
      backward.template pack<true>([&](int64_t c, int64_t r) { return weight + (r * channels + c) * 9; });
    }
    read_values<A>(forward.bias(), in.bias, rows);
  }

  bool has_norm, has_pointwise, is_gelu;
  int64_t channels, rows, out_rows;
  Buffer<A> gain, shift;
  WinogradWeights<A> forward, backward;
  NormedLayer<A, Cell> pointwise;
};

// Apply LayerNorm's weight and bias.
template <class A, class Cell>
void scale_and_shift(const Slab<A>& to, const Slab<A>& x, const NormConv3x3Weights<A, Cell>& weights, int64_t row,
                     int64_t width) {
  for (int64_t c = 0; c < weights.channels; ++c) {
    A* const out = to.address(row, c);
    const A* const in = x.address(row, c);
    for (int64_t i = 0; i < width; i += kLanes<A>) store(out + i, load(in + i) * weights.gain[c] + weights.shift[c]);
  }
}

template <class A, class Cell>
class NormConv3x3Forward {
 public:
  NormConv3x3Forward(const NormConv3x3& in, const TypedImage& y, const NormConv3x3Weights<A, Cell>& weights,
                     const Bands& bands)
      : in_(in),
        y_(y),
        weights_(weights),
        bands_(bands),
        window_(in.size.width, 3, kPixels),
        x_(window_, weights.channels),
        h_(window_, weights.rows),
        out_(window_, weights.has_pointwise ? weights.out_rows : 0),
        scale_(window_, 1),
        input_(window_, weights.channels),
        quarters_(window_, weights.rows) {}

  void operator()(int64_t band) {
    const int64_t image = bands_.image(band);
    BandStage reading(bands_, band, 1), writing(bands_, band, 0);
    x_.clear();
    window_.base = reading.first - window_.kept;
    while (true) {
      reading.begin = reading.end;
      reading.end = smaller(reading.last, reading.begin + window_.step);
      read(image, reading);
      writing.follow(reading, 1, 2);
      write(image, writing);
      if (writing.end == writing.last) return;
      x_.slide(reading.end);
      window_.base = reading.end - window_.kept;
    }
  }

 private:
  void read(int64_t image, const BandStage& stage) {
    const int64_t width = stage.rows() * window_.padded_width;
    x_.load(in_.x, in_.size, image, stage.begin, stage.end);
    if (weights_.has_norm) {
      normalise_pixels<A>(x_.address(stage.begin), x_.row_stride(), weights_.channels, width,
                          scale_.address(stage.begin), static_cast<A>(in_.eps));
      scale_and_shift(x_, x_, weights_, stage.begin, width);
      x_.clear_gaps(stage.begin, stage.end);
    }
    if (stage.end == in_.size.height) x_.clear_row(stage.end);
  }

  void write(int64_t image, const BandStage& stage) {
    const int64_t width = stage.rows() * window_.padded_width;
    if (width == 0) return;
    const WinogradTiles tiles(window_, stage.begin, stage.end);
    input_.transform_input(x_, tiles);
    convolve(h_, weights_.rows, weights_.forward, input_, quarters_, tiles);
    if (weights_.is_gelu) {
      for (int64_t r = 0; r < weights_.rows; ++r) {
        A* const h = h_.address(stage.begin, r);
        for (int64_t i = 0; i < width; i += kLanes<A>) store(h + i, gelu<A>(load(h + i)));
      }
    }
    if (!weights_.has_pointwise) return h_.save(y_, image, stage.begin, stage.end);
    weights_.pointwise.forward(out_.address(stage.begin), out_.row_stride(), h_.address(stage.begin), h_.row_stride(),
                               width);
    out_.save(y_, image, stage.begin, stage.end);
  }

  const NormConv3x3& in_;
  const TypedImage& y_;
  const NormConv3x3Weights<A, Cell>& weights_;
  const Bands& bands_;
  SlabWindow window_;
  Slab<A> x_, h_, out_, scale_;
  Transformed<A> input_;
  Quarters<A> quarters_;
};

// The sums of a band that make up the gradients of the parameters.
template <class A, class Cell>
struct NormConv3x3Sums {
  explicit NormConv3x3Sums(const NormConv3x3Weights<A, Cell>& weights, A* memory = nullptr)
      : conv(memory),
        bias(conv + 16 * weights.rows * weights.channels),
        norm(bias + weights.rows),
        pointwise(norm + 2 * weights.channels),
        count(pointwise + (weights.has_pointwise ? weights.pointwise.sums() : 0) - memory) {}

  A *conv, *bias, *norm, *pointwise;  // (16, D, C); (D); (2, C): of dn n and dn; the pointwise layer's
  int64_t count;
};

template <class A, class Cell>
class NormConv3x3Backward {
 public:
  NormConv3x3Backward(const NormConv3x3& in, const NormConv3x3Gradients& grad,
                      const NormConv3x3Weights<A, Cell>& weights, const Bands& bands)
      : in_(in),
        grad_(grad),
        weights_(weights),
        bands_(bands),
        window_(in.size.width, 5, kPixels),
        x_(window_, weights.channels),
        seen_(window_, weights.has_norm ? weights.channels : 0),
        h_(window_, weights.has_pointwise ? weights.rows : 0),
        dy_(window_, weights.has_pointwise ? weights.out_rows : 0),
        ds_(window_, weights.rows),
        slope_(window_, weights.rows),
        dx_(window_, weights.channels),
        scale_(window_, 1),
        input_(window_, weights.channels),
        gradient_(window_, weights.rows),
        ds_input_(window_, weights.rows),
        quarters_(window_, larger(weights.rows, weights.channels)) {}

  void operator()(int64_t band, const NormConv3x3Sums<A, Cell>& sums) {
    const int64_t image = bands_.image(band);
    own_ = {bands_.top(band), bands_.bottom(band)};
    BandStage reading(bands_, band, 2), middle(bands_, band, 1), writing(bands_, band, 0);
    Slab<A>* const slabs[] = {&x_, &seen_, &h_, &dy_, &ds_, &slope_, &scale_};
    for (Slab<A>* slab : slabs) slab->clear();
    window_.base = reading.first - window_.kept;
    while (true) {
      reading.begin = reading.end;
      reading.end = smaller(reading.last, reading.begin + window_.step);
      read(image, reading);
      middle.follow(reading, 1, 2);
      output_backward(image, middle, sums);
      writing.follow(middle, 1, 2);
      write(image, writing, sums);
      if (writing.end == writing.last) return;
      x_.slide(reading.end), seen_.slide(reading.end), ds_.slide(reading.end), scale_.slide(reading.end);
      window_.base = reading.end - window_.kept;
    }
  }

 private:
  const Slab<A>& seen() const { return weights_.has_norm ? seen_ : x_; }

  void read(int64_t image, const BandStage& stage) {
    const int64_t width = stage.rows() * window_.padded_width;
    x_.load(in_.x, in_.size, image, stage.begin, stage.end);
    if (weights_.has_norm) {
      normalise_pixels<A>(x_.address(stage.begin), x_.row_stride(), weights_.channels, width,
                          scale_.address(stage.begin), static_cast<A>(in_.eps));
      scale_and_shift(seen_, x_, weights_, stage.begin, width);
      seen_.clear_gaps(stage.begin, stage.end);
    }
    if (stage.end == in_.size.height) seen().clear_row(stage.end);
  }

  // Compute ds and the gradients of the pointwise layer.
  void output_backward(int64_t image, const BandStage& stage, const NormConv3x3Sums<A, Cell>& sums) {
    const int64_t width = stage.rows() * window_.padded_width;
    if (width == 0) return;
    const RowRange own{larger(stage.begin, own_.first), smaller(stage.end, own_.last)};
    const WinogradTiles tiles(window_, stage.begin, stage.end);
    input_.transform_input(seen(), tiles);
    if (weights_.is_gelu || weights_.has_pointwise) {
      convolve(slope_, weights_.rows, weights_.forward, input_, quarters_, tiles);
      activate(stage.begin, width);
    }
    if (weights_.has_pointwise) {
      dy_.load(grad_.dy, in_.size, image, stage.begin, stage.end);
      dy_.clear_gaps(stage.begin, stage.end);
      dy_.clear_behind(stage.end);
      weights_.pointwise.backward(ds_.address(stage.begin), ds_.row_stride(), dy_.address(stage.begin),
                                  dy_.row_stride(), width);
      if (own.first < own.last) {
        if (own.last < stage.end) dy_.clear_row(own.last);
        weights_.pointwise.add_gradients(sums.pointwise, dy_.address(own.first), dy_.row_stride(),
                                         h_.address(own.first), h_.row_stride(),
                                         (own.last - own.first) * window_.padded_width);
      }
    } else {
      ds_.load(grad_.dy, in_.size, image, stage.begin, stage.end);
    }
    for (int64_t r = 0; r < weights_.rows && weights_.is_gelu; ++r) {
      A* const ds = ds_.address(stage.begin, r);
      const A* const slope = slope_.address(stage.begin, r);
      for (int64_t i = 0; i < width; i += kLanes<A>) store(ds + i, load(ds + i) * load(slope + i));
    }
    ds_.clear_gaps(stage.begin, stage.end);
    ds_.clear_behind(stage.end);
    if (stage.end == in_.size.height) ds_.clear_row(stage.end);
    if (own.first >= own.last) return;
    gradient_.transform_gradient(ds_, tiles, own.first, own.last);
    gradient_.clear_behind(tiles);
    const int64_t of_one = weights_.rows * weights_.channels;
    for (int64_t mn = 0; mn < 16; ++mn) {
      add_outer<A>(sums.conv + mn * of_one, weights_.channels, gradient_[mn], gradient_.row_stride(), weights_.rows,
                   input_[mn], input_.row_stride(), weights_.channels, tiles.count());
    }
    for (int64_t r = 0; r < weights_.rows; ++r) {  // y0 and y1 of both axes are in number (1, 1) alone, all of them
      sums.bias[r] += total<A>(row_sum(gradient_[5] + r * gradient_.row_stride(), tiles.count()));
    }
  }

  // From s in slope_ compute h and the activation's derivative.
  void activate(int64_t row, int64_t width) {
    for (int64_t r = 0; r < weights_.rows; ++r) {
      A* const slope = slope_.address(row, r);
      A* const h = weights_.has_pointwise ? h_.address(row, r) : nullptr;
      for (int64_t i = 0; i < width; i += kLanes<A>) {
        if (!weights_.is_gelu) {
          store(h + i, load(slope + i));
        } else if (h) {
          const GeluBoth<A> both = gelu_both<A>(load(slope + i));
          store(h + i, both.value), store(slope + i, both.gradient);
        } else {
          store(slope + i, gelu_gradient<A>(load(slope + i)));
        }
      }
    }
  }

  void write(int64_t image, const BandStage& stage, const NormConv3x3Sums<A, Cell>& sums) {
    const int64_t width = stage.rows() * window_.padded_width;
    if (width == 0) return;
    const WinogradTiles tiles(window_, stage.begin, stage.end);
    ds_input_.transform_input(ds_, tiles);
    convolve(dx_, weights_.channels, weights_.backward, ds_input_, quarters_, tiles);
    if (weights_.has_norm) {
      dx_.clear_gaps(stage.begin, stage.end);
      dx_.clear_behind(stage.end);
      for (int64_t c = 0; c < weights_.channels; ++c) {
        A* const dx = dx_.address(stage.begin, c);
        const A* const x = x_.address(stage.begin, c);
        Vec<A> of_gain{}, of_shift{};
        for (int64_t i = 0; i < width; i += kLanes<A>) {
          const Vec<A> d = load(dx + i);
          of_gain += d * load(x + i), of_shift += d;
          store(dx + i, d * weights_.gain[c]);
        }
        sums.norm[c] += total<A>(of_gain), sums.norm[weights_.channels + c] += total<A>(of_shift);
      }
      normalise_backward<A>(dx_.address(stage.begin), x_.address(stage.begin), x_.row_stride(), weights_.channels,
                            width, scale_.address(stage.begin));
    }
    dx_.save(grad_.dx, image, stage.begin, stage.end);
  }

  const NormConv3x3& in_;
  const NormConv3x3Gradients& grad_;
  const NormConv3x3Weights<A, Cell>& weights_;
  const Bands& bands_;
  SlabWindow window_;
  RowRange own_{};
  Slab<A> x_, seen_, h_, dy_, ds_, slope_, dx_, scale_;  // x is normalised; `seen` is n
  Transformed<A> input_, gradient_, ds_input_;
  Quarters<A> quarters_;
};

template <class A, class Cell>
void run_forward(Precision<A, Cell>, const NormConv3x3& in, const TypedImage& y) {
  const NormConv3x3Weights<A, Cell> weights(in, false);
  const Bands bands(in.size);
  for_each_range(bands.count(), [&](int64_t begin, int64_t end) {
    NormConv3x3Forward<A, Cell> forward(in, y, weights, bands);
    for (int64_t band = begin; band < end; ++band) forward(band);
  });
}

template <class A, class Cell>
void run_backward(Precision<A, Cell>, const NormConv3x3& in, const NormConv3x3Gradients& grad) {
  const NormConv3x3Weights<A, Cell> weights(in, true);
  const Bands bands(in.size);
  const int64_t count = NormConv3x3Sums<A, Cell>(weights).count;
  const Buffer<A> partial(bands.count() * count), memory(count);
  std::memset(partial, 0, bands.count() * count * sizeof(A));
  for_each_range(bands.count(), [&](int64_t begin, int64_t end) {
    NormConv3x3Backward<A, Cell> backward(in, grad, weights, bands);
    for (int64_t band = begin; band < end; ++band)
      backward(band, NormConv3x3Sums<A, Cell>(weights, partial + band * count));
  });
  add_up<A>(memory, partial, bands.count(), count);
  const NormConv3x3Sums<A, Cell> sums(weights, memory);
  const int64_t of_one = weights.rows * weights.channels;
  const Buffer<A> dweight(9 * of_one);
  for (int64_t rc = 0; rc < of_one; ++rc) {
    double kernel_rows[3][4];
    for (int n = 0; n < 4; ++n) {
      double of[4], tap[3];
      for (int m = 0; m < 4; ++m) of[m] = sums.conv[(4 * m + n) * of_one + rc];
      transform_back(tap, of);
      for (int row = 0; row < 3; ++row) kernel_rows[row][n] = tap[row];
    }
    for (int row = 0; row < 3; ++row) {
      double tap[3];
      transform_back(tap, kernel_rows[row]);
      for (int k = 0; k < 3; ++k) dweight[rc * 9 + row * 3 + k] = static_cast<A>(tap[k]);
    }
  }
  write_values<A>(grad.dweight, dweight, 9 * of_one);
  write_values<A>(grad.dbias, sums.bias, weights.rows);
  if (weights.has_norm) {
    write_values<A>(grad.dnorm_weight, sums.norm, weights.channels);
    write_values<A>(grad.dnorm_bias, sums.norm + weights.channels, weights.channels);
  }
  if (weights.has_pointwise) weights.pointwise.write_gradients(sums.pointwise, {}, {}, grad.dweight_pw, grad.dbias_pw);
}

}  // namespace

void norm_conv3x3(const NormConv3x3& in, const TypedImage& y) {
  with_precision(in.is_double, in.weight, [&](auto precision) { run_forward(precision, in, y); });
}

void norm_conv3x3_backward(const NormConv3x3& in, const NormConv3x3Gradients& grad) {
  with_precision(in.is_double, in.weight, [&](auto precision) { run_backward(precision, in, grad); });
}

}  // namespace seemore::SEEMORE_ISA
