// What is asked about the driver and the GPUs, once, and where a launch goes.
#pragma once
#include <cstddef>

namespace fastlm::cuda {

int runtime_version();        // of the CUDA runtime that is linked in, as 13000 for 13.0
int driver_version();         // the newest CUDA that the driver serves, in the same form; 0 without a driver
void use_device(int device);  // for the launches of this thread. Where the backend has made it PyTorch's current one,
                              // this runtime sees that and nothing moves

// The emulator's check of bounds: what the next launch of this thread may read, and write where `writable`. forget()
// ends that launch's permissions.
void allow(const void* begin, size_t bytes, bool writable);
void forget();

}  // namespace fastlm::cuda
