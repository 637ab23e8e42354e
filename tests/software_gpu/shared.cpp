#include "shared.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

#include "device.h"
#include "memory.h"

namespace software_gpu {

static const size_t PAGE = 4096;
static const size_t ROOM = (MAX_SHARED + PAGE - 1) / PAGE * PAGE;

static unsigned char* end_of_room() {
    void* at = mmap(nullptr, ROOM + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED || mprotect(static_cast<char*>(at) + PAGE, ROOM, PROT_READ | PROT_WRITE) != 0) {
        perror("software gpu: no memory for shared memory");
        abort();
    }
    return static_cast<unsigned char*>(at) + PAGE + ROOM;
}

unsigned char* fresh_shared(size_t bytes) {
    static unsigned char* const end = end_of_room();
    unsigned char* at = end - (bytes + 15) / 16 * 16;
    memset(at, POISON, static_cast<size_t>(end - at));
    return at;
}

}  // namespace software_gpu
