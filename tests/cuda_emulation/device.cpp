// The functions of csrc/cuda/device.h for the CPU, which has no driver and one device.
#include "cuda/device.h"

namespace fastlm::cuda {

int runtime_version() { return 13000; }
int driver_version() { return 13000; }
void use_device(int) {}

}  // namespace fastlm::cuda
