/* setup.cu: facts of the device, asked once; text of errors. */
#include "kernels/device.cuh"

int kernels_sm_count = 132;
bool kernels_overlap;
static bool can_overlap;

extern "C" int kernels_setup(void) {
    int device = 0, error = (int)cudaGetDevice(&device);
    if (error == 0)
        error =
            (int)cudaDeviceGetAttribute(&kernels_sm_count, cudaDevAttrMultiProcessorCount, device);
    int major = 0; /* programmatic dependent launch: from compute capability 9 on */
    if (error == 0)
        error = (int)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error != 0) return error;
    kernels_overlap = can_overlap = major >= 9;
    const int error_product = product_setup();
    return error_product != 0 ? error_product : attention_setup();
}

extern "C" const char *kernels_error_text(int error) {
    return cudaGetErrorString((cudaError_t)error);
}

extern "C" bool kernels_overlap_launches(bool wanted) {
    kernels_overlap = wanted && can_overlap;
    return kernels_overlap;
}

extern "C" int kernels_multiprocessors(void) { return kernels_sm_count; }

extern "C" int kernels_wait(kernels_stream stream) { return (int)cudaStreamSynchronize(stream); }

extern "C" bool kernels_reads_host_memory(void) {
    int device = 0, answer = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&answer, cudaDevAttrPageableMemoryAccess, device) ==
               cudaSuccess &&
           answer != 0;
}
