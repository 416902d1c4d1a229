// Marks functions that are compiled for the CPU and for the device alike; APART: and not inlined,
// for long ones that a kernel calls from several places.
#pragma once

#ifdef __CUDACC__
#define DASHPOT_HD __host__ __device__
#define DASHPOT_HD_APART __host__ __device__ __noinline__
#else
#define DASHPOT_HD
#define DASHPOT_HD_APART
#endif
