// gated_ffn on the CPU: a band of rows slides through its stages, each of which lags behind the one before by the halo
// of the 3x3 kernel.
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

// The parameters in the accumulation type, and packed.
template <class A, class Cell>
struct GatedFfnWeights {
  explicit GatedFfnWeights(const GatedFfn& in)
      : channels(in.size.channels),
        first(in.norm_weight, in.norm_bias, in.weight_1, in.bias_1, 2 * channels, channels),
        second({}, {}, in.weight_2, in.bias_2, channels, channels),
        gate(channels * 10) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t tap = 0; tap < 9; ++tap) gate[c * 10 + tap] = value_of<A>(in.weight_gate, c * 9 + tap);
      gate[c * 10 + 9] = value_of<A>(in.bias_gate, c);
    }
  }

  // The stencil of channel c at g, with its bias.
  Vec<A> stencil(int64_t c, const A* g, int64_t padded_width) const {
    const A* const weight = gate + c * 10;
    Vec<A> sum = broadcast(weight[9]);
    each_of_nine(padded_width,
                 [&](int64_t distance, auto tap) { sum += weight[decltype(tap)::value] * load(g + distance); });
    return sum;
  }
  Vec<A> stencil_backward(int64_t c, const A* d, int64_t padded_width) const {
    const A* const weight = gate + c * 10;
    Vec<A> sum{};
    each_of_nine(padded_width,
                 [&](int64_t distance, auto tap) { sum += weight[decltype(tap)::value] * load(d - distance); });
    return sum;
  }

  int64_t channels;
  NormedLayer<A, Cell> first, second;
  Buffer<A> gate;  // (C, 10): nine taps and the bias
};

template <class A, class Cell>
class GatedFfnForward {
 public:
  GatedFfnForward(const GatedFfn& in, const TypedImage& y, const GatedFfnWeights<A, Cell>& weights, const Bands& bands)
      : in_(in),
        y_(y),
        weights_(weights),
        bands_(bands),
        window_(in.size.width, 2, kPixels),
        x_(window_, weights.channels),
        u_(window_, weights.channels),
        g_(window_, weights.channels),
        product_(window_, weights.channels),
        scale_(window_, 1) {}

  void operator()(int64_t band) {
    const int64_t image = bands_.image(band);
    BandStage reading(bands_, band, 1), writing(bands_, band, 0);
    Slab<A>* const slabs[] = {&x_, &u_, &g_};
    for (Slab<A>* slab : slabs) slab->clear();
    window_.base = reading.first - window_.kept;
    while (writing.end < writing.last) {
      reading.begin = reading.end;
      reading.end = smaller(reading.last, reading.begin + window_.step);
      read(image, reading);
      writing.follow(reading, 1);
      write(image, writing);
      if (writing.end == writing.last) return;
      u_.slide(reading.end), g_.slide(reading.end);
      window_.base = reading.end - window_.kept;
    }
  }

 private:
  void read(int64_t image, const BandStage& stage) {
    const int64_t width = stage.rows() * window_.padded_width, C = weights_.channels;
    x_.load(in_.x, in_.size, image, stage.begin, stage.end);
    normalise_pixels<A>(x_.address(stage.begin), x_.row_stride(), C, width, scale_.address(stage.begin),
                        static_cast<A>(in_.eps));
    Prefetcher x = x_.prefetch(in_.x, in_.size, image, stage.end, stage.end + window_.step, 2 * C, width);
    weights_.first.forward(
        x_.address(stage.begin), x_.row_stride(), width, [&](int64_t row, int64_t i, const auto& sums) {
          x.advance();
          each_vector(sums, 2 * C - row, [&](int64_t r, int64_t v, Vec<A> sum) {
            const int64_t c = row + r;
            store((c < C ? u_.address(stage.begin, c) : g_.address(stage.begin, c - C)) + i + v, gelu<A>(sum));
          });
        });
    g_.clear_gaps(stage.begin, stage.end);
    if (stage.end == in_.size.height) g_.clear_row(stage.end);
  }

  void write(int64_t image, const BandStage& stage) {
    const int64_t width = stage.rows() * window_.padded_width, C = weights_.channels;
    for (int64_t c = 0; c < C; ++c) {
      const A *const u = u_.address(stage.begin, c), *const g = g_.address(stage.begin, c);
      A* const product = product_.address(stage.begin, c);
      for (int64_t i = 0; i < width; i += kLanes<A>) {
        store(product + i, load(u + i) * weights_.stencil(c, g + i, window_.padded_width));
      }
    }
    x_.load(in_.x, in_.size, image, stage.begin, stage.end);
    weights_.second.forward(product_.address(stage.begin), product_.row_stride(), width,
                            [&](int64_t row, int64_t i, const auto& sums) {
                              each_vector(sums, C - row, [&](int64_t r, int64_t v, Vec<A> sum) {
                                A* const at = x_.address(stage.begin, row + r) + i + v;
                                store(at, load(at) + gelu<A>(sum));
                              });
                            });
    x_.save(y_, image, stage.begin, stage.end);
  }

  const GatedFfn& in_;
  const TypedImage& y_;
  const GatedFfnWeights<A, Cell>& weights_;
  const Bands& bands_;
  SlabWindow window_;
  Slab<A> x_, u_, g_, product_, scale_;
};

template <class A, class Cell>
class GatedFfnBackward {
 public:
  GatedFfnBackward(const GatedFfn& in, const GatedFfnGradients& grad, const GatedFfnWeights<A, Cell>& weights,
                   const Bands& bands)
      : in_(in),
        grad_(grad),
        weights_(weights),
        bands_(bands),
        window_(in.size.width, 3, kPixels),
        x_(window_, weights.channels),
        u_(window_, weights.channels),
        g_(window_, weights.channels),
        u_slope_(window_, weights.channels),
        g_slope_(window_, weights.channels),
        du_(window_, weights.channels),
        dc_(window_, weights.channels),
        product_(window_, weights.channels),
        dt_(window_, weights.channels),
        ds_(window_, 2 * weights.channels),
        scale_(window_, 1) {}

  // Adds to the sums of the first layer, the second, and the gate.
  void operator()(int64_t band, A* sums) {
    const int64_t image = bands_.image(band);
    own_ = {bands_.top(band), bands_.bottom(band)};
    BandStage reading(bands_, band, 2), gating(bands_, band, 1), writing(bands_, band, 0);
    Slab<A>* const cleared[] = {&x_, &u_, &g_, &dc_, &dt_};
    Slab<A>* const sliding[] = {&x_, &u_, &g_, &u_slope_, &g_slope_, &du_, &dc_, &scale_};
    for (Slab<A>* slab : cleared) slab->clear();
    window_.base = reading.first - window_.kept;
    while (true) {
      reading.begin = reading.end;
      reading.end = smaller(reading.last, reading.begin + window_.step);
      read(image, reading);
      gating.follow(reading, 1);
      gate(image, gating, sums + weights_.first.sums());
      writing.follow(gating, 1);
      write(image, writing, sums);
      if (writing.end == writing.last) return;
      for (Slab<A>* slab : sliding) slab->slide(reading.end);
      window_.base = reading.end - window_.kept;
    }
  }

 private:
  void read(int64_t image, const BandStage& stage) {
    const int64_t width = stage.rows() * window_.padded_width, C = weights_.channels;
    x_.load(in_.x, in_.size, image, stage.begin, stage.end);
    normalise_pixels<A>(x_.address(stage.begin), x_.row_stride(), C, width, scale_.address(stage.begin),
                        static_cast<A>(in_.eps));
    Prefetcher x = x_.prefetch(in_.x, in_.size, image, stage.end, stage.end + window_.step, 2 * C, width);
    Prefetcher dy = dt_.prefetch(grad_.dy, in_.size, image, stage.begin, stage.end, 2 * C, width);
    weights_.first.forward(x_.address(stage.begin), x_.row_stride(), width,
                           [&](int64_t row, int64_t i, const auto& sums) {
                             x.advance(), dy.advance();
                             each_vector(sums, 2 * C - row, [&](int64_t r, int64_t v, Vec<A> sum) {
                               const bool is_u = row + r < C;
                               const int64_t c = is_u ? row + r : row + r - C;
                               const GeluBoth<A> both = gelu_both<A>(sum);
                               store((is_u ? u_ : g_).address(stage.begin, c) + i + v, both.value);
                               store((is_u ? u_slope_ : g_slope_).address(stage.begin, c) + i + v, both.gradient);
                             });
                           });
    g_.clear_gaps(stage.begin, stage.end);
    if (stage.end == in_.size.height) g_.clear_row(stage.end);
  }

  void gate(int64_t image, const BandStage& stage, A* sums) {
    const int64_t width = stage.rows() * window_.padded_width, C = weights_.channels;
    if (width == 0) return;
    for (int64_t c = 0; c < C; ++c) {
      const A *const u = u_.address(stage.begin, c), *const g = g_.address(stage.begin, c);
      A *const product = product_.address(stage.begin, c), *const du = du_.address(stage.begin, c);
      for (int64_t i = 0; i < width; i += kLanes<A>) {
        const Vec<A> seen = weights_.stencil(c, g + i, window_.padded_width);
        store(du + i, seen);
        store(product + i, load(u + i) * seen);
      }
    }
    dt_.load(grad_.dy, in_.size, image, stage.begin, stage.end);
    weights_.second.forward(product_.address(stage.begin), product_.row_stride(), width,
                            [&](int64_t row, int64_t i, const auto& t) {
                              each_vector(t, C - row, [&](int64_t r, int64_t v, Vec<A> sum) {
                                A* const at = dt_.address(stage.begin, row + r) + i + v;
                                store(at, load(at) * gelu_gradient<A>(sum));
                              });
                            });
    dt_.clear_gaps(stage.begin, stage.end);
    dt_.clear_behind(stage.end);
    weights_.second.backward(
        dt_.address(stage.begin), dt_.row_stride(), width, [&](int64_t row, int64_t i, const auto& dp) {
          each_vector(dp, C - row, [&](int64_t r, int64_t v, Vec<A> sum) {
            const int64_t c = row + r;
            A* const du = du_.address(stage.begin, c) + i + v;
            store(du, load(du) * sum);
            store(dc_.address(stage.begin, c) + i + v, load(u_.address(stage.begin, c) + i + v) * sum);
          });
        });
    if (stage.end == in_.size.height) dc_.clear_row(stage.end);
    const int64_t first = larger(stage.begin, own_.first), last = smaller(stage.end, own_.last);
    if (first >= last) return;
    if (last < stage.end) dt_.clear_row(last);  // which its own band computes
    weights_.second.add_gradients(sums, dt_.address(first), dt_.row_stride(), product_.address(first),
                                  product_.row_stride(), (last - first) * window_.padded_width);
  }

  void write(int64_t image, const BandStage& stage, A* sums) {
    const int64_t width = stage.rows() * window_.padded_width, C = weights_.channels;
    if (width == 0) return;
    A* const gate_sums = sums + weights_.first.sums() + weights_.second.sums();
    for (int64_t c = 0; c < C; ++c) {
      const A *const dc = dc_.address(stage.begin, c), *const g = g_.address(stage.begin, c);
      const A *const u_slope = u_slope_.address(stage.begin, c), *const g_slope = g_slope_.address(stage.begin, c);
      const A* const du = du_.address(stage.begin, c);
      A *const ds_u = ds_.address(stage.begin, c), *const ds_g = ds_.address(stage.begin, c + C);
      Vec<A> sum[10]{};
      for (int64_t i = 0; i < width; i += kLanes<A>) {
        const Vec<A> d = i + kLanes<A> <= width ? load(dc + i) : first_of<A>(load(dc + i), width - i);
        each_of_nine(window_.padded_width,
                     [&](int64_t distance, auto tap) { sum[decltype(tap)::value] += d * load(g + i + distance); });
        sum[9] += d;
        store(ds_u + i, load(du + i) * load(u_slope + i));
        store(ds_g + i, weights_.stencil_backward(c, dc + i, window_.padded_width) * load(g_slope + i));
      }
      for (int k = 0; k < 10; ++k) gate_sums[c * 10 + k] += total<A>(sum[k]);
    }
    ds_.clear_gaps(stage.begin, stage.end);
    ds_.clear_behind(stage.end);
    weights_.first.add_gradients(sums, ds_.address(stage.begin), ds_.row_stride(), x_.address(stage.begin),
                                 x_.row_stride(), width);
    A* const dx = product_.address(stage.begin);
    weights_.first.backward(dx, product_.row_stride(), ds_.address(stage.begin), ds_.row_stride(), width);
    normalise_backward<A>(dx, x_.address(stage.begin), x_.row_stride(), C, width, scale_.address(stage.begin));
    dt_.load(grad_.dy, in_.size, image, stage.begin, stage.end);
    for (int64_t c = 0; c < C; ++c) {
      A* const row = product_.address(stage.begin, c);
      const A* const dy = dt_.address(stage.begin, c);
      for (int64_t i = 0; i < width; i += kLanes<A>) store(row + i, load(row + i) + load(dy + i));
    }
    product_.save(grad_.dx, image, stage.begin, stage.end);
  }

  const GatedFfn& in_;
  const GatedFfnGradients& grad_;
  const GatedFfnWeights<A, Cell>& weights_;
  const Bands& bands_;
  SlabWindow window_;
  RowRange own_{};
  // The values of the formulas above; du is c at first. `product` is u c, then dx; dt begins and ends as dy.
  Slab<A> x_, u_, g_, u_slope_, g_slope_, du_, dc_, product_, dt_, ds_, scale_;
};

template <class A, class Cell>
void run_forward(Precision<A, Cell>, const GatedFfn& in, const TypedImage& y) {
  const GatedFfnWeights<A, Cell> weights(in);
  const Bands bands(in.size);
  for_each_range(bands.count(), [&](int64_t begin, int64_t end) {
    GatedFfnForward<A, Cell> forward(in, y, weights, bands);
    for (int64_t band = begin; band < end; ++band) forward(band);
  });
}

template <class A, class Cell>
void run_backward(Precision<A, Cell>, const GatedFfn& in, const GatedFfnGradients& grad) {
  const GatedFfnWeights<A, Cell> weights(in);
  const Bands bands(in.size);
  const int64_t of_gate = weights.channels * 10, all = weights.first.sums() + weights.second.sums() + of_gate;
  const Buffer<A> partial(bands.count() * all), sums(all);
  std::memset(partial, 0, bands.count() * all * sizeof(A));
  for_each_range(bands.count(), [&](int64_t begin, int64_t end) {
    GatedFfnBackward<A, Cell> backward(in, grad, weights, bands);
    for (int64_t band = begin; band < end; ++band) backward(band, partial + band * all);
  });
  add_up<A>(sums, partial, bands.count(), all);
  weights.first.write_gradients(sums, grad.dnorm_weight, grad.dnorm_bias, grad.dweight_1, grad.dbias_1);
  weights.second.write_gradients(sums + weights.first.sums(), {}, {}, grad.dweight_2, grad.dbias_2);
  const A* const of = sums + weights.first.sums() + weights.second.sums();
  for (int64_t c = 0; c < weights.channels; ++c) {
    for (int64_t tap = 0; tap < 9; ++tap) set_value(grad.dweight_gate, c * 9 + tap, of[c * 10 + tap]);
    set_value(grad.dbias_gate, c, of[c * 10 + 9]);
  }
}

}  // namespace

void gated_ffn(const GatedFfn& in, const TypedImage& y) {
  with_precision(in.is_double, in.weight_1, [&](auto precision) { run_forward(precision, in, y); });
}

void gated_ffn_backward(const GatedFfn& in, const GatedFfnGradients& grad) {
  with_precision(in.is_double, in.weight_1, [&](auto precision) { run_backward(precision, in, grad); });
}

}  // namespace seemore::SEEMORE_ISA
