// gated_ffn on the CPU: a band of lines slides through its stages, of which each lags behind the one before as far as
// the 3x3 kernel sees.
//
//   s = W1 LN(x);  u, g = GELU(s);  c = stencil(g);  t = W2 (u c);  y = x + GELU(t)
//
//   dt = dy GELU'(t);  dp = W2^T dt;  du = dp c;  dc = dp u;  dg = stencil transposed(dc)
//   ds = [du GELU'(s_u), dg GELU'(s_g)];  dx = dy + LN backward(W1^T ds)

#include "params/gated_ffn.h"

#include "cpu/ops/slabs.h"
#include "cpu/simd/math.h"
#include "cpu/tile/layer_norm.h"
#include "cpu/tile/normed_layer.h"

namespace seemore::SEEMORE_ISA {
namespace {

constexpr int64_t kPixels = 640;  // of a step

// The parameters in the type of sums, and packed.
template <class A, class Cell>
struct Layers {
  explicit Layers(const GatedFfn& in)
      : channels(in.size.channels),
        first(in.norm_weight, in.norm_bias, in.weight_1, in.bias_1, 2 * channels, channels),
        second({}, {}, in.weight_2, in.bias_2, channels, channels),
        gate(channels * 10) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t tap = 0; tap < 9; ++tap) gate[c * 10 + tap] = value_of<A>(in.weight_gate, c * 9 + tap);
      gate[c * 10 + 9] = value_of<A>(in.bias_gate, c);
    }
  }

  // bias + the sum of what the taps of channel c see around g
  Vec<A> stencil(int64_t c, const A* g, int64_t pitch) const {
    const A* const weight = gate + c * 10;
    Vec<A> sum = broadcast(weight[9]);
    each_of_nine(pitch, [&](int64_t distance, auto tap) { sum += weight[decltype(tap)::value] * load(g + distance); });
    return sum;
  }
  Vec<A> stencil_backward(int64_t c, const A* d, int64_t pitch) const {
    const A* const weight = gate + c * 10;
    Vec<A> sum{};
    each_of_nine(pitch, [&](int64_t distance, auto tap) { sum += weight[decltype(tap)::value] * load(d - distance); });
    return sum;
  }

  int64_t channels;
  NormedLayer<A, Cell> first, second;
  Buffer<A> gate;  // (C, 10): nine taps and the bias
};

template <class A, class Cell>
class Forward {
 public:
  Forward(const GatedFfn& in, const TypedImage& y, const Layers<A, Cell>& layers, const Bands& bands)
      : in_(in),
        y_(y),
        layers_(layers),
        bands_(bands),
        held_(in.size.width, 2, kPixels),
        x_(held_, layers.channels),
        u_(held_, layers.channels),
        g_(held_, layers.channels),
        product_(held_, layers.channels),
        scale_(held_, 1) {}

  void operator()(int64_t band) {
    const int64_t image = bands_.image(band);
    Stage reading(bands_, band, 1), writing(bands_, band, 0);
    Slab<A>* const slabs[] = {&x_, &u_, &g_};
    for (Slab<A>* slab : slabs) slab->clear();
    held_.base = reading.first - held_.kept;
    while (writing.end < writing.last) {
      reading.begin = reading.end;
      reading.end = smaller(reading.last, reading.begin + held_.step);
      read(image, reading);
      writing.follow(reading, 1);
      write(image, writing);
      if (writing.end == writing.last) return;
      u_.slide(reading.end), g_.slide(reading.end);
      held_.base = reading.end - held_.kept;
    }
  }

 private:
  void read(int64_t image, const Stage& lines) {
    const int64_t width = lines.lines() * held_.pitch, C = layers_.channels;
    x_.load(in_.x, in_.size, image, lines.begin, lines.end);
    normalise_pixels<A>(x_.at(lines.begin), x_.span(), C, width, scale_.at(lines.begin), static_cast<A>(in_.eps));
    Ahead x = x_.ahead(in_.x, in_.size, image, lines.end, lines.end + held_.step, 2 * C, width);
    layers_.first.forward(x_.at(lines.begin), x_.span(), width, [&](int64_t row, int64_t i, const auto& sums) {
      x.some();
      each_vector(sums, 2 * C - row, [&](int64_t r, int64_t v, Vec<A> sum) {
        const int64_t c = row + r;
        store((c < C ? u_.at(lines.begin, c) : g_.at(lines.begin, c - C)) + i + v, gelu<A>(sum));
      });
    });
    g_.clear_gaps(lines.begin, lines.end);
    if (lines.end == in_.size.height) g_.clear_line(lines.end);
  }

  void write(int64_t image, const Stage& lines) {
    const int64_t width = lines.lines() * held_.pitch, C = layers_.channels;
    for (int64_t c = 0; c < C; ++c) {
      const A *const u = u_.at(lines.begin, c), *const g = g_.at(lines.begin, c);
      A* const product = product_.at(lines.begin, c);
      for (int64_t i = 0; i < width; i += kLanes<A>) {
        store(product + i, load(u + i) * layers_.stencil(c, g + i, held_.pitch));
      }
    }
    x_.load(in_.x, in_.size, image, lines.begin, lines.end);
    layers_.second.forward(product_.at(lines.begin), product_.span(), width,
                           [&](int64_t row, int64_t i, const auto& sums) {
                             each_vector(sums, C - row, [&](int64_t r, int64_t v, Vec<A> sum) {
                               A* const at = x_.at(lines.begin, row + r) + i + v;
                               store(at, load(at) + gelu<A>(sum));
                             });
                           });
    x_.save(y_, image, lines.begin, lines.end);
  }

  const GatedFfn& in_;
  const TypedImage& y_;
  const Layers<A, Cell>& layers_;
  const Bands& bands_;
  Held held_;
  Slab<A> x_, u_, g_, product_, scale_;
};

template <class A, class Cell>
class Backward {
 public:
  Backward(const GatedFfn& in, const GatedFfnGradients& grad, const Layers<A, Cell>& layers, const Bands& bands)
      : in_(in),
        grad_(grad),
        layers_(layers),
        bands_(bands),
        held_(in.size.width, 3, kPixels),
        x_(held_, layers.channels),
        u_(held_, layers.channels),
        g_(held_, layers.channels),
        u_slope_(held_, layers.channels),
        g_slope_(held_, layers.channels),
        du_(held_, layers.channels),
        dc_(held_, layers.channels),
        product_(held_, layers.channels),
        dt_(held_, layers.channels),
        ds_(held_, 2 * layers.channels),
        scale_(held_, 1) {}

  // Adds to the sums of the first layer, the second, and the gate.
  void operator()(int64_t band, A* sums) {
    const int64_t image = bands_.image(band);
    own_ = {bands_.top(band), bands_.bottom(band)};
    Stage reading(bands_, band, 2), gating(bands_, band, 1), writing(bands_, band, 0);
    Slab<A>* const cleared[] = {&x_, &u_, &g_, &dc_, &dt_};
    Slab<A>* const sliding[] = {&x_, &u_, &g_, &u_slope_, &g_slope_, &du_, &dc_, &scale_};
    for (Slab<A>* slab : cleared) slab->clear();
    held_.base = reading.first - held_.kept;
    while (true) {
      reading.begin = reading.end;
      reading.end = smaller(reading.last, reading.begin + held_.step);
      read(image, reading);
      gating.follow(reading, 1);
      gate(image, gating, sums + layers_.first.sums());
      writing.follow(gating, 1);
      write(image, writing, sums);
      if (writing.end == writing.last) return;
      for (Slab<A>* slab : sliding) slab->slide(reading.end);
      held_.base = reading.end - held_.kept;
    }
  }

 private:
  void read(int64_t image, const Stage& lines) {
    const int64_t width = lines.lines() * held_.pitch, C = layers_.channels;
    x_.load(in_.x, in_.size, image, lines.begin, lines.end);
    normalise_pixels<A>(x_.at(lines.begin), x_.span(), C, width, scale_.at(lines.begin), static_cast<A>(in_.eps));
    Ahead x = x_.ahead(in_.x, in_.size, image, lines.end, lines.end + held_.step, 2 * C, width);
    Ahead dy = dt_.ahead(grad_.dy, in_.size, image, lines.begin, lines.end, 2 * C, width);
    layers_.first.forward(x_.at(lines.begin), x_.span(), width, [&](int64_t row, int64_t i, const auto& sums) {
      x.some(), dy.some();
      each_vector(sums, 2 * C - row, [&](int64_t r, int64_t v, Vec<A> sum) {
        const bool is_u = row + r < C;
        const int64_t c = is_u ? row + r : row + r - C;
        const GeluBoth<A> both = gelu_both<A>(sum);
        store((is_u ? u_ : g_).at(lines.begin, c) + i + v, both.value);
        store((is_u ? u_slope_ : g_slope_).at(lines.begin, c) + i + v, both.gradient);
      });
    });
    g_.clear_gaps(lines.begin, lines.end);
    if (lines.end == in_.size.height) g_.clear_line(lines.end);
  }

  void gate(int64_t image, const Stage& lines, A* sums) {
    const int64_t width = lines.lines() * held_.pitch, C = layers_.channels;
    if (width == 0) return;
    for (int64_t c = 0; c < C; ++c) {
      const A *const u = u_.at(lines.begin, c), *const g = g_.at(lines.begin, c);
      A *const product = product_.at(lines.begin, c), *const du = du_.at(lines.begin, c);
      for (int64_t i = 0; i < width; i += kLanes<A>) {
        const Vec<A> seen = layers_.stencil(c, g + i, held_.pitch);
        store(du + i, seen);
        store(product + i, load(u + i) * seen);
      }
    }
    dt_.load(grad_.dy, in_.size, image, lines.begin, lines.end);
    layers_.second.forward(product_.at(lines.begin), product_.span(), width,
                           [&](int64_t row, int64_t i, const auto& t) {
                             each_vector(t, C - row, [&](int64_t r, int64_t v, Vec<A> sum) {
                               A* const at = dt_.at(lines.begin, row + r) + i + v;
                               store(at, load(at) * gelu_gradient<A>(sum));
                             });
                           });
    dt_.clear_gaps(lines.begin, lines.end);
    dt_.clear_behind(lines.end);
    layers_.second.backward(dt_.at(lines.begin), dt_.span(), width, [&](int64_t row, int64_t i, const auto& dp) {
      each_vector(dp, C - row, [&](int64_t r, int64_t v, Vec<A> sum) {
        const int64_t c = row + r;
        A* const du = du_.at(lines.begin, c) + i + v;
        store(du, load(du) * sum);
        store(dc_.at(lines.begin, c) + i + v, load(u_.at(lines.begin, c) + i + v) * sum);
      });
    });
    if (lines.end == in_.size.height) dc_.clear_line(lines.end);
    const int64_t first = larger(lines.begin, own_.first), last = smaller(lines.end, own_.last);
    if (first >= last) return;
    if (last < lines.end) dt_.clear_line(last);  // which is made again for its band
    layers_.second.add_gradients(sums, dt_.at(first), dt_.span(), product_.at(first), product_.span(),
                                 (last - first) * held_.pitch);
  }

  void write(int64_t image, const Stage& lines, A* sums) {
    const int64_t width = lines.lines() * held_.pitch, C = layers_.channels;
    if (width == 0) return;
    A* const gate_sums = sums + layers_.first.sums() + layers_.second.sums();
    for (int64_t c = 0; c < C; ++c) {
      const A *const dc = dc_.at(lines.begin, c), *const g = g_.at(lines.begin, c);
      const A *const u_slope = u_slope_.at(lines.begin, c), *const g_slope = g_slope_.at(lines.begin, c);
      const A* const du = du_.at(lines.begin, c);
      A *const ds_u = ds_.at(lines.begin, c), *const ds_g = ds_.at(lines.begin, c + C);
      Vec<A> sum[10]{};
      for (int64_t i = 0; i < width; i += kLanes<A>) {
        const Vec<A> d = i + kLanes<A> <= width ? load(dc + i) : first_of<A>(load(dc + i), width - i);
        each_of_nine(held_.pitch,
                     [&](int64_t distance, auto tap) { sum[decltype(tap)::value] += d * load(g + i + distance); });
        sum[9] += d;
        store(ds_u + i, load(du + i) * load(u_slope + i));
        store(ds_g + i, layers_.stencil_backward(c, dc + i, held_.pitch) * load(g_slope + i));
      }
      for (int k = 0; k < 10; ++k) gate_sums[c * 10 + k] += total<A>(sum[k]);
    }
    ds_.clear_gaps(lines.begin, lines.end);
    ds_.clear_behind(lines.end);
    layers_.first.add_gradients(sums, ds_.at(lines.begin), ds_.span(), x_.at(lines.begin), x_.span(), width);
    A* const dx = product_.at(lines.begin);
    layers_.first.backward(dx, product_.span(), ds_.at(lines.begin), ds_.span(), width);
    normalise_backward<A>(dx, x_.at(lines.begin), x_.span(), C, width, scale_.at(lines.begin));
    dt_.load(grad_.dy, in_.size, image, lines.begin, lines.end);
    for (int64_t c = 0; c < C; ++c) {
      A* const row = product_.at(lines.begin, c);
      const A* const dy = dt_.at(lines.begin, c);
      for (int64_t i = 0; i < width; i += kLanes<A>) store(row + i, load(row + i) + load(dy + i));
    }
    product_.save(grad_.dx, image, lines.begin, lines.end);
  }

  const GatedFfn& in_;
  const GatedFfnGradients& grad_;
  const Layers<A, Cell>& layers_;
  const Bands& bands_;
  Held held_;
  LineRange own_{};
  // What the stages know by the names above; du is c at first. `product` is u c, then dx; dt begins and ends as dy.
  Slab<A> x_, u_, g_, u_slope_, g_slope_, du_, dc_, product_, dt_, ds_, scale_;
};

template <class A, class Cell>
void run_forward(const GatedFfn& in, const TypedImage& y) {
  const Layers<A, Cell> layers(in);
  const Bands bands(in.size);
  for_each_range(bands.count(), [&](int64_t begin, int64_t end) {
    Forward<A, Cell> forward(in, y, layers, bands);
    for (int64_t band = begin; band < end; ++band) forward(band);
  });
}

template <class A, class Cell>
void run_backward(const GatedFfn& in, const GatedFfnGradients& grad) {
  const Layers<A, Cell> layers(in);
  const Bands bands(in.size);
  const int64_t of_gate = layers.channels * 10, all = layers.first.sums() + layers.second.sums() + of_gate;
  const Buffer<A> partial(bands.count() * all), sums(all);
  std::memset(partial, 0, bands.count() * all * sizeof(A));
  for_each_range(bands.count(), [&](int64_t begin, int64_t end) {
    Backward<A, Cell> backward(in, grad, layers, bands);
    for (int64_t band = begin; band < end; ++band) backward(band, partial + band * all);
  });
  add_up<A>(sums, partial, bands.count(), all);
  layers.first.write_gradients(sums, grad.dnorm_weight, grad.dnorm_bias, grad.dweight_1, grad.dbias_1);
  layers.second.write_gradients(sums + layers.first.sums(), {}, {}, grad.dweight_2, grad.dbias_2);
  const A* const of = sums + layers.first.sums() + layers.second.sums();
  for (int64_t c = 0; c < layers.channels; ++c) {
    for (int64_t tap = 0; tap < 9; ++tap) set_value(grad.dweight_gate, c * 9 + tap, of[c * 10 + tap]);
    set_value(grad.dbias_gate, c, of[c * 10 + 9]);
  }
}

}  // namespace

void gated_ffn(const GatedFfn& in, const TypedImage& y) {
  with_precision(in.is_double, in.weight_1, [&](auto precision) {
    run_forward<typename decltype(precision)::A, typename decltype(precision)::Cell>(in, y);
  });
}

void gated_ffn_backward(const GatedFfn& in, const GatedFfnGradients& grad) {
  with_precision(in.is_double, in.weight_1, [&](auto precision) {
    run_backward<typename decltype(precision)::A, typename decltype(precision)::Cell>(in, grad);
  });
}

}  // namespace seemore::SEEMORE_ISA
