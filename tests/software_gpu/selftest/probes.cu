// Small kernels, each for one thing that the software device must do.

// Reversal through shared memory, with the barrier that it needs and without.
template <bool barrier>
__device__ __forceinline__ void reverse(u32* values) {
    __shared__ u32 place[256];
    place[threadIdx.x] = values[threadIdx.x];
    if (barrier) __syncthreads();
    values[threadIdx.x] = place[blockDim.x - 1 - threadIdx.x];
}

KERNEL reverse_with_barrier(u32* values) { reverse<true>(values); }
KERNEL reverse_without_barrier(u32* values) { reverse<false>(values); }

// Half of the threads never come to the barrier, nor leave.
KERNEL divided_barrier(u32* out) {
    if (threadIdx.x < 32) {
        __syncthreads();
        __syncwarp();
    } else if (threadIdx.x == 32) {
        __shfl_sync(ALL_LANES, 1u, 0);
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1;
}

// Threads that have exited are not waited for.
KERNEL early_exit(u32* out) {
    if (threadIdx.x % 2 == 1) return;
    __syncthreads();
    u32 sum = __ballot_sync(0x55555555u, 1);
    out[threadIdx.x] = sum;
}

KERNEL write_at(float* out, i64 index) { out[index] = 1.0f; }

KERNEL write_array_at(u32* out, u32 index) {
    u32 local[4] = {0, 0, 0, 0};
    local[index] = 1;
    out[0] = local[0];
}

KERNEL unwritten_shared(float* out) {
    DYNAMIC_SHARED(float, room);
    __shared__ float fixed[32];
    out[2 * threadIdx.x] = room[threadIdx.x];
    out[2 * threadIdx.x + 1] = fixed[threadIdx.x];
    fixed[threadIdx.x] = 1.0f;
}

// c = a b, 16 x 8 x 16: the fragments loaded as the PTX ISA's figures for m16n8k16 place them.
KERNEL product(const bf16* a, const bf16* b, float* c) {
    u32 group = threadIdx.x >> 2, place = threadIdx.x & 3;
    u32 left[4], right[2];
    for (u32 i = 0; i < 4; i++) {
        u32 row = i % 2 == 0 ? group : group + 8;
        u32 column = 2 * place + (i < 2 ? 0 : 8);
        left[i] = (u32)a[row * 16 + column].bits | (u32)a[row * 16 + column + 1].bits << 16;
    }
    for (u32 i = 0; i < 2; i++) {
        u32 row = 2 * place + 8 * i;
        right[i] = (u32)b[row * 8 + group].bits | (u32)b[(row + 1) * 8 + group].bits << 16;
    }
    float sums[4];
    for (u32 i = 0; i < 4; i++) sums[i] = c[(group + (i < 2 ? 0 : 8)) * 8 + 2 * place + i % 2];
    mma_bf16(sums, left, right);
    for (u32 i = 0; i < 4; i++) c[(group + (i < 2 ? 0 : 8)) * 8 + 2 * place + i % 2] = sums[i];
}

// Eight results a lane.
KERNEL shuffles(u64* out) {
    u32 lane = threadIdx.x;
    u64* mine = out + 8 * lane;
    mine[0] = __shfl_sync(ALL_LANES, (u64)lane << 40, 31 - (int)lane);
    mine[1] = __shfl_up_sync(ALL_LANES, lane, 3);
    mine[2] = __shfl_down_sync(ALL_LANES, lane, 3, 8);
    mine[3] = (u64)__shfl_xor_sync(ALL_LANES, (double)lane, 5);
    mine[4] = __ballot_sync(ALL_LANES, lane % 3 == 0);
    mine[5] = __any_sync(ALL_LANES, lane == 7) * 2 + __all_sync(ALL_LANES, lane < 31);
    u32 half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    mine[6] = __reduce_add_sync(half, lane);
    mine[7] = __float_as_uint(__shfl_sync(half, (float)lane, 3));
}

KERNEL atomics(u32* counts, float* sum, u64* most) {
    atomicAdd(&counts[threadIdx.x % 4], 1u);
    atomicAdd(sum, 0.5f);
    atomicMax(most, (u64)blockIdx.x * blockDim.x + threadIdx.x);
    u32 seen = counts[4], assumed;
    do {
        assumed = seen;
        seen = atomicCAS(&counts[4], assumed, assumed + 2);
    } while (seen != assumed);
}

KERNEL __launch_bounds__(128) sums(const float* values, double* out, u32 count) {
    __shared__ double partial[32];
    double sum = 0;
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) sum += values[i];
    sum = block_sum(sum, partial);
    if (threadIdx.x == 0) out[blockIdx.x + gridDim.x * blockIdx.y] = sum;
}
