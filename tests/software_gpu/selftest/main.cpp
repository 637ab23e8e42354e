// The self-test of the software device. Usage: selftest PRELUDE FOLDER

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

int failures = 0;
static std::string self, prelude_path, folder;

static std::string text_of(const std::string& path) {
    std::ifstream file(path);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

void open_device() {
    void* context = nullptr;
    CHECK(cuInit(0) == 0);
    CHECK(cuDevicePrimaryCtxRetain(&context, 0) == 0);
    CHECK(cuCtxSetCurrent(context) == 0);
}

static void* load() {
    std::string text = text_of(prelude_path) + text_of(folder + "/probes.cu");
    void *program = nullptr, *module = nullptr;
    CHECK(nvrtcCreateProgram(&program, text.c_str(), "probes.cu", 0, nullptr, nullptr) == 0);
    const char* options[] = {"--gpu-architecture=sm_90"};
    CHECK(nvrtcCompileProgram(program, 1, options) == 0);
    size_t bytes = 0;
    CHECK(nvrtcGetCUBINSize(program, &bytes) == 0);
    std::vector<char> image(bytes);
    CHECK(nvrtcGetCUBIN(program, image.data()) == 0);
    CHECK(cuModuleLoadData(&module, image.data()) == 0);
    CHECK(cuModuleLoadData(&module, "\177ELF") == 200);
    std::string other = image.data();
    other[other.size() - 2] = other[other.size() - 2] == '0' ? '1' : '0';  // compiled from another text
    CHECK(cuModuleLoadData(&module, other.c_str()) == 209);
    CHECK(cuModuleLoadData(&module, image.data()) == 0);

    void* changed = nullptr;
    CHECK(nvrtcCreateProgram(&changed, (text + "// changed since").c_str(), "probes.cu", 0, nullptr, nullptr) == 0);
    CHECK(nvrtcCompileProgram(changed, 1, options) == 6);
    return module;
}

void* kernel(const char* name) {
    static void* module = load();
    void* function = nullptr;
    CHECK(cuModuleGetFunction(&function, module, name) == 0);
    return function;
}

int launch(const char* name, unsigned blocks, unsigned threads, unsigned shared, std::vector<void*> arguments) {
    return cuLaunchKernel(kernel(name), blocks, 1, 1, threads, 1, 1, shared, nullptr, arguments.data(), nullptr);
}

int run_scene(const char* scene, const char* setting, std::string* said) {
    int ends[2];
    if (pipe(ends) != 0) return -1000;
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        if (setting != nullptr) putenv(const_cast<char*>(setting));
        execl(self.c_str(), self.c_str(), prelude_path.c_str(), folder.c_str(), scene, nullptr);
        _exit(127);
    }
    close(ends[1]);
    char part[256];
    said->clear();
    for (ssize_t got; (got = read(ends[0], part, sizeof part)) > 0;) said->append(part, static_cast<size_t>(got));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

int main(int count, char** words) {
    if (count < 3) return fprintf(stderr, "usage: %s PRELUDE FOLDER\n", words[0]), 2;
    self = words[0];
    prelude_path = words[1];
    folder = words[2];
    const std::map<std::string, int (*)()> scenes = {
        {"out_of_bounds", scene_out_of_bounds},
        {"deadlock", scene_deadlock},
        {"array", scene_array},
        {"host_pointer", scene_host_pointer},
        {"stray", scene_stray},
        {"lost", scene_lost},
        {"memory", scene_memory},
        {"none", scene_none},
        {"freed_before_copy", scene_freed_before_copy}};
    if (count > 3) return scenes.at(words[3])();
    open_device();
    test_execution();
    test_streams();
    test_blas();
    test_solver();
    test_faults();
    puts(failures == 0 ? "software GPU: all checks hold" : "software GPU: some checks do not hold");
    return failures == 0 ? 0 : 1;
}
