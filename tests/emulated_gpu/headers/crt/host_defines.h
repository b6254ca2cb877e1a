// What cuda_runtime headers take from nvcc, which no wheel of torch's brings along: nothing a C compiler needs.
#pragma once
#define __device_builtin__
#define __host__
#define __device__
#define __cudart_builtin__
#define __align__(n) __attribute__((aligned(n)))
#define __specialization_static
#define CUDARTAPI
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __thread__ __thread
#define __noinline__
#define __forceinline__
