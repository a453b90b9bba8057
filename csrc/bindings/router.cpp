// router as operators of a library. Results are written to tensors that the caller allocated, all contiguous but da.

#include "params/router.h"

#include "bindings/tensors.h"

namespace {

using namespace seemore::bindings;

struct Decision {
  int64_t batch, channels, experts, top_k;
};

// Checks the tensors that forward and backward share: all but the images and the weights are of `accum`.
class RouterCheck {
 public:
  RouterCheck(const Check& check, ScalarType accum, const Tensor& weight, Decision sizes)
      : check_(check), accum_(accum), sizes_(sizes) {
    for (const int64_t size : {sizes.channels, sizes.experts}) {
      if (size == 0) check.refuse("weight", "has no elements", "at least one expert and channel");
    }
    weights("weight", weight);
    if (sizes.top_k < 1 || sizes.top_k > sizes.experts) {
      check.refuse("top_k", "is " + std::to_string(sizes.top_k), "1 to " + std::to_string(sizes.experts));
    }
  }

  void weights(const char* name, const Tensor& x) const {
    plain(name, x, {sizes_.experts, sizes_.channels}, x.scalar_type());
  }

  void index(const Tensor& x) const { plain("expert_index", x, {sizes_.batch, sizes_.top_k}, ScalarType::Long); }

  void choices(const char* name, const Tensor& x) const { accumulated(name, x, {sizes_.batch, sizes_.top_k}); }

  void means(const char* name, const Tensor& x) const { accumulated(name, x, {sizes_.batch, sizes_.channels}); }

  void probability(const Tensor& x) const { accumulated("probability", x, {sizes_.batch, sizes_.experts}); }

  // Of any strides.
  void upstream(const Tensor& x) const { typed("dexpert_weight", x, {sizes_.batch, sizes_.top_k}, accum_); }

  seemore::Routing routing(const Tensor& weight) const {
    const auto accum = accum_ == ScalarType::Double ? seemore::DType::float64 : seemore::DType::float32;
    const auto dtype = Check("router", "weight", weight, 2, "(E, C)").dtype();
    return {accum, dtype, sizes_.batch, sizes_.channels, sizes_.experts, sizes_.top_k, weight.data_ptr()};
  }

 private:
  void typed(const char* name, const Tensor& x, Shape shape, ScalarType dtype) const {
    check_.of_any_dtype(name, x, shape);
    if (x.scalar_type() == dtype) return;
    check_.refuse(name, "has another dtype",
                  dtype == ScalarType::Long     ? "int64"
                  : dtype == ScalarType::Double ? "float64"
                                                : "float32");
  }

  void plain(const char* name, const Tensor& x, Shape shape, ScalarType dtype) const {
    typed(name, x, shape, dtype);
    check_.contiguous(name, x);
  }

  void accumulated(const char* name, const Tensor& x, Shape shape) const { plain(name, x, shape, accum_); }

  const Check& check_;
  ScalarType accum_;
  Decision sizes_;
};

// The number of experts; any number for a tensor that is no matrix, which RouterCheck refuses.
int64_t rows(const Tensor& weight) { return weight.dim() == 2 ? weight.size(0) : 1; }

int64_t columns(const Tensor& x) { return x.dim() == 2 ? x.size(1) : 1; }

void check_pixels(const Check& check, const char* name, const Tensor& image) {
  if (image.size(2) == 0 || image.size(3) == 0) check.refuse(name, "has no pixels", "at least one");
}

void router(const Tensor& expert_index, const Tensor& expert_weight, const Tensor& mean, const Tensor& probability,
            const Tensor& a, const Tensor& weight, int64_t top_k) {
  const Check check("router", "a", a);
  const auto [batch, channels, height, width] = size(a);
  check_pixels(check, "a", a);
  const RouterCheck checked(check, accumulation_type(a), weight, {batch, channels, rows(weight), top_k});
  checked.index(expert_index);
  checked.choices("expert_weight", expert_weight);
  checked.means("mean", mean);
  checked.probability(probability);
  const auto routing = checked.routing(weight);
  const OnDevice device(a);
  const seemore::SizedImage pooled{check.dtype(), size(a), image(a)};
  const int64_t parts = seemore::pool_parts(pooled);
  const auto partial = torch::stable::new_empty(a, {parts, batch, channels}, accumulation_type(a));
  seemore::pool(pooled, partial.data_ptr(), device.stream);
  seemore::route(routing,
                 {partial.data_ptr(), parts, height * width, static_cast<int64_t*>(expert_index.data_ptr()),
                  expert_weight.data_ptr(), mean.data_ptr(), probability.data_ptr()},
                 device.stream);
}

// Without `mean`, `partial` has the means themselves.
void router_from_sums(const Tensor& expert_index, const Tensor& expert_weight, const OptionalTensor& mean,
                      const Tensor& probability, const Tensor& partial, const Tensor& weight, int64_t pixels,
                      int64_t top_k) {
  const Check check("router", "partial", partial, 3, "(parts, B, C)");
  const auto accum = partial.scalar_type();
  if (accum != accumulation_type(partial)) check.refuse("partial", "has another dtype", "float32 or float64");
  const int64_t parts = partial.size(0), batch = partial.size(1), channels = partial.size(2);
  const RouterCheck checked(check, accum, weight, {batch, channels, rows(weight), top_k});
  check.contiguous("partial", partial);
  if (pixels < 1) check.refuse("pixels", "is " + std::to_string(pixels), "at least 1");
  if (!mean && (parts != 1 || pixels != 1)) check.refuse("mean", "is None", "a tensor: partial has no means");
  checked.index(expert_index);
  checked.choices("expert_weight", expert_weight);
  if (mean) checked.means("mean", *mean);
  checked.probability(probability);
  const auto routing = checked.routing(weight);
  const OnDevice device(partial);
  seemore::route(routing,
                 {partial.data_ptr(), parts, pixels, static_cast<int64_t*>(expert_index.data_ptr()),
                  expert_weight.data_ptr(), mean ? mean->data_ptr() : nullptr, probability.data_ptr()},
                 device.stream);
}

void route_backward(const RouterCheck& checked, const Tensor& dmean, const Tensor& dweight,
                    const Tensor& dexpert_weight, const Tensor& expert_index, const Tensor& mean,
                    const Tensor& probability, const Tensor& weight, void* stream) {
  checked.weights("dweight", dweight);
  checked.upstream(dexpert_weight);
  checked.index(expert_index);
  checked.means("mean", mean);
  checked.probability(probability);
  const auto routing = checked.routing(weight);
  if (dweight.scalar_type() != weight.scalar_type()) {
    throw std::runtime_error("router: dweight has another dtype, expected that of weight");
  }
  seemore::route_backward(routing,
                          {dexpert_weight.data_ptr(), dexpert_weight.stride(0), dexpert_weight.stride(1),
                           static_cast<const int64_t*>(expert_index.data_ptr()), mean.data_ptr(),
                           probability.data_ptr(), dmean.data_ptr(), dweight.data_ptr()},
                          stream);
}

void router_backward(const Tensor& da, const Tensor& dweight, const Tensor& dexpert_weight, const Tensor& expert_index,
                     const Tensor& mean, const Tensor& probability, const Tensor& weight) {
  const Check check("router", "da", da);
  const auto [batch, channels, height, width] = size(da);
  check_pixels(check, "da", da);
  const RouterCheck checked(check, accumulation_type(da), weight,
                            {batch, channels, rows(weight), columns(expert_index)});
  const OnDevice device(da);
  const auto dmean = torch::stable::new_empty(da, {batch, channels}, accumulation_type(da));
  route_backward(checked, dmean, dweight, dexpert_weight, expert_index, mean, probability, weight, device.stream);
  seemore::spread({check.dtype(), size(da), image(da)}, dmean.data_ptr(), device.stream);
}

// The gradient with respect to the pooled mean only.
void router_from_sums_backward(const Tensor& dmean, const Tensor& dweight, const Tensor& dexpert_weight,
                               const Tensor& expert_index, const Tensor& mean, const Tensor& probability,
                               const Tensor& weight) {
  const Check check("router", "dmean", dmean, 2, "(B, C)");
  if (dmean.scalar_type() != accumulation_type(dmean)) {
    check.refuse("dmean", "has another dtype", "float32 or float64");
  }
  const RouterCheck checked(check, dmean.scalar_type(), weight,
                            {dmean.size(0), dmean.size(1), rows(weight), columns(expert_index)});
  checked.means("dmean", dmean);
  const OnDevice device(dmean);
  route_backward(checked, dmean, dweight, dexpert_weight, expert_index, mean, probability, weight, device.stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def(
      "router(Tensor(a!) expert_index, Tensor(b!) expert_weight, Tensor(c!) mean, Tensor(d!) probability, Tensor a, "
      "Tensor weight, int top_k) -> ()");
  m.def(
      "router_backward(Tensor(a!) da, Tensor(b!) dweight, Tensor dexpert_weight, Tensor expert_index, Tensor mean, "
      "Tensor probability, Tensor weight) -> ()");
  m.def(
      "router_from_sums(Tensor(a!) expert_index, Tensor(b!) expert_weight, Tensor(c!)? mean, Tensor(d!) probability, "
      "Tensor partial, Tensor weight, int pixels, int top_k) -> ()");
  m.def(
      "router_from_sums_backward(Tensor(a!) dmean, Tensor(b!) dweight, Tensor dexpert_weight, Tensor expert_index, "
      "Tensor mean, Tensor probability, Tensor weight) -> ()");
}

// For tensors of every device, so that Check refuses those of another one.
STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("router", TORCH_BOX(&router));
  m.impl("router_backward", TORCH_BOX(&router_backward));
  m.impl("router_from_sums", TORCH_BOX(&router_from_sums));
  m.impl("router_from_sums_backward", TORCH_BOX(&router_from_sums_backward));
}
