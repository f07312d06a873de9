// Queries about the driver and the GPU, and the device of the calling thread's launches.
#pragma once

namespace fastlm::cuda {

int runtime_version();        // of the CUDA runtime that is linked in, as 13000 for CUDA 13.0
int driver_version();         // the newest CUDA version that the driver supports, in the same form; 0 without a driver
void use_device(int device);  // makes `device` current for the launches of this thread, if it is not current already

}  // namespace fastlm::cuda
