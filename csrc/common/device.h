// Marks functions that are compiled for the CPU and for the device alike.
#pragma once

#ifdef __CUDACC__
#define DASHPOT_HD __host__ __device__
#else
#define DASHPOT_HD
#endif
