// Compiled once per instruction set, as the kernels themselves are.

#include "cpu/dispatch/kernels.h"

#define SEEMORE_NAME_(isa) #isa
#define SEEMORE_NAME(isa) SEEMORE_NAME_(isa)

namespace seemore::SEEMORE_ISA {

decltype(seemore::striped_conv) striped_conv;
decltype(seemore::striped_conv_workspace) striped_conv_workspace;
decltype(seemore::striped_conv_backward) striped_conv_backward;
decltype(seemore::network_sizes) network_sizes;
decltype(seemore::network_pack) network_pack;
decltype(seemore::network_memory) network_memory;
decltype(seemore::network) network;
decltype(seemore::pool_parts) pool_parts;
decltype(seemore::pool) pool;
decltype(seemore::spread) spread;
decltype(seemore::striped_conv_router_parts) striped_conv_router_parts;
decltype(seemore::striped_conv_router) striped_conv_router;
decltype(seemore::calibrate) calibrate;
decltype(seemore::calibrate_workspace) calibrate_workspace;
decltype(seemore::calibrate_backward) calibrate_backward;
decltype(seemore::norm_pointwise) norm_pointwise;
decltype(seemore::norm_pointwise_backward) norm_pointwise_backward;
decltype(seemore::gated_ffn) gated_ffn;
decltype(seemore::gated_ffn_backward) gated_ffn_backward;
decltype(seemore::norm_conv3x3) norm_conv3x3;
decltype(seemore::norm_conv3x3_backward) norm_conv3x3_backward;
decltype(seemore::low_rank_experts) low_rank_experts;
decltype(seemore::low_rank_experts_backward) low_rank_experts_backward;

extern const Kernels kernels;
const Kernels kernels{SEEMORE_NAME(SEEMORE_ISA),
                      striped_conv,
                      striped_conv_workspace,
                      striped_conv_backward,
                      network_sizes,
                      network_pack,
                      network_memory,
                      network,
                      pool_parts,
                      pool,
                      spread,
                      striped_conv_router_parts,
                      striped_conv_router,
                      calibrate,
                      calibrate_workspace,
                      calibrate_backward,
                      norm_pointwise,
                      norm_pointwise_backward,
                      gated_ffn,
                      gated_ffn_backward,
                      norm_conv3x3,
                      norm_conv3x3_backward,
                      low_rank_experts,
                      low_rank_experts_backward};

}  // namespace seemore::SEEMORE_ISA
