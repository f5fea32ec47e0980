/* What of CANN must do something for torch_npu to hold tensors: memory is the host's, streams and events are numbers, work is
 * done when it is asked for. Every other function is generated, and does nothing but say that it was called (fake_cann.py).
 * Signatures: the public headers of CANN's acl and hccl. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static __thread int32_t current;

static void *handle(void) {
    static long last = 16;
    return (void *)__sync_add_and_fetch(&last, 16);
}

static const size_t device_memory = 64ul << 30;
enum { ACL_ERROR_RT_MEMORY_ALLOCATION = 207001 };

static int give(void **memory, size_t size) {
    return size > device_memory ? ACL_ERROR_RT_MEMORY_ALLOCATION : posix_memalign(memory, 512, size ? size : 512);
}

static int handle_at(void **place) {
    *place = handle();
    return 0;
}

/* One name a line in the file that FAKE_CANN_CALLS names. */
void fake_cann_called(const char *name) {
    const char *path = getenv("FAKE_CANN_CALLS");
    if (!path) return;
    char line[256];
    int size = snprintf(line, sizeof line, "%s\n", name), file = open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (file < 0 || write(file, line, size) != size) abort();
    close(file);
}

const char *aclrtGetSocName(void) { return "Ascend910B1"; }
const char *aclGetRecentErrMsg(void) { return 0; }
size_t aclGetCompileoptSize(int option) { return sizeof "disable"; }
int aclGetCompileopt(int option, char *value, size_t size) { return strcpy(value, "disable") != value; }

int aclrtGetDeviceCount(uint32_t *count) { return *count = 2, 0; }
int aclrtGetDevice(int32_t *device) { return *device = current, 0; }
int aclrtSetDevice(int32_t device) { return current = device, 0; }
int aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) { return *active = 1, 0; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) { return *can = 1, 0; }
int aclGetDeviceCapability(uint32_t device, int kind, int64_t *value) { return *value = 24, 0; }
int aclrtGetDeviceCapability(int32_t device, int kind, int32_t *value) { return *value = 1, 0; }
int aclrtGetDeviceInfo(uint32_t device, int kind, int64_t *value) { return *value = 24, 0; }

int aclrtMalloc(void **memory, size_t size, int policy) { return give(memory, size); }
int aclrtMallocAlign32(void **memory, size_t size, int policy) { return give(memory, size); }
int aclrtMallocWithCfg(void **memory, size_t size, int policy, void *settings) { return give(memory, size); }
int aclrtMallocHost(void **memory, size_t size) { return give(memory, size); }
int aclrtMallocHostWithCfg(void **memory, size_t size, void *settings) { return give(memory, size); }
int aclrtFree(void *memory) { return free(memory), 0; }
int aclrtFreeHost(void *memory) { return free(memory), 0; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) { return memcpy(to, from, size) != to; }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
    return memcpy(to, from, size) != to;
}
int aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
    return memcpy(to, from, size) != to;
}
int aclrtMemset(void *to, size_t room, int value, size_t size) { return memset(to, value, size) != to; }
int aclrtMemsetAsync(void *to, size_t room, int value, size_t size, void *stream) { return memset(to, value, size) != to; }
int aclrtGetMemInfo(int kind, size_t *free, size_t *total) { return *free = 60ul << 30, *total = device_memory, 0; }

int aclrtCreateStream(void **stream) { return handle_at(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { return handle_at(stream); }
int aclrtCreateEvent(void **event) { return handle_at(event); }
int aclrtCreateEventWithFlag(void **event, uint32_t flags) { return handle_at(event); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flags) { return handle_at(event); }
int aclrtCreateContext(void **context, int32_t device) { return handle_at(context); }
int aclrtGetCurrentContext(void **context) { return *context = (void *)16, 0; }
int aclrtStreamQuery(void *stream, int *status) { return *status = 0; }
int aclrtQueryEventStatus(void *event, int *status) { return *status = 1, 0; }
int aclrtQueryEventWaitStatus(void *event, int *status) { return *status = 1, 0; }
int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) { return *milliseconds = 1, 0; }

void *aclCreateTensor(void) { return handle(); }
void *aclCreateTensorList(void) { return handle(); }
void *aclCreateScalar(void) { return handle(); }
void *aclCreateScalarList(void) { return handle(); }
void *aclCreateIntArray(void) { return handle(); }
void *aclCreateBoolArray(void) { return handle(); }
void *aclCreateFloatArray(void) { return handle(); }

int HcclGetRootInfo(char *info) { return memset(info, 1, 4108) != info; }
int HcclCommInitRootInfo(uint32_t ranks, void *info, uint32_t rank, void **group) { return handle_at(group); }
int HcclCommInitRootInfoConfig(uint32_t ranks, void *info, uint32_t rank, void *settings, void **group) { return handle_at(group); }
