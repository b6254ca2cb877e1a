// A CUDA runtime without a GPU, loaded in front of NVIDIA's: device memory is the host's, nothing computes, and a copy
// from a device to pinned memory arrives when its stream is waited for, and not before. emulate.py does the computing.
// EMULATED_GPUS is their number, EMULATED_GPU_MIB the memory of each, CUDA_VISIBLE_DEVICES says which are visible.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <driver_types.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef cudaError_t E;
#define OK cudaSuccess
#define MOST 64
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
#define LOCKED(...) do { pthread_mutex_lock(&lock); __VA_ARGS__; pthread_mutex_unlock(&lock); } while (0)

static __thread int current = 0;
static __thread E last = OK;
static int touched[MOST];  // a context was made there
static size_t used[MOST];

// Devices ---------------------------------------------------------------------------------------------------------------

static int physical(int device, int *count) {  // the card behind a visible device, and how many are visible
  const char *visible = getenv("CUDA_VISIBLE_DEVICES"), *cards = getenv("EMULATED_GPUS");
  int most = cards ? atoi(cards) : 1, found = 0, card = -1;
  if (most > MOST) most = MOST;
  if (!visible) { *count = most; return device; }
  char *copy = strdup(visible), *rest = 0;
  for (char *word = strtok_r(copy, ",", &rest); word; word = strtok_r(0, ",", &rest)) {
    if (*word < '0' || *word > '9' || atoi(word) >= most) break;  // as the driver: what follows is not visible
    if (found++ == device) card = atoi(word);
  }
  free(copy);
  *count = found;
  return card;
}
static int count(void) { int n; physical(0, &n); return n; }
static size_t capacity(void) { const char *mib = getenv("EMULATED_GPU_MIB"); return (size_t)(mib ? atol(mib) : 4096) << 20; }

E cudaGetDeviceCount(int *n) { *n = count(); return *n ? OK : cudaErrorNoDevice; }
E cudaGetDevice(int *device) { *device = current; return OK; }
E cudaSetDevice(int device) {
  if (device < 0 || device >= count()) return last = cudaErrorInvalidDevice;
  current = device; touched[device] = 1;
  return OK;
}
E cudaInitDevice(int device, unsigned a, unsigned b) { return cudaSetDevice(device); }
E cudaDriverGetVersion(int *version) { *version = 13020; return OK; }
E cudaRuntimeGetVersion(int *version) { *version = 13020; return OK; }
E cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  int n, card = physical(device, &n);
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "Emulated GPU");
  p->uuid.bytes[0] = 1; p->uuid.bytes[15] = card + 1; p->pciBusID = card + 1;
  p->totalGlobalMem = capacity(); p->major = 9; p->minor = 0; p->multiProcessorCount = 132; p->warpSize = 32;
  p->sharedMemPerBlock = 49152; p->sharedMemPerMultiprocessor = 233472; p->sharedMemPerBlockOptin = 232448;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536; p->l2CacheSize = 50 << 20; p->unifiedAddressing = 1;
  p->maxThreadsPerBlock = 1024; p->maxThreadsPerMultiProcessor = 2048;
  for (int i = 0; i < 3; i++) { p->maxThreadsDim[i] = 1024; p->maxGridSize[i] = 65535; }
  return OK;
}
E cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
  *value = which == cudaDevAttrComputeCapabilityMajor ? 9 : which == cudaDevAttrMultiProcessorCount ? 132 : 0;
  return OK;
}
E cudaDeviceGetPCIBusId(char *text, int n, int device) { int c; snprintf(text, n, "0000:%02x:00.0", physical(device, &c) + 1); return OK; }
E cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return OK; }
E cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 1; return OK; }
E cudaDeviceEnablePeerAccess(int device, unsigned flags) { return OK; }

// Memory ----------------------------------------------------------------------------------------------------------------

typedef struct Block { struct Block *next; char *at; size_t size; int device; } Block;  // device -1: pinned memory of the host
static Block *blocks;
static void add(void *at, size_t size, int device) {
  Block *b = malloc(sizeof *b);
  b->at = at; b->size = size; b->device = device; b->next = blocks; blocks = b;
  if (device >= 0) used[device] += size;
}
static Block *find(const void *p) {
  for (Block *b = blocks; b; b = b->next) if ((char *)p >= b->at && (char *)p < b->at + b->size) return b;
  return 0;
}
static void drop(void *at) {
  for (Block **b = &blocks; *b; b = &(*b)->next) if ((*b)->at == at) {
    Block *gone = *b;
    *b = gone->next;
    if (gone->device >= 0) used[gone->device] -= gone->size;
    free(gone);
    return;
  }
}

// Streams: what is still to be delivered, in order ------------------------------------------------------------------------

typedef struct Stream { int device; } Stream;
static Stream zeros[MOST];  // every device's default stream
static Stream *as(cudaStream_t s) {
  if ((uintptr_t)s > 4) return (Stream *)s;
  zeros[current].device = current;
  return &zeros[current];
}
typedef struct Pending {  // a copy, or a wait for what another stream had pending
  struct Pending *next; Stream *stream; long number;
  void *to; char *from; size_t size;
  Stream *other; long upto;
} Pending;
static Pending *pending;
static long number;
static int has_pending(Stream *s, long upto) {
  for (Pending *x = pending; x; x = x->next) if (x->stream == s && x->number <= upto) return 1;
  return 0;
}
static void deliver(Stream *s, long upto) {
  Pending **at = &pending;
  while (*at) {
    Pending *x = *at;
    if (x->stream != s || x->number > upto) { at = &x->next; continue; }
    *at = x->next;
    if (x->other) deliver(x->other, x->upto);
    else { memcpy(x->to, x->from, x->size); free(x->from); }
    free(x);
    at = &pending;  // the other's delivery may have changed what follows
  }
}
static void deliver_all(int device) {  // device -1: every one's
  Pending *x = pending;
  while (x) {
    if (device >= 0 && x->stream->device != device) { x = x->next; continue; }
    deliver(x->stream, number);
    x = pending;
  }
}
static void push(Pending *x) {
  x->next = 0; x->number = ++number;
  Pending **at = &pending;
  while (*at) at = &(*at)->next;
  *at = x;
}

E cudaDeviceSynchronize(void) { LOCKED(deliver_all(current)); return OK; }
E cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
  Stream *x = calloc(1, sizeof *x);
  x->device = current;
  *s = (cudaStream_t)x;
  return OK;
}
E cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithPriority(s, 0, 0); }
E cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return cudaStreamCreateWithPriority(s, 0, 0); }
E cudaStreamDestroy(cudaStream_t s) { return OK; }
E cudaStreamSynchronize(cudaStream_t s) { LOCKED(deliver(as(s), number)); return OK; }
E cudaStreamQuery(cudaStream_t s) { return cudaStreamSynchronize(s); }
E cudaStreamGetPriority(cudaStream_t s, int *priority) { *priority = 0; return OK; }

typedef struct Event { Stream *stream; long number; double at; } Event;
E cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { *e = (cudaEvent_t)calloc(1, sizeof(Event)); return OK; }
E cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
E cudaEventDestroy(cudaEvent_t e) { free(e); return OK; }
E cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) {
  Event *x = (Event *)e;
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  LOCKED({ x->stream = as(s); x->number = number; x->at = t.tv_sec + t.tv_nsec * 1e-9; });
  return OK;
}
E cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
E cudaEventSynchronize(cudaEvent_t e) { Event *x = (Event *)e; if (x->stream) LOCKED(deliver(x->stream, x->number)); return OK; }
E cudaEventQuery(cudaEvent_t e) { return cudaEventSynchronize(e); }
E cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
  *ms = (((Event *)b)->at - ((Event *)a)->at) * 1e3;
  if (*ms <= 0) *ms = 1e-4;
  return OK;
}
E cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) {
  Event *x = (Event *)e;
  LOCKED({
    if (x->stream && x->stream != as(s) && has_pending(x->stream, x->number)) {
      Pending *wait = calloc(1, sizeof *wait);
      wait->stream = as(s); wait->other = x->stream; wait->upto = x->number;
      push(wait);
    }
  });
  return OK;
}

E cudaMalloc(void **p, size_t n) {
  E e = OK;
  LOCKED({
    touched[current] = 1;
    if (used[current] + n > capacity() || posix_memalign(p, 4096, n ? n : 1)) e = last = cudaErrorMemoryAllocation;
    else { memset(*p, 0xff, n); add(*p, n, current); }  // NaNs: nobody's memory is zero by itself
  });
  return e;
}
E cudaFree(void *p) { if (p) LOCKED({ drop(p); free(p); }); return OK; }
E cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return cudaMalloc(p, n); }
E cudaFreeAsync(void *p, cudaStream_t s) { return cudaFree(p); }
E cudaMallocManaged(void **p, size_t n, unsigned flags) { return cudaMalloc(p, n); }
E cudaHostAlloc(void **p, size_t n, unsigned flags) {
  if (posix_memalign(p, 4096, n ? n : 1)) return last = cudaErrorMemoryAllocation;
  LOCKED(add(*p, n, -1));
  return OK;
}
E cudaMallocHost(void **p, size_t n) { return cudaHostAlloc(p, n, 0); }
E cudaFreeHost(void *p) { LOCKED({ deliver_all(-1); drop(p); free(p); }); return OK; }
E cudaHostRegister(void *p, size_t n, unsigned flags) { LOCKED(add(p, n, -1)); return OK; }
E cudaHostUnregister(void *p) { LOCKED({ deliver_all(-1); drop(p); }); return OK; }
E cudaMemGetInfo(size_t *free, size_t *total) { *total = capacity(); *free = *total - used[current]; return OK; }
E cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  LOCKED({
    Block *b = find(p);
    a->type = !b ? cudaMemoryTypeUnregistered : b->device < 0 ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    a->device = !b ? -2 : b->device < 0 ? 0 : b->device;
    a->devicePointer = a->hostPointer = b ? (void *)p : 0;
  });
  return OK;
}
static E copy(void *to, const void *from, size_t n, cudaStream_t s, int async) {
  LOCKED({
    Block *a = find(to), *b = find(from);
    if (async && a && a->device < 0 && b && b->device >= 0) {
      Pending *x = calloc(1, sizeof *x);
      x->stream = as(s); x->to = to; x->size = n; x->from = malloc(n ? n : 1);
      memcpy(x->from, from, n);
      push(x);
    } else {
      if (!async) deliver(as(s), number);
      memcpy(to, from, n);
    }
  });
  return OK;
}
E cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind k) { return copy(to, from, n, 0, 0); }
E cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind k, cudaStream_t s) { return copy(to, from, n, s, 1); }
E cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t n, cudaStream_t s) { return copy(to, from, n, s, 1); }
E cudaMemset(void *p, int v, size_t n) { memset(p, v, n); return OK; }
E cudaMemsetAsync(void *p, int v, size_t n, cudaStream_t s) { memset(p, v, n); return OK; }

// Kernels: there are none ---------------------------------------------------------------------------------------------------

static E launch(const void *kernel) {
  Dl_info info;
  const char *name = dladdr(kernel, &info) && info.dli_sname ? info.dli_sname : "of unknown name";
  fprintf(stderr, "emulated GPU: the kernel %s was to run, and emulate.py has not caught its operation\n", name);
  abort();  // it would leave its results unwritten
}
E cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t n, cudaStream_t s) { return launch(f); }
E cudaLaunchKernelExC(const void *c, const void *f, void **a) { return launch(f); }
E cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **a, size_t n, cudaStream_t s) { return launch(f); }
E cudaLaunchHostFunc(cudaStream_t s, void (*f)(void *), void *data) { f(data); return OK; }
E cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a); a->maxThreadsPerBlock = 1024; a->binaryVersion = 90; return OK;
}
E cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute a, int v) { return OK; }
E cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t s) { *n = 2; return OK; }
E cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned fl) { *n = 2; return OK; }

// Errors ----------------------------------------------------------------------------------------------------------------------

E cudaGetLastError(void) { E e = last; last = OK; return e; }
E cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorString(E e) {
  return e == cudaErrorMemoryAllocation ? "out of memory" : e == cudaErrorInvalidDevice ? "invalid device ordinal"
       : e == cudaErrorNotSupported ? "operation not supported (by emulated GPUs)" : e ? "error of an emulated GPU" : "no error";
}
const char *cudaGetErrorName(E e) { return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : e ? "cudaErrorOther" : "cudaSuccess"; }

// What torch asks for and nothing hangs on --------------------------------------------------------------------------------------

E cudaProfilerStart(void) { return OK; }
E cudaProfilerStop(void) { return OK; }
E cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *v) { *v = cudaStreamCaptureStatusNone; return OK; }
E cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *v, unsigned long long *id, cudaGraph_t *g, const void **d, const void **e, size_t *n) {
  *v = cudaStreamCaptureStatusNone; if (id) *id = 0; if (n) *n = 0; return OK;
}
E cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *m) { return OK; }
E cudaStreamAddCallback(cudaStream_t s, void *f, void *d, unsigned flags) { return OK; }
E cudaGetSymbolAddress(void **p, const void *s) { static char zeros[1 << 16]; *p = zeros; return OK; }
E cudaMemcpyToSymbol(const void *s, const void *f, size_t n, size_t o, int k) { return OK; }
E cudaLibraryLoadData(void **l, const void *c, void *a, void *b, unsigned n, void *d, void *e, unsigned m) { *l = (void *)1; return OK; }
E cudaLibraryUnload(void *l) { return OK; }
E cudaLibraryGetKernel(void **k, void *l, const char *n) { *k = (void *)1; return OK; }
E cudaLibraryGetKernelCount(unsigned *n, void *l) { *n = 0; return OK; }
E cudaKernelSetAttributeForDevice(void *k, int a, int v, int d) { return OK; }
E cudaDeviceGetDefaultMemPool(void **p, int d) { *p = &touched[d]; return OK; }
E cudaMemPoolSetAttribute(void *p, int a, void *v) { return OK; }
E cudaMemPoolGetAttribute(void *p, int a, void *v) { *(uint64_t *)v = 0; return OK; }
E cudaMemPoolSetAccess(void *p, const void *d, size_t n) { return OK; }
E cudaMemPoolTrimTo(void *p, size_t n) { return OK; }
E cudaDeviceGetGraphMemAttribute(int d, int a, void *v) { *(uint64_t *)v = 0; return OK; }
E cudaDeviceSetGraphMemAttribute(int d, int a, void *v) { return OK; }
E cudaGraphDestroy(cudaGraph_t g) { return OK; }
E cudaGraphExecDestroy(void *g) { return OK; }
E cudaGraphNodeGetDependencies(void *n, void *d, void *e, size_t *c) { *c = 0; return OK; }
E cudaGraphGetNodes(void *g, void *n, size_t *c) { *c = 0; return OK; }
E cudaUserObjectCreate(void **o, void *p, void *f, unsigned a, unsigned b) { return OK; }
E cudaUserObjectRelease(void *o, unsigned n) { return OK; }
E cudaGraphRetainUserObject(void) { return OK; }

// What they cannot do: graphs, memory shared between processes, code of one's own ------------------------------------------------

#define CANNOT(name) E name(void) { return last = cudaErrorNotSupported; }
CANNOT(cudaIpcGetMemHandle) CANNOT(cudaIpcOpenMemHandle) CANNOT(cudaIpcGetEventHandle) CANNOT(cudaIpcOpenEventHandle)
E cudaIpcCloseMemHandle(void *p) { return OK; }
CANNOT(cudaStreamBeginCapture) CANNOT(cudaStreamBeginCaptureToGraph) CANNOT(cudaStreamEndCapture)
CANNOT(cudaStreamUpdateCaptureDependencies) CANNOT(cudaGraphInstantiate) CANNOT(cudaGraphInstantiateWithFlags)
CANNOT(cudaGraphLaunch) CANNOT(cudaGraphAddNode) CANNOT(cudaGraphConditionalHandleCreate)
CANNOT(cudaLibraryLoadFromFile) CANNOT(cudaLibraryGetGlobal) CANNOT(cudaLibraryGetManaged)
CANNOT(cudaLibraryGetUnifiedFunction)

// The driver --------------------------------------------------------------------------------------------------------------------

int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) {
  if (flags) *flags = 0;
  *active = d >= 0 && d < MOST && touched[d];
  return 0;
}
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = &touched[d]; return 0; }
int cuCtxGetCurrent(void **c) { *c = &touched[current]; return 0; }
int cuCtxSetCurrent(void *c) { return 0; }
int cuDeviceGet(int *d, int n) { *d = n; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = 0; return 0; }
int cuGetErrorString(int e, const char **text) { *text = "error of an emulated driver"; return 0; }
static int nothing(void) { return 0; }
E cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned v, unsigned long long flags, enum cudaDriverEntryPointQueryResult *r) {
  void *mine = dlsym(RTLD_DEFAULT, name);
  *f = mine ? mine : (void *)nothing;
  if (r) *r = cudaDriverEntryPointSuccess;
  return OK;
}
E cudaGetDriverEntryPoint(const char *name, void **f, unsigned long long flags, enum cudaDriverEntryPointQueryResult *r) {
  return cudaGetDriverEntryPointByVersion(name, f, 0, flags, r);
}
int cuLaunchKernel(const void *f) { return launch(f); }
int cuLaunchCooperativeKernel(const void *f) { return launch(f); }
#define NOTHING(name) int name(void) { return 0; }
NOTHING(cuFuncGetAttribute) NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuLinkAddData_v2)
NOTHING(cuLinkComplete) NOTHING(cuLinkCreate_v2) NOTHING(cuModuleGetFunction) NOTHING(cuModuleLoad)
NOTHING(cuModuleLoadData) NOTHING(cuModuleLoadDataEx) NOTHING(cuModuleUnload) NOTHING(cuPointerGetAttribute)
NOTHING(cuOccupancyMaxActiveBlocksPerMultiprocessor) NOTHING(cuTensorMapEncodeTiled)
