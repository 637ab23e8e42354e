// Modules, functions and launches.

#include <cstdio>
#include <cstring>
#include <string>

#include "block.h"
#include "device.h"
#include "kernels.h"
#include "queues.h"

namespace software_gpu {

static KernelFile* files = nullptr;

void register_file(KernelFile& file) {
    file.next = files;
    files = &file;
}

KernelFile* first_file() { return files; }

// What a CUfunction points to.
struct Function {
    const Kernel* kernel;
    const KernelFile* file;
    int max_dynamic;
    Function* next;
};

// What a CUmodule points to.
struct Module {
    const KernelFile* file;
    Function* functions;
};

API int cuModuleLoadData(Module** module, const void* image) {
    if (Status status = usable()) return status;
    const char* text = static_cast<const char*>(image);
    if (text == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (strncmp(text, IMAGE_MAGIC, strlen(IMAGE_MAGIC)) != 0) return CUDA_ERROR_INVALID_IMAGE;
    for (const KernelFile* file = files; file != nullptr; file = file->next) {
        if (text == image_of(*file, "sm_90")) return *module = new Module{file, nullptr}, CUDA_SUCCESS;
    }
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
}

API int cuModuleLoadDataEx(Module** module, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(module, image);
}

API int cuModuleUnload(Module* module) {
    if (Status status = usable()) return status;
    if (module == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    while (Function* function = module->functions) {
        module->functions = function->next;
        delete function;
    }
    delete module;
    return CUDA_SUCCESS;
}

API int cuModuleGetFunction(Function** function, Module* module, const char* name) {
    if (Status status = usable()) return status;
    const KernelFile* file = module->file;
    for (size_t i = 0; i < file->kernel_count; i += 1) {
        if (strcmp(file->kernels[i].name, name) != 0) continue;
        *function = new Function{&file->kernels[i], file, MAX_SHARED_UNASKED, module->functions};
        module->functions = *function;
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_NOT_FOUND;
}

static unsigned most_threads(const Function* function) {
    return function->kernel->bound != 0 ? function->kernel->bound : MAX_THREADS;
}

API int cuFuncGetAttribute(int* value, int attribute, Function* function) {
    if (Status status = usable()) return status;
    switch (attribute) {
        case 0: *value = static_cast<int>(most_threads(function)); return CUDA_SUCCESS;
        case 1: case 2: case 3: *value = 0; return CUDA_SUCCESS;  // static shared, constant, local: not known
        case 4: *value = 32; return CUDA_SUCCESS;                 // registers a thread
        case 5: case 6: *value = 90; return CUDA_SUCCESS;         // versions
        case 8: *value = function->max_dynamic; return CUDA_SUCCESS;
        case 7: case 9: *value = 0; return CUDA_SUCCESS;
        default: return CUDA_ERROR_INVALID_VALUE;
    }
}

API int cuFuncSetAttribute(Function* function, int attribute, int value) {
    if (Status status = usable()) return status;
    if (attribute == 9) return CUDA_SUCCESS;  // a hint
    if (attribute != 8 || value < 0 || static_cast<size_t>(value) > MAX_SHARED) return CUDA_ERROR_INVALID_VALUE;
    function->max_dynamic = value;
    return CUDA_SUCCESS;
}

API int cuFuncSetCacheConfig(Function*, int) { return usable(); }

// ---- launches

static Status check_shape(Index grid, Index block, unsigned shared, const Function* function) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0) return CUDA_ERROR_INVALID_VALUE;
    if (grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535) return CUDA_ERROR_INVALID_VALUE;
    if (block.x > MAX_THREADS || block.y > MAX_THREADS || block.z > 64) return CUDA_ERROR_INVALID_VALUE;
    uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
    if (threads > MAX_THREADS || shared > static_cast<unsigned>(function->max_dynamic)) return CUDA_ERROR_INVALID_VALUE;
    return threads > most_threads(function) ? CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES : CUDA_SUCCESS;
}

// A pointer to what is not device memory fails as an access through it would.
static Status check_arguments(const Kernel& kernel, void** arguments) {
    for (size_t i = 0; i < kernel.parameter_count; i += 1) {
        if (!kernel.parameters[i].pointer) continue;
        const void* at = *static_cast<void**>(arguments[i]);
        if (at == nullptr) continue;
        if (!is_kernel_pointer(at)) {
            return fail(CUDA_ERROR_ILLEGAL_ADDRESS, "kernel %s: argument %zu, %p, is not in device memory", kernel.name, i, at);
        }
        if (reinterpret_cast<Address>(at) % kernel.parameters[i].alignment != 0) {
            return fail(CUDA_ERROR_MISALIGNED_ADDRESS, "kernel %s: argument %zu, %p, is not a multiple of %zu", kernel.name, i, at,
                        kernel.parameters[i].alignment);
        }
    }
    return CUDA_SUCCESS;
}

API int cuLaunchKernel(Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                       unsigned block_z, unsigned shared, Stream* stream, void** arguments, void** extra) {
    if (Status status = submit(stream)) return status;
    if (function == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (extra != nullptr || (arguments == nullptr && function->kernel->parameter_count > 0)) return CUDA_ERROR_INVALID_VALUE;
    Index grid = {grid_x, grid_y, grid_z}, block = {block_x, block_y, block_z};
    if (Status status = check_shape(grid, block, shared, function)) {
        fprintf(stderr, "software gpu: kernel %s: no launch of grid (%u, %u, %u), block (%u, %u, %u), %u bytes shared\n",
                function->kernel->name, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared);
        return status;
    }
    if (Status status = count_launch()) return status;
    if (Status status = check_arguments(*function->kernel, arguments)) return status;
    const Region& statics = function->file->shared;
    return run(Work{function->kernel->name, function->kernel->call, arguments, grid, block, shared, statics.begin,
                    static_cast<size_t>(statics.end - statics.begin)});
}

// ---- occupancy, by threads and shared memory alone: the registers a kernel needs are not known

API int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, Function* function, int block_size, size_t shared,
                                                             unsigned) {
    if (Status status = usable()) return status;
    if (block_size <= 0) return CUDA_ERROR_INVALID_VALUE;
    unsigned threads = (static_cast<unsigned>(block_size) + 31) / 32 * 32;
    unsigned by_threads = 2048 / threads;
    auto by_shared = static_cast<unsigned>(228 * 1024 / (shared + 1024));
    bool fits = threads <= most_threads(function) && shared <= static_cast<size_t>(function->max_dynamic);
    unsigned most = by_threads < by_shared ? by_threads : by_shared;
    *blocks = fits ? static_cast<int>(most < 32 ? most : 32) : 0;
    return CUDA_SUCCESS;
}

API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* function, int block_size, size_t shared) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, block_size, shared, 0);
}

API int cuOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, Function*, int blocks, int) {
    if (Status status = usable()) return status;
    if (blocks <= 0) return CUDA_ERROR_INVALID_VALUE;
    size_t share = 228 * 1024 / static_cast<size_t>(blocks);
    *bytes = share > 1024 ? (share - 1024 < MAX_SHARED ? share - 1024 : MAX_SHARED) : 0;
    return CUDA_SUCCESS;
}

API int cuOccupancyMaxPotentialBlockSizeWithFlags(int* grid, int* block, Function* function, size_t (*shared_of)(int), size_t shared,
                                                  int limit, unsigned flags) {
    int best = 0;
    *grid = *block = 0;
    for (int size = 1024; size >= 32; size -= 32) {
        if (limit > 0 && size > limit) continue;
        int blocks = 0;
        size_t bytes = shared_of != nullptr ? shared_of(size) : shared;
        int status = cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(&blocks, function, size, bytes, flags);
        if (status != CUDA_SUCCESS) return status;
        if (blocks * size <= best) continue;
        best = blocks * size;
        *block = size;
        *grid = blocks * MULTIPROCESSORS;
    }
    return CUDA_SUCCESS;
}

API int cuOccupancyMaxPotentialBlockSize(int* grid, int* block, Function* function, size_t (*shared_of)(int), size_t shared,
                                         int limit) {
    return cuOccupancyMaxPotentialBlockSizeWithFlags(grid, block, function, shared_of, shared, limit, 0);
}

}  // namespace software_gpu
