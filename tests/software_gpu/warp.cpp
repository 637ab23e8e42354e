#include "warp.h"

#include <algorithm>
#include <cstring>

namespace software_gpu {

static const unsigned WARP = 32;

// A lane that does not take part has no value that could be read.
static void shuffle(Thread* warp, unsigned lane, uint32_t lanes) {
    unsigned source = warp[lane].source;
    bool there = source < WARP && (lanes >> source & 1) != 0;
    for (int half = 0; half < 2; half += 1) {
        warp[lane].result[half] = there ? warp[source].operand[half] : 0xFFFFFFFFu;
    }
}

static uint32_t vote(const Thread* warp, uint32_t lanes) {
    uint32_t ballot = 0;
    for (unsigned lane = 0; lane < WARP; lane += 1) {
        if ((lanes >> lane & 1) != 0 && warp[lane].operand[0] != 0) ballot |= 1u << lane;
    }
    return ballot;
}

static uint32_t combine(uint32_t reduction, uint32_t a, uint32_t b) {
    int32_t signed_a = static_cast<int32_t>(a), signed_b = static_cast<int32_t>(b);
    switch (reduction) {
        case MIN: return std::min(a, b);
        case MAX: return std::max(a, b);
        case MIN_SIGNED: return static_cast<uint32_t>(std::min(signed_a, signed_b));
        case MAX_SIGNED: return static_cast<uint32_t>(std::max(signed_a, signed_b));
        case AND: return a & b;
        case OR: return a | b;
        case XOR: return a ^ b;
        default: return a + b;
    }
}

static uint32_t reduce(const Thread* warp, uint32_t lanes) {
    unsigned lane = static_cast<unsigned>(__builtin_ctz(lanes));
    uint32_t sum = warp[lane].operand[0];
    while (++lane < WARP) {
        if ((lanes >> lane & 1) != 0) sum = combine(warp[lane].operand[1], sum, warp[lane].operand[0]);
    }
    return sum;
}

static float widen(uint32_t pair, unsigned half) {
    uint32_t bits = half == 0 ? pair << 16 : pair & 0xFFFF0000u;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// mma.m16n8k16 with bf16 factors (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point
// type"). With group = lane / 4 and place = lane % 4:
//   a, element i of 8:  row group + 8 if i is 2, 3, 6 or 7;  column 2 place + i % 2, + 8 if i >= 4
//   b, element i of 4:  row 2 place + i % 2, + 8 if i >= 2;  column group
//   d, element i of 4:  row group, + 8 if i >= 2;            column 2 place + i % 2
// The lane's operand holds a in 0..4, b in 4..6 and d in 6..10.
static void multiply(Thread* warp) {
    float a[16][16], b[16][8], d[16][8];
    for (unsigned lane = 0; lane < WARP; lane += 1) {
        const uint32_t* operand = warp[lane].operand;
        unsigned group = lane / 4, place = lane % 4;
        for (unsigned i = 0; i < 8; i += 1) {
            a[group + (i / 2 % 2) * 8][2 * place + i % 2 + (i / 4) * 8] = widen(operand[i / 2], i % 2);
        }
        for (unsigned i = 0; i < 4; i += 1) {
            b[2 * place + i % 2 + (i / 2) * 8][group] = widen(operand[4 + i / 2], i % 2);
            memcpy(&d[group + (i / 2) * 8][2 * place + i % 2], &operand[6 + i], sizeof(float));
        }
    }
    for (unsigned row = 0; row < 16; row += 1) {
        for (unsigned k = 0; k < 16; k += 1) {
            for (unsigned column = 0; column < 8; column += 1) d[row][column] += a[row][k] * b[k][column];
        }
    }
    for (unsigned lane = 0; lane < WARP; lane += 1) {
        for (unsigned i = 0; i < 4; i += 1) {
            memcpy(&warp[lane].result[i], &d[lane / 4 + (i / 2) * 8][2 * (lane % 4) + i % 2], sizeof(float));
        }
    }
}

void settle(Meeting meeting, Thread* warp, uint32_t lanes) {
    if (meeting == Meeting::Product) {
        if (lanes == 0xFFFFFFFFu) return multiply(warp);
        stop(CUDA_ERROR_LAUNCH_FAILED, "mma by lanes 0x%08x: all 32 must take part", lanes);
    }
    uint32_t shared = meeting == Meeting::Vote ? vote(warp, lanes) : meeting == Meeting::Reduce ? reduce(warp, lanes) : 0;
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
        warp[lane].result[0] = shared;
        if (meeting == Meeting::Shuffle) shuffle(warp, lane, lanes);
    }
}

}  // namespace software_gpu
