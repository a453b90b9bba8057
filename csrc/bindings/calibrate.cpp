// calibrate as an operator of a library. Results are written to tensors that the caller allocated.

#include "params/calibrate.h"

#include "bindings/tensors.h"

#define PARAMETERS(P)               \
  P(Tensor, weight_agg, C, 1, 4, 4) \
  P(Tensor, bias_agg, C)            \
  P(Tensor, weight_dw, C, 1, 3, 3)  \
  P(Tensor, bias_dw, C)             \
  P(Tensor, weight_pw, C, C, 1, 1)  \
  P(Tensor, bias_pw, C)

namespace {

using namespace seemore::bindings;

seemore::Calibrate inputs_of(const Check& check, const Tensor& k, PARAMETERS(SEEMORE_ARGUMENT) int64_t recursive) {
  const int64_t C = k.size(1);
  constexpr int64_t kMost = 14;  // 4^15 pixels are more than a side may have
  if (recursive < 1 || recursive > kMost) {
    check.refuse("recursive", "is " + std::to_string(recursive), "1 to " + std::to_string(kMost));
  }
  const int64_t least = int64_t(1) << 2 * recursive, height = k.size(2), width = k.size(3);
  constexpr int64_t kMostPixels = int64_t(1) << 30;
  if (std::min(height, width) < least || std::max(height, width) >= kMostPixels) {
    check.refuse("k", "is " + std::to_string(height) + "x" + std::to_string(width) + " pixels",
                 "sides of " + std::to_string(least) + " to " + std::to_string(kMostPixels - 1) +
                     " for recursive = " + std::to_string(recursive));
  }
  return {check.dtype(), size(k), recursive, image(k), PARAMETERS(SEEMORE_CHECKED)};
}

void check_maps(const Check& check, const Tensor& maps, const Tensor& k, const seemore::Calibrate& inputs) {
  check.of_any_dtype("maps", maps, {seemore::maps_elements(inputs)});
  if (maps.scalar_type() != accumulation_type(k))
    check.refuse("maps", "has another dtype", "float32 (float64 for that)");
  check.contiguous("maps", maps);
}

void calibrate(const Tensor& y, const Tensor& maps, const Tensor& k, PARAMETERS(SEEMORE_ARGUMENT) int64_t recursive) {
  const Check check("calibrate", "k", k);
  const auto inputs = inputs_of(check, k, PARAMETERS(SEEMORE_VALUE) recursive);
  check("y", y, k.sizes());
  check_maps(check, maps, k, inputs);
  const OnDevice device(k);
  const int64_t elements = seemore::level_size(inputs, recursive).elements();
  const auto small = torch::stable::new_empty(k, {elements}, accumulation_type(k));
  seemore::calibrate(inputs, image(y), maps.data_ptr(), small.data_ptr(), device.stream);
}

void calibrate_backward(const Tensor& dk, PARAMETERS(SEEMORE_GRADIENT) const Tensor& dy, const Tensor& maps,
                        const Tensor& k, PARAMETERS(SEEMORE_ARGUMENT) int64_t recursive) {
  const Check check("calibrate", "k", k);
  const auto inputs = inputs_of(check, k, PARAMETERS(SEEMORE_VALUE) recursive);
  const int64_t C = k.size(1);
  check("dy", dy, k.sizes());
  check("dk", dk, k.sizes());
  void* const gradients[] = {PARAMETERS(SEEMORE_CHECKED_GRADIENT)};
  check_maps(check, maps, k, inputs);
  const OnDevice device(k);
  const auto [agg_parts, mix_parts, scratch_elements] = seemore::calibrate_workspace(inputs);
  const auto accum = accumulation_type(k);
  const auto partial_agg = torch::stable::new_empty(k, {agg_parts, C, 16 + 1}, accum);
  const auto partial_mix = torch::stable::new_empty(k, {mix_parts, C, C + 1 + 9 + 1}, accum);
  const auto scratch = torch::stable::new_empty(k, {scratch_elements}, accum);
  void *const agg = partial_agg.data_ptr(), *const mix = partial_mix.data_ptr();
  seemore::calibrate_backward(inputs, {image(dy), image(dk), maps.data_ptr(), agg, mix, scratch.data_ptr()},
                              device.stream);
  const auto [dweight_agg_data, dbias_agg_data, dweight_dw_data, dbias_dw_data, dweight_pw_data, dbias_pw_data] =
      gradients;
  seemore::add_parts({check.dtype(), agg_parts, C, agg, {{dweight_agg_data, 16}, {dbias_agg_data, 1}}}, device.stream);
  seemore::add_parts({check.dtype(),
                      mix_parts,
                      C,
                      mix,
                      {{dweight_pw_data, C}, {dbias_pw_data, 1}, {dweight_dw_data, 9}, {dbias_dw_data, 1}}},
                     device.stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def("calibrate(Tensor(a!) y, Tensor(b!) maps, Tensor k, " PARAMETERS(SEEMORE_SCHEMA) "int recursive) -> ()");
  m.def("calibrate_backward(Tensor(a!) dk, " PARAMETERS(
      SEEMORE_GRADIENT_SCHEMA) "Tensor dy, Tensor maps, Tensor k, " PARAMETERS(SEEMORE_SCHEMA) "int recursive) -> ()");
}

// For tensors of every device, so that Check refuses those of another one.
STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("calibrate", TORCH_BOX(&calibrate));
  m.impl("calibrate_backward", TORCH_BOX(&calibrate_backward));
}
