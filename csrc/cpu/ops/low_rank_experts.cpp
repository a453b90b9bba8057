// low_rank_experts on the CPU: a task takes a block of pixels of one image, whose chosen experts are one matrix of
// rows.
//
//   m_e = p_e (Wa_e a + ba_e) (Wk_e k + bk_e);  y = r + P [I, Wout_e, ..] [a, m_e, ..] + P sum p_e bout_e + bp
//
// P is the projection, or 1 with r = 0. So the gradients of P, Wout, bout and bp follow from the sums over the pixels
// of dy [a, m, 1]^T.

#include "params/low_rank_experts.h"

#include "cpu/tile/linear.h"
#include "cpu/tile/pixel_sums.h"

namespace seemore::SEEMORE_ISA {
namespace {

constexpr int64_t kPixels = 1024;  // of a block

// The parameters in the accumulation type.
template <class A>
struct ExpertParameters {
  explicit ExpertParameters(const LowRankExperts& in)
      : in(in),
        channels(in.size.channels),
        weight_a(in.rank * channels),
        weight_k(in.rank * channels),
        weight_out(channels * in.rank),
        bias_out(in.experts * channels),
        weight_proj(channels * channels) {
    read_values<A>(weight_a, in.weight_a, in.rank * channels);
    read_values<A>(weight_k, in.weight_k, in.rank * channels);
    read_values<A>(weight_out, in.weight_out, in.rank * channels);
    read_values<A>(bias_out, in.bias_out, in.experts * channels);
    for (int64_t i = 0; i < channels * channels; ++i) {
      weight_proj[i] = has_proj() ? value_of<A>(in.weight_proj, i) : i % (channels + 1) == 0;
    }
  }
  bool has_proj() const { return in.weight_proj.data; }

  // The most rows that the choice of an image can have.
  int64_t most_rows() const {
    int64_t largest = 0;
    for (int64_t e = 0; e < in.experts; ++e) largest = larger(largest, in.ranks[e]);
    return in.top_k * largest;
  }

  const LowRankExperts& in;
  int64_t channels;
  Buffer<A> weight_a, weight_k, weight_out, bias_out, weight_proj;  // weight_proj: 1 without a projection
};

// The experts of one image: their rows, one after another.
template <class A>
class Choice {
 public:
  Choice(const ExpertParameters<A>& parameters, int64_t image)
      : parameters_(parameters), rows_(rows_of(parameters, image)), packed_row_(rows_), slot_(rows_), p_(rows_) {
    const LowRankExperts& in = parameters.in;
    for (int64_t slot = 0, row = 0; slot < in.top_k; ++slot) {
      const int64_t expert = in.expert_index[image * in.top_k + slot];
      if (!is_one(in, expert)) continue;
      int64_t first = 0;
      for (int64_t e = 0; e < expert; ++e) first += in.ranks[e];
      for (int64_t r = 0; r < in.ranks[expert]; ++r, ++row) {
        packed_row_[row] = first + r, slot_[row] = slot;
        p_[row] = value_of<A>(in.expert_weight, image * in.top_k + slot);
      }
    }
  }

  static bool is_one(const LowRankExperts& in, int64_t expert) { return expert >= 0 && expert < in.experts; }

  int64_t rows() const { return rows_; }
  int64_t packed(int64_t row) const { return packed_row_[row]; }
  int64_t slot(int64_t row) const { return slot_[row]; }
  A p(int64_t row) const { return p_[row]; }

  A weight_a(int64_t row, int64_t c) const { return parameters_.weight_a[packed(row) * parameters_.channels + c]; }
  A weight_k(int64_t row, int64_t c) const { return parameters_.weight_k[packed(row) * parameters_.channels + c]; }
  A weight_out(int64_t c, int64_t row) const { return parameters_.weight_out[c * parameters_.in.rank + packed(row)]; }

  // Of P Wout
  A projected(int64_t c, int64_t row) const {
    double sum = 0;
    for (int64_t i = 0; i < parameters_.channels; ++i) {
      sum += static_cast<double>(parameters_.weight_proj[c * parameters_.channels + i]) * weight_out(i, row);
    }
    return static_cast<A>(sum);
  }

 private:
  static int64_t rows_of(const ExpertParameters<A>& parameters, int64_t image) {
    const LowRankExperts& in = parameters.in;
    int64_t rows = 0;
    for (int64_t slot = 0; slot < in.top_k; ++slot) {
      const int64_t expert = in.expert_index[image * in.top_k + slot];
      if (is_one(in, expert)) rows += in.ranks[expert];
    }
    return rows;
  }

  const ExpertParameters<A>& parameters_;
  int64_t rows_;
  Buffer<int64_t> packed_row_, slot_;
  Buffer<A> p_;
};

// sum p_e bout_e of an image
template <class A>
inline double chosen_bias(const ExpertParameters<A>& parameters, int64_t image, int64_t c) {
  const LowRankExperts& in = parameters.in;
  double sum = 0;
  for (int64_t slot = 0; slot < in.top_k; ++slot) {
    const int64_t i = image * in.top_k + slot, expert = in.expert_index[i];
    if (!Choice<A>::is_one(in, expert)) continue;
    sum += static_cast<double>(value_of<A>(in.expert_weight, i)) * parameters.bias_out[expert * in.size.channels + c];
  }
  return sum;
}

// The packed matrices of an image's experts.
template <class A, class Cell>
struct PackedExperts {
  PackedExperts(const ExpertParameters<A>& parameters, int64_t image, bool for_backward)
      : choice(parameters, image),
        rows(choice.rows()),
        of_a(rows, parameters.channels),
        of_k(rows, parameters.channels),
        out(for_backward ? 0 : parameters.channels, first(parameters) + rows),
        out_backward(for_backward ? rows : 0, parameters.channels),
        a_backward(for_backward ? parameters.channels : 0, first(parameters) + rows),
        k_backward(for_backward ? parameters.channels : 0, rows) {
    const int64_t C = parameters.channels, at = first(parameters);
    of_a.pack([&](int64_t r, int64_t c) { return choice.weight_a(r, c); });
    of_k.pack([&](int64_t r, int64_t c) { return choice.weight_k(r, c); });
    for (int64_t r = 0; r < rows; ++r) {
      of_a.bias(r) = value_of<A>(parameters.in.bias_a, choice.packed(r));
      of_k.bias(r) = value_of<A>(parameters.in.bias_k, choice.packed(r));
    }
    if (for_backward) {
      out_backward.pack([&](int64_t r, int64_t c) { return choice.projected(c, r); });
      a_backward.pack([&](int64_t c, int64_t i) {
        return i < at ? parameters.weight_proj[i * C + c] : choice.weight_a(i - at, c);
      });
      k_backward.pack([&](int64_t c, int64_t r) { return choice.weight_k(r, c); });
      return;
    }
    out.pack(
        [&](int64_t c, int64_t i) { return i < at ? parameters.weight_proj[c * C + i] : choice.projected(c, i - at); });
    for (int64_t c = 0; c < C; ++c) {
      double sum = parameters.has_proj() ? value_of<A>(parameters.in.bias_proj, c) : 0;
      for (int64_t i = 0; i < C; ++i) {
        sum += static_cast<double>(parameters.weight_proj[c * C + i]) * chosen_bias(parameters, image, i);
      }
      out.bias(c) = static_cast<A>(sum);
    }
  }

  // Without a projection a is added as it is, without a product.
  static int64_t first(const ExpertParameters<A>& parameters) {
    return parameters.has_proj() ? parameters.channels : 0;
  }

  Choice<A> choice;
  int64_t rows;
  Linear<A, Cell> of_a, of_k, out;                       // forward
  Linear<A, Cell> out_backward, a_backward, k_backward;  // dm of dy; da of dy and d(Wa a); dk of d(Wk k)
};

// Call task(image, begin, end) for the blocks of each image in a range.
template <class Task>
inline void for_each_image(const Blocks& blocks, int64_t begin, int64_t end, const Task& task) {
  const int64_t of_image = blocks.size.height * blocks.of_a_row;
  while (begin < end) {
    const int64_t image = begin / of_image, last = smaller(end, (image + 1) * of_image);
    task(image, begin, last);
    begin = last;
  }
}

template <class A, class Cell>
void run_forward(Precision<A, Cell>, const LowRankExperts& in, const TypedImage& residual, const TypedImage& y) {
  const ExpertParameters<A> parameters(in);
  const Blocks blocks(kPixels, in.size, in.a, in.k, residual, y);
  const int64_t C = parameters.channels, most = parameters.most_rows(), row_stride = blocks.row_stride();
  for_each_range(blocks.count(), [&](int64_t begin, int64_t end) {
    const Block<A> a(C + most, row_stride), k(C, row_stride), more(residual.view.data ? C : 0, row_stride);
    for_each_image(blocks, begin, end, [&](int64_t image, int64_t first, int64_t last) {
      const PackedExperts<A, Cell> packed(parameters, image, false);
      const Choice<A>& choice = packed.choice;
      for (int64_t b = first; b < last; ++b) {
        const int64_t count = blocks.width(b), width = round_up(count, kLanes<A>);
        const Place place = blocks.place(b, C, row_stride);
        load_image(a, in.a, blocks.size, place, count);
        load_image(k, in.k, blocks.size, place, count);
        if (residual.view.data) load_image(more, residual, blocks.size, place, count);
        packed.of_a(a[C], row_stride, a, row_stride, width);
        packed.of_k(k, row_stride, width, [&](int64_t row, int64_t i, const auto& sums) {
          each_vector(sums, packed.rows - row, [&](int64_t r, int64_t v, Vec<A> sum) {
            A* const m = a[C + row + r] + i + v;
            store(m, load(m) * sum * choice.p(row + r));
          });
        });
        const Block<A>& added = residual.view.data ? more : a;
        packed.out(a[C - PackedExperts<A, Cell>::first(parameters)], row_stride, width,
                   [&](int64_t row, int64_t i, const auto& sums) {
                     each_vector(sums, C - row, [&](int64_t r, int64_t v, Vec<A> sum) {
                       store(k[row + r] + i + v, load(added[row + r] + i + v) + sum);
                     });
                   });
        store_image(y, place, k, count);
      }
    });
  });
}

// The sums of a block, with room for the most rows.
template <class A>
struct ExpertSums {
  ExpertSums(int64_t channels, int64_t most, int64_t top_k, A* memory)
      : columns(channels + most),
        dy(memory),
        of_dy(dy + channels * columns),
        of_a(of_dy + channels),
        of_k(of_a + most * (channels + 1)),
        of_p(of_k + most * (channels + 1)),
        count(of_p + top_k - memory) {}

  int64_t columns;
  A *dy, *of_dy;   // of dy [a, m]^T (C, C + rows) and dy (C)
  A *of_a, *of_k;  // of d(Wa a) [a, 1]^T and d(Wk k) [k, 1]^T, (rows, C + 1)
  A* of_p;         // of dp without the part of bout (top_k)
  int64_t count;
};

template <class A, class Cell>
void add_block(const ExpertParameters<A>& parameters, const PackedExperts<A, Cell>& packed, const Block<A>& a,
               const Block<A>& k, const Block<A>& dy, const Block<A>& dm, const Block<A>& dk, int64_t width,
               const ExpertSums<A>& sums) {
  const int64_t C = parameters.channels, first = C - PackedExperts<A, Cell>::first(parameters),
                row_stride = a.row_stride();
  const Choice<A>& choice = packed.choice;
  packed.of_a(a[C], row_stride, a, row_stride, width);
  packed.of_k(k[C], row_stride, k, row_stride, width);
  packed.out_backward(dm, row_stride, dy, row_stride, width);
  for (int64_t r = 0; r < packed.rows; ++r) {  // m; d(Wa a) and d(Wk k)
    A *const of_a = a[C + r], *const of_k = k[C + r], *const d = dm[r], *const da = dy[C + r];
    Vec<A> dp{};
    for (int64_t i = 0; i < width; i += kLanes<A>) {
      const Vec<A> ra = load(of_a + i), rk = load(of_k + i), m = ra * rk, g = load(d + i);
      dp += g * m;
      store(of_a + i, m * choice.p(r));
      store(da + i, g * choice.p(r) * rk);
      store(d + i, g * choice.p(r) * ra);
    }
    sums.of_p[choice.slot(r)] += total<A>(dp);
  }
  add_outer<A, Cell>(sums.dy + first, sums.columns, dy, row_stride, C, a[first], row_stride, C - first + packed.rows,
                     width);
  add_outer<A, Cell>(sums.of_a, C + 1, dy[C], row_stride, packed.rows, a, row_stride, C, width);
  add_outer<A, Cell>(sums.of_k, C + 1, dm, row_stride, packed.rows, k, row_stride, C, width);
  for (int64_t c = 0; c < C; ++c) sums.of_dy[c] += total<A>(row_sum(dy[c], width));
  for (int64_t r = 0; r < packed.rows; ++r) {
    sums.of_a[r * (C + 1) + C] += total<A>(row_sum(dy[C + r], width));
    sums.of_k[r * (C + 1) + C] += total<A>(row_sum(dm[r], width));
  }
  packed.k_backward(dk, row_stride, dm, row_stride, width);
}

// The gradients of parameters, dense: added up image by image.
class DenseGradient {
 public:
  explicit DenseGradient(int64_t count) : sums_(count), count_(count) { std::memset(sums_, 0, count * sizeof(double)); }
  double& operator[](int64_t i) { return sums_[i]; }
  void write(const Parameter& to) const {
    for (int64_t i = 0; i < count_ && to.data; ++i) set_value(to, i, sums_[i]);
  }

 private:
  Buffer<double> sums_;
  int64_t count_;
};

template <class A>
void write_gradients(const ExpertParameters<A>& parameters, const LowRankExpertsGradients& grad, const A* partial,
                     int64_t parts, const ExpertSums<A>& layout) {
  const LowRankExperts& in = parameters.in;
  const int64_t C = parameters.channels, count = layout.count;
  DenseGradient of_a(in.rank * C), bias_a(in.rank), of_k(in.rank * C), bias_k(in.rank), of_out(C * in.rank);
  DenseGradient bias_out(in.experts * C), proj(C * C), bias_proj(C), of_p(in.size.batch * in.top_k);
  const Buffer<A> memory(count);
  const Buffer<double> dm(C);  // sum of the gradient before the projection
  for (int64_t image = 0; image < in.size.batch; ++image) {
    add_up<A>(memory, partial + image * parts * count, parts, count);
    const ExpertSums<A> sums(C, layout.columns - C, in.top_k, memory);
    const Choice<A> choice(parameters, image);
    for (int64_t r = 0; r < choice.rows(); ++r) {
      const int64_t row = choice.packed(r);
      for (int64_t c = 0; c < C; ++c) {
        of_a[row * C + c] += sums.of_a[r * (C + 1) + c], of_k[row * C + c] += sums.of_k[r * (C + 1) + c];
        for (int64_t i = 0; i < C; ++i) {
          of_out[c * in.rank + row] +=
              static_cast<double>(parameters.weight_proj[i * C + c]) * sums.dy[i * sums.columns + C + r];
        }
      }
      bias_a[row] += sums.of_a[r * (C + 1) + C], bias_k[row] += sums.of_k[r * (C + 1) + C];
    }
    for (int64_t c = 0; c < C; ++c) {
      dm[c] = 0;
      for (int64_t i = 0; i < C; ++i) {
        dm[c] += static_cast<double>(parameters.weight_proj[i * C + c]) * sums.of_dy[i];
        double sum = sums.dy[c * sums.columns + i] + sums.of_dy[c] * chosen_bias(parameters, image, i);
        for (int64_t r = 0; r < choice.rows(); ++r) {
          sum += static_cast<double>(sums.dy[c * sums.columns + C + r]) * choice.weight_out(i, r);
        }
        proj[c * C + i] += sum;
      }
      bias_proj[c] += sums.of_dy[c];
    }
    for (int64_t slot = 0; slot < in.top_k; ++slot) {
      const int64_t i = image * in.top_k + slot, expert = in.expert_index[i];
      if (!Choice<A>::is_one(in, expert)) continue;
      of_p[i] = sums.of_p[slot];
      for (int64_t c = 0; c < C; ++c) {
        of_p[i] += dm[c] * parameters.bias_out[expert * C + c];
        bias_out[expert * C + c] += value_of<A>(in.expert_weight, i) * dm[c];
      }
    }
  }
  of_a.write(grad.dweight_a), bias_a.write(grad.dbias_a), of_k.write(grad.dweight_k), bias_k.write(grad.dbias_k);
  of_out.write(grad.dweight_out), bias_out.write(grad.dbias_out), of_p.write(grad.dexpert_weight);
  proj.write(grad.dweight_proj), bias_proj.write(grad.dbias_proj);
}

template <class A, class Cell>
void run_backward(Precision<A, Cell>, const LowRankExperts& in, const LowRankExpertsGradients& grad) {
  const ExpertParameters<A> parameters(in);
  const Blocks blocks(kPixels, in.size, in.a, in.k, grad.dy, grad.da, grad.dk);
  const int64_t C = parameters.channels, most = parameters.most_rows(), row_stride = blocks.row_stride();
  const ExpertSums<A> layout(C, most, in.top_k, nullptr);
  const Buffer<A> partial(blocks.count() * layout.count);
  std::memset(partial, 0, blocks.count() * layout.count * sizeof(A));
  for_each_range(blocks.count(), [&](int64_t begin, int64_t end) {
    // With room for the experts' rows: m, Wk k, d(Wa a); dm, then d(Wk k).
    const Block<A> a(C + most, row_stride), k(C + most, row_stride), dy(C + most, row_stride), dm(most, row_stride),
        out(C, row_stride);
    for_each_image(blocks, begin, end, [&](int64_t image, int64_t first, int64_t last) {
      const PackedExperts<A, Cell> packed(parameters, image, true);
      for (int64_t b = first; b < last; ++b) {
        const int64_t count = blocks.width(b), width = round_up(count, kLanes<A>);
        const Place place = blocks.place(b, C, row_stride);
        load_image(a, in.a, blocks.size, place, count);
        load_image(k, in.k, blocks.size, place, count);
        load_image(dy, grad.dy, blocks.size, place, count);
        clear_tail(dy, C, count);
        const ExpertSums<A> sums(C, most, in.top_k, partial + b * layout.count);
        add_block(parameters, packed, a, k, dy, dm, out, width, sums);
        store_image(grad.dk, place, out, count);
        packed.a_backward(dy[C - PackedExperts<A, Cell>::first(parameters)], row_stride, width,
                          [&](int64_t row, int64_t i, const auto& d) {
                            each_vector(d, C - row, [&](int64_t r, int64_t v, Vec<A> sum) {
                              if (!parameters.has_proj()) sum += load(dy[row + r] + i + v);
                              store(out[row + r] + i + v, sum);
                            });
                          });
        store_image(grad.da, place, out, count);
      }
    });
  });
  write_gradients(parameters, grad, static_cast<const A*>(partial), blocks.count() / larger(1, in.size.batch), layout);
}

}  // namespace

void low_rank_experts(const LowRankExperts& in, const TypedImage& residual, const TypedImage& y) {
  with_precision(in.is_double, in.weight_a, [&](auto precision) { run_forward(precision, in, residual, y); });
}

void low_rank_experts_backward(const LowRankExperts& in, const LowRankExpertsGradients& grad) {
  with_precision(in.is_double, in.weight_a, [&](auto precision) { run_backward(precision, in, grad); });
}

}  // namespace seemore::SEEMORE_ISA
