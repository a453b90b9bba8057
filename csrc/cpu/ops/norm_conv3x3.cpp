// norm_conv3x3 on the CPU: a band of lines slides through its stages, of which each lags behind the one before as far
// as the kernel sees.
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

// The parameters in the type of sums, and packed.
template <class A, class Cell>
struct Layers {
  Layers(const NormConv3x3& in, bool is_training)
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

// LayerNorm's weight and bias, for the lines as the kernel sees them.
template <class A, class Cell>
void scale_and_shift(const Slab<A>& to, const Slab<A>& x, const Layers<A, Cell>& layers, int64_t line, int64_t width) {
  for (int64_t c = 0; c < layers.channels; ++c) {
    A* const out = to.at(line, c);
    const A* const in = x.at(line, c);
    for (int64_t i = 0; i < width; i += kLanes<A>) store(out + i, load(in + i) * layers.gain[c] + layers.shift[c]);
  }
}

template <class A, class Cell>
class Forward {
 public:
  Forward(const NormConv3x3& in, const TypedImage& y, const Layers<A, Cell>& layers, const Bands& bands)
      : in_(in),
        y_(y),
        layers_(layers),
        bands_(bands),
        held_(in.size.width, 3, kPixels),
        x_(held_, layers.channels),
        h_(held_, layers.rows),
        out_(held_, layers.has_pointwise ? layers.out_rows : 0),
        scale_(held_, 1),
        around_(held_, layers.channels),
        quarters_(held_, layers.rows) {}

  void operator()(int64_t band) {
    const int64_t image = bands_.image(band);
    Stage reading(bands_, band, 1), writing(bands_, band, 0);
    x_.clear();
    held_.base = reading.first - held_.kept;
    while (true) {
      reading.begin = reading.end;
      reading.end = smaller(reading.last, reading.begin + held_.step);
      read(image, reading);
      writing.follow(reading, 1, 2);
      write(image, writing);
      if (writing.end == writing.last) return;
      x_.slide(reading.end);
      held_.base = reading.end - held_.kept;
    }
  }

 private:
  void read(int64_t image, const Stage& lines) {
    const int64_t width = lines.lines() * held_.pitch;
    x_.load(in_.x, in_.size, image, lines.begin, lines.end);
    if (layers_.has_norm) {
      normalise_pixels<A>(x_.at(lines.begin), x_.span(), layers_.channels, width, scale_.at(lines.begin),
                          static_cast<A>(in_.eps));
      scale_and_shift(x_, x_, layers_, lines.begin, width);
      x_.clear_gaps(lines.begin, lines.end);
    }
    if (lines.end == in_.size.height) x_.clear_line(lines.end);
  }

  void write(int64_t image, const Stage& lines) {
    const int64_t width = lines.lines() * held_.pitch;
    if (width == 0) return;
    const Tiles tiles(held_, lines.begin, lines.end);
    around_.around(x_, tiles);
    convolve(h_, layers_.rows, layers_.forward, around_, quarters_, tiles);
    if (layers_.is_gelu) {
      for (int64_t r = 0; r < layers_.rows; ++r) {
        A* const h = h_.at(lines.begin, r);
        for (int64_t i = 0; i < width; i += kLanes<A>) store(h + i, gelu<A>(load(h + i)));
      }
    }
    if (!layers_.has_pointwise) return h_.save(y_, image, lines.begin, lines.end);
    layers_.pointwise.forward(out_.at(lines.begin), out_.span(), h_.at(lines.begin), h_.span(), width);
    out_.save(y_, image, lines.begin, lines.end);
  }

  const NormConv3x3& in_;
  const TypedImage& y_;
  const Layers<A, Cell>& layers_;
  const Bands& bands_;
  Held held_;
  Slab<A> x_, h_, out_, scale_;
  Transformed<A> around_;
  Quarters<A> quarters_;
};

// Where the sums of a band lie that gradients are made of.
template <class A, class Cell>
struct Sums {
  explicit Sums(const Layers<A, Cell>& layers, A* memory = nullptr)
      : conv(memory),
        bias(conv + 16 * layers.rows * layers.channels),
        norm(bias + layers.rows),
        pointwise(norm + 2 * layers.channels),
        count(pointwise + (layers.has_pointwise ? layers.pointwise.sums() : 0) - memory) {}

  A *conv, *bias, *norm, *pointwise;  // (16, D, C); (D); (2, C): of dn n and dn; the pointwise layer's
  int64_t count;
};

template <class A, class Cell>
class Backward {
 public:
  Backward(const NormConv3x3& in, const NormConv3x3Gradients& grad, const Layers<A, Cell>& layers, const Bands& bands)
      : in_(in),
        grad_(grad),
        layers_(layers),
        bands_(bands),
        held_(in.size.width, 5, kPixels),
        x_(held_, layers.channels),
        seen_(held_, layers.has_norm ? layers.channels : 0),
        h_(held_, layers.has_pointwise ? layers.rows : 0),
        dy_(held_, layers.has_pointwise ? layers.out_rows : 0),
        ds_(held_, layers.rows),
        slope_(held_, layers.rows),
        dx_(held_, layers.channels),
        scale_(held_, 1),
        around_(held_, layers.channels),
        back_(held_, layers.rows),
        around_ds_(held_, layers.rows),
        quarters_(held_, larger(layers.rows, layers.channels)) {}

  void operator()(int64_t band, const Sums<A, Cell>& sums) {
    const int64_t image = bands_.image(band);
    own_ = {bands_.top(band), bands_.bottom(band)};
    Stage reading(bands_, band, 2), bending(bands_, band, 1), writing(bands_, band, 0);
    Slab<A>* const slabs[] = {&x_, &seen_, &h_, &dy_, &ds_, &slope_, &scale_};
    for (Slab<A>* slab : slabs) slab->clear();
    held_.base = reading.first - held_.kept;
    while (true) {
      reading.begin = reading.end;
      reading.end = smaller(reading.last, reading.begin + held_.step);
      read(image, reading);
      bending.follow(reading, 1, 2);
      bend(image, bending, sums);
      writing.follow(bending, 1, 2);
      write(image, writing, sums);
      if (writing.end == writing.last) return;
      x_.slide(reading.end), seen_.slide(reading.end), ds_.slide(reading.end), scale_.slide(reading.end);
      held_.base = reading.end - held_.kept;
    }
  }

 private:
  const Slab<A>& seen() const { return layers_.has_norm ? seen_ : x_; }

  void read(int64_t image, const Stage& lines) {
    const int64_t width = lines.lines() * held_.pitch;
    x_.load(in_.x, in_.size, image, lines.begin, lines.end);
    if (layers_.has_norm) {
      normalise_pixels<A>(x_.at(lines.begin), x_.span(), layers_.channels, width, scale_.at(lines.begin),
                          static_cast<A>(in_.eps));
      scale_and_shift(seen_, x_, layers_, lines.begin, width);
      seen_.clear_gaps(lines.begin, lines.end);
    }
    if (lines.end == in_.size.height) seen().clear_line(lines.end);
  }

  // ds, and the gradients of what made y of it
  void bend(int64_t image, const Stage& lines, const Sums<A, Cell>& sums) {
    const int64_t width = lines.lines() * held_.pitch;
    if (width == 0) return;
    const LineRange own{larger(lines.begin, own_.first), smaller(lines.end, own_.last)};
    const Tiles tiles(held_, lines.begin, lines.end);
    around_.around(seen(), tiles);
    if (layers_.is_gelu || layers_.has_pointwise) {
      convolve(slope_, layers_.rows, layers_.forward, around_, quarters_, tiles);
      activate(lines.begin, width);
    }
    if (layers_.has_pointwise) {
      dy_.load(grad_.dy, in_.size, image, lines.begin, lines.end);
      dy_.clear_gaps(lines.begin, lines.end);
      dy_.clear_behind(lines.end);
      layers_.pointwise.backward(ds_.at(lines.begin), ds_.span(), dy_.at(lines.begin), dy_.span(), width);
      if (own.first < own.last) {
        if (own.last < lines.end) dy_.clear_line(own.last);
        layers_.pointwise.add_gradients(sums.pointwise, dy_.at(own.first), dy_.span(), h_.at(own.first), h_.span(),
                                        (own.last - own.first) * held_.pitch);
      }
    } else {
      ds_.load(grad_.dy, in_.size, image, lines.begin, lines.end);
    }
    for (int64_t r = 0; r < layers_.rows && layers_.is_gelu; ++r) {
      A* const ds = ds_.at(lines.begin, r);
      const A* const slope = slope_.at(lines.begin, r);
      for (int64_t i = 0; i < width; i += kLanes<A>) store(ds + i, load(ds + i) * load(slope + i));
    }
    ds_.clear_gaps(lines.begin, lines.end);
    ds_.clear_behind(lines.end);
    if (lines.end == in_.size.height) ds_.clear_line(lines.end);
    if (own.first >= own.last) return;
    back_.back(ds_, tiles, own.first, own.last);
    back_.clear_behind(tiles);
    const int64_t of_one = layers_.rows * layers_.channels;
    for (int64_t mn = 0; mn < 16; ++mn) {
      add_outer<A>(sums.conv + mn * of_one, layers_.channels, back_[mn], back_.span(), layers_.rows, around_[mn],
                   around_.span(), layers_.channels, tiles.count());
    }
    for (int64_t r = 0; r < layers_.rows; ++r) {  // y0 and y1 of both axes are in number (1, 1) alone, all of them
      sums.bias[r] += total<A>(row_sum(back_[5] + r * back_.span(), tiles.count()));
    }
  }

  // Of s in slope_: h, and the activation's derivative.
  void activate(int64_t line, int64_t width) {
    for (int64_t r = 0; r < layers_.rows; ++r) {
      A* const slope = slope_.at(line, r);
      A* const h = layers_.has_pointwise ? h_.at(line, r) : nullptr;
      for (int64_t i = 0; i < width; i += kLanes<A>) {
        if (!layers_.is_gelu) {
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

  void write(int64_t image, const Stage& lines, const Sums<A, Cell>& sums) {
    const int64_t width = lines.lines() * held_.pitch;
    if (width == 0) return;
    const Tiles tiles(held_, lines.begin, lines.end);
    around_ds_.around(ds_, tiles);
    convolve(dx_, layers_.channels, layers_.backward, around_ds_, quarters_, tiles);
    if (layers_.has_norm) {
      dx_.clear_gaps(lines.begin, lines.end);
      dx_.clear_behind(lines.end);
      for (int64_t c = 0; c < layers_.channels; ++c) {
        A* const dx = dx_.at(lines.begin, c);
        const A* const x = x_.at(lines.begin, c);
        Vec<A> of_gain{}, of_shift{};
        for (int64_t i = 0; i < width; i += kLanes<A>) {
          const Vec<A> d = load(dx + i);
          of_gain += d * load(x + i), of_shift += d;
          store(dx + i, d * layers_.gain[c]);
        }
        sums.norm[c] += total<A>(of_gain), sums.norm[layers_.channels + c] += total<A>(of_shift);
      }
      normalise_backward<A>(dx_.at(lines.begin), x_.at(lines.begin), x_.span(), layers_.channels, width,
                            scale_.at(lines.begin));
    }
    dx_.save(grad_.dx, image, lines.begin, lines.end);
  }

  const NormConv3x3& in_;
  const NormConv3x3Gradients& grad_;
  const Layers<A, Cell>& layers_;
  const Bands& bands_;
  Held held_;
  LineRange own_{};
  Slab<A> x_, seen_, h_, dy_, ds_, slope_, dx_, scale_;  // x is normalised; `seen` is n
  Transformed<A> around_, back_, around_ds_;
  Quarters<A> quarters_;
};

template <class A, class Cell>
void run_forward(const NormConv3x3& in, const TypedImage& y) {
  const Layers<A, Cell> layers(in, false);
  const Bands bands(in.size);
  for_each_range(bands.count(), [&](int64_t begin, int64_t end) {
    Forward<A, Cell> forward(in, y, layers, bands);
    for (int64_t band = begin; band < end; ++band) forward(band);
  });
}

template <class A, class Cell>
void run_backward(const NormConv3x3& in, const NormConv3x3Gradients& grad) {
  const Layers<A, Cell> layers(in, true);
  const Bands bands(in.size);
  const int64_t count = Sums<A, Cell>(layers).count;
  const Buffer<A> partial(bands.count() * count), memory(count);
  std::memset(partial, 0, bands.count() * count * sizeof(A));
  for_each_range(bands.count(), [&](int64_t begin, int64_t end) {
    Backward<A, Cell> backward(in, grad, layers, bands);
    for (int64_t band = begin; band < end; ++band) backward(band, Sums<A, Cell>(layers, partial + band * count));
  });
  add_up<A>(memory, partial, bands.count(), count);
  const Sums<A, Cell> sums(layers, memory);
  const int64_t of_one = layers.rows * layers.channels;
  const Buffer<A> dweight(9 * of_one);
  for (int64_t rc = 0; rc < of_one; ++rc) {
    double lines[3][4];
    for (int n = 0; n < 4; ++n) {
      double of[4], tap[3];
      for (int m = 0; m < 4; ++m) of[m] = sums.conv[(4 * m + n) * of_one + rc];
      transform_back(tap, of);
      for (int line = 0; line < 3; ++line) lines[line][n] = tap[line];
    }
    for (int line = 0; line < 3; ++line) {
      double tap[3];
      transform_back(tap, lines[line]);
      for (int k = 0; k < 3; ++k) dweight[rc * 9 + line * 3 + k] = static_cast<A>(tap[k]);
    }
  }
  write_values<A>(grad.dweight, dweight, 9 * of_one);
  write_values<A>(grad.dbias, sums.bias, layers.rows);
  if (layers.has_norm) {
    write_values<A>(grad.dnorm_weight, sums.norm, layers.channels);
    write_values<A>(grad.dnorm_bias, sums.norm + layers.channels, layers.channels);
  }
  if (layers.has_pointwise) layers.pointwise.write_gradients(sums.pointwise, {}, {}, grad.dweight_pw, grad.dbias_pw);
}

}  // namespace

void norm_conv3x3(const NormConv3x3& in, const TypedImage& y) {
  with_precision(in.is_double, in.weight, [&](auto precision) {
    run_forward<typename decltype(precision)::A, typename decltype(precision)::Cell>(in, y);
  });
}

void norm_conv3x3_backward(const NormConv3x3& in, const NormConv3x3Gradients& grad) {
  with_precision(in.is_double, in.weight, [&](auto precision) {
    run_backward<typename decltype(precision)::A, typename decltype(precision)::Cell>(in, grad);
  });
}

}  // namespace seemore::SEEMORE_ISA
