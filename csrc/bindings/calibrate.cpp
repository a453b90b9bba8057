// calibrate as an operator of a library. Results are written to tensors that the caller allocated.

#include "params/calibrate.h"

#include "bindings/tensors.h"

namespace {

using namespace seemore::bindings;

seemore::Calibrate inputs_of(const Check& check, const Tensor& k, const Tensor& weight_agg, const Tensor& bias_agg,
                             const Tensor& weight_dw, const Tensor& bias_dw, const Tensor& weight_pw,
                             const Tensor& bias_pw, int64_t recursive) {
  const int64_t channels = k.size(1);
  check.parameter("weight_agg", weight_agg, {channels, 1, 4, 4});
  check.parameter("bias_agg", bias_agg, {channels});
  check.parameter("weight_dw", weight_dw, {channels, 1, 3, 3});
  check.parameter("bias_dw", bias_dw, {channels});
  check.parameter("weight_pw", weight_pw, {channels, channels, 1, 1});
  check.parameter("bias_pw", bias_pw, {channels});
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
  return {check.dtype(),
          size(k),
          recursive,
          image(k),
          weight_agg.data_ptr(),
          bias_agg.data_ptr(),
          weight_dw.data_ptr(),
          bias_dw.data_ptr(),
          weight_pw.data_ptr(),
          bias_pw.data_ptr()};
}

void check_maps(const Check& check, const Tensor& maps, const Tensor& k, const seemore::Calibrate& inputs) {
  check.of_any_dtype("maps", maps, {seemore::maps_elements(inputs)});
  if (maps.scalar_type() != accumulation_type(k))
    check.refuse("maps", "has another dtype", "float32 (float64 for that)");
  if (!maps.is_contiguous()) check.refuse("maps", "is not contiguous", "a contiguous tensor");
}

void calibrate(const Tensor& y, const Tensor& maps, const Tensor& k, const Tensor& weight_agg, const Tensor& bias_agg,
               const Tensor& weight_dw, const Tensor& bias_dw, const Tensor& weight_pw, const Tensor& bias_pw,
               int64_t recursive) {
  const Check check("calibrate", "k", k);
  const auto inputs = inputs_of(check, k, weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw, recursive);
  check("y", y, {k.size(0), k.size(1), k.size(2), k.size(3)});
  check_maps(check, maps, k, inputs);
  const OnDevice device(k);
  const int64_t elements = seemore::level_size(inputs, recursive).elements();
  const auto small = torch::stable::new_empty(k, {elements}, accumulation_type(k));
  seemore::calibrate(inputs, image(y), maps.data_ptr(), small.data_ptr(), device.stream);
}

void calibrate_backward(const Tensor& dk, const Tensor& dweight_agg, const Tensor& dbias_agg, const Tensor& dweight_dw,
                        const Tensor& dbias_dw, const Tensor& dweight_pw, const Tensor& dbias_pw, const Tensor& dy,
                        const Tensor& maps, const Tensor& k, const Tensor& weight_agg, const Tensor& bias_agg,
                        const Tensor& weight_dw, const Tensor& bias_dw, const Tensor& weight_pw, const Tensor& bias_pw,
                        int64_t recursive) {
  const Check check("calibrate", "k", k);
  const auto inputs = inputs_of(check, k, weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw, recursive);
  const auto [batch, channels, height, width] = size(k);
  check("dy", dy, {batch, channels, height, width});
  check("dk", dk, {batch, channels, height, width});
  check.parameter("dweight_agg", dweight_agg, {channels, 1, 4, 4});
  check.parameter("dbias_agg", dbias_agg, {channels});
  check.parameter("dweight_dw", dweight_dw, {channels, 1, 3, 3});
  check.parameter("dbias_dw", dbias_dw, {channels});
  check.parameter("dweight_pw", dweight_pw, {channels, channels, 1, 1});
  check.parameter("dbias_pw", dbias_pw, {channels});
  check_maps(check, maps, k, inputs);
  const OnDevice device(k);
  const auto [agg_parts, mix_parts, scratch_elements] = seemore::calibrate_workspace(inputs);
  const auto accum = accumulation_type(k);
  const auto partial_agg = torch::stable::new_empty(k, {agg_parts, channels, 16 + 1}, accum);
  const auto partial_mix = torch::stable::new_empty(k, {mix_parts, channels, channels + 1 + 9 + 1}, accum);
  const auto scratch = torch::stable::new_empty(k, {scratch_elements}, accum);
  seemore::calibrate_backward(
      inputs,
      {image(dy), image(dk), maps.data_ptr(), partial_agg.data_ptr(), partial_mix.data_ptr(), scratch.data_ptr()},
      device.stream);
  seemore::add_parts({check.dtype(),
                      agg_parts,
                      channels,
                      partial_agg.data_ptr(),
                      {{dweight_agg.data_ptr(), 16}, {dbias_agg.data_ptr(), 1}}},
                     device.stream);
  seemore::add_parts({check.dtype(),
                      mix_parts,
                      channels,
                      partial_mix.data_ptr(),
                      {{dweight_pw.data_ptr(), channels},
                       {dbias_pw.data_ptr(), 1},
                       {dweight_dw.data_ptr(), 9},
                       {dbias_dw.data_ptr(), 1}}},
                     device.stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def(
      "calibrate(Tensor(a!) y, Tensor(b!) maps, Tensor k, Tensor weight_agg, Tensor bias_agg, Tensor weight_dw, "
      "Tensor bias_dw, Tensor weight_pw, Tensor bias_pw, int recursive) -> ()");
  m.def(
      "calibrate_backward(Tensor(a!) dk, Tensor(b!) dweight_agg, Tensor(c!) dbias_agg, Tensor(d!) dweight_dw, "
      "Tensor(e!) dbias_dw, Tensor(f!) dweight_pw, Tensor(g!) dbias_pw, Tensor dy, Tensor maps, Tensor k, "
      "Tensor weight_agg, Tensor bias_agg, Tensor weight_dw, Tensor bias_dw, Tensor weight_pw, Tensor bias_pw, "
      "int recursive) -> ()");
}

// For tensors of every device, so that Check refuses those of another one.
STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("calibrate", TORCH_BOX(&calibrate));
  m.impl("calibrate_backward", TORCH_BOX(&calibrate_backward));
}
