#include "kernels/kv.cuh"
int attention_setup(void) { return 0; }
