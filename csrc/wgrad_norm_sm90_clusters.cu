// The sm_90a wgrad in clusters of two blocks: the kernels of wgrad_norm_sm90.cu in their other form.
#include "device/sm90_launch.cuh"

namespace gradnorm::sm90 {

bool start_clusters(const WgradNorm& args, void* stream) { return start_tile<2>(args, stream); }

}  // namespace gradnorm::sm90
