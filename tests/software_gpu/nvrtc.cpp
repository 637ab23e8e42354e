// NVRTC: "compiles" the programs whose kernels were built into this library, and refuses others.

#include <cstdio>
#include <cstring>
#include <string>

#include "kernels.h"
#include "status.h"

namespace software_gpu {

enum { NVRTC_SUCCESS = 0, NVRTC_ERROR_INVALID_INPUT = 3, NVRTC_ERROR_INVALID_PROGRAM = 4, NVRTC_ERROR_INVALID_OPTION = 5, NVRTC_ERROR_COMPILATION = 6 };

struct Program {
    std::string text, name, log, image;
    bool binary = false;  // compiled for sm_*, not compute_*
};

API int nvrtcVersion(int* major, int* minor) {
    *major = 13;
    *minor = 0;
    return NVRTC_SUCCESS;
}

static const int ARCHITECTURES[] = {75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121};

API int nvrtcGetNumSupportedArchs(int* count) {
    *count = static_cast<int>(sizeof ARCHITECTURES / sizeof *ARCHITECTURES);
    return NVRTC_SUCCESS;
}

API int nvrtcGetSupportedArchs(int* architectures) {
    memcpy(architectures, ARCHITECTURES, sizeof ARCHITECTURES);
    return NVRTC_SUCCESS;
}

API const char* nvrtcGetErrorString(int result) {
    switch (result) {
        case NVRTC_SUCCESS: return "NVRTC_SUCCESS";
        case NVRTC_ERROR_INVALID_INPUT: return "NVRTC_ERROR_INVALID_INPUT";
        case NVRTC_ERROR_INVALID_PROGRAM: return "NVRTC_ERROR_INVALID_PROGRAM";
        case NVRTC_ERROR_INVALID_OPTION: return "NVRTC_ERROR_INVALID_OPTION";
        case NVRTC_ERROR_COMPILATION: return "NVRTC_ERROR_COMPILATION";
        default: return "NVRTC_ERROR unknown";
    }
}

API int nvrtcCreateProgram(Program** program, const char* text, const char* name, int, const char* const*, const char* const*) {
    if (program == nullptr || text == nullptr) return NVRTC_ERROR_INVALID_INPUT;
    *program = new Program{text, name != nullptr ? name : "default_program", "", ""};
    return NVRTC_SUCCESS;
}

API int nvrtcDestroyProgram(Program** program) {
    if (program == nullptr || *program == nullptr) return NVRTC_ERROR_INVALID_PROGRAM;
    delete *program;
    *program = nullptr;
    return NVRTC_SUCCESS;
}

// The file whose text the program ends with, with the prelude somewhere before it.
static const KernelFile* file_of(const std::string& program) {
    const KernelFile* found = nullptr;
    size_t longest = 0;
    for (const KernelFile* file = first_file(); file != nullptr; file = file->next) {
        std::string text(file->text, file->text_end), prelude(file->prelude, file->prelude_end);
        while (!text.empty() && isspace(static_cast<unsigned char>(text.back()))) text.pop_back();
        while (!prelude.empty() && isspace(static_cast<unsigned char>(prelude.back()))) prelude.pop_back();
        size_t at = program.rfind(text);
        if (text.empty() || at == std::string::npos || text.size() < longest) continue;
        if (program.find_first_not_of(" \t\r\n", at + text.size()) != std::string::npos) continue;
        if (program.substr(0, at).find(prelude) == std::string::npos) continue;
        found = file;
        longest = text.size();
    }
    return found;
}

// FNV-1a, so that an image that was kept is not loaded by a library that was built from another text.
std::string image_of(const KernelFile& file, const std::string& architecture) {
    uint64_t digest = 0xCBF29CE484222325;
    for (auto [at, end] : {std::pair{file.prelude, file.prelude_end}, std::pair{file.text, file.text_end}}) {
        for (; at < end; at += 1) digest = (digest ^ static_cast<unsigned char>(*at)) * 0x100000001B3;
    }
    return IMAGE_MAGIC + std::string(file.name) + " " + architecture + " " + std::to_string(digest) + "\n";
}

API int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    if (program == nullptr) return NVRTC_ERROR_INVALID_PROGRAM;
    std::string architecture = "compute_75";
    for (int i = 0; i < count; i += 1) {
        std::string option = options[i];
        if (option.empty() || option[0] != '-') {
            program->log = "unrecognized option " + option;
            return NVRTC_ERROR_INVALID_OPTION;
        }
        for (const char* name : {"--gpu-architecture=", "-arch="}) {
            if (option.rfind(name, 0) == 0) architecture = option.substr(strlen(name));
        }
        if (option == "-arch" && i + 1 < count) architecture = options[++i];
    }
    const KernelFile* file = file_of(program->text);
    if (file == nullptr) {
        program->log = program->name + ": not a program the software device was built from: run tests/software_gpu/build.sh again\n";
        fprintf(stderr, "software gpu: %s", program->log.c_str());
        return NVRTC_ERROR_COMPILATION;
    }
    program->binary = architecture.rfind("sm_", 0) == 0;
    // Code for an older compute_* runs on a newer device; code for an sm_* on that one only.
    std::string target = program->binary ? architecture : "sm_90";
    program->image = image_of(*file, target);
    return NVRTC_SUCCESS;
}

// Sizes count the final NUL.
static int copy_size(Program* program, const std::string& from, size_t* bytes) {
    if (program == nullptr || bytes == nullptr) return NVRTC_ERROR_INVALID_INPUT;
    *bytes = from.size() + 1;
    return NVRTC_SUCCESS;
}

static int copy_text(Program* program, const std::string& from, char* to) {
    if (program == nullptr || to == nullptr) return NVRTC_ERROR_INVALID_INPUT;
    memcpy(to, from.c_str(), from.size() + 1);
    return NVRTC_SUCCESS;
}

API int nvrtcGetProgramLogSize(Program* program, size_t* bytes) { return copy_size(program, program->log, bytes); }
API int nvrtcGetProgramLog(Program* program, char* to) { return copy_text(program, program->log, to); }

API int nvrtcGetPTXSize(Program* program, size_t* bytes) { return copy_size(program, program->image, bytes); }
API int nvrtcGetPTX(Program* program, char* to) { return copy_text(program, program->image, to); }

API int nvrtcGetCUBINSize(Program* program, size_t* bytes) {
    int status = copy_size(program, program->image, bytes);
    if (status == NVRTC_SUCCESS && !program->binary) *bytes = 0;
    return status;
}

API int nvrtcGetCUBIN(Program* program, char* to) {
    if (!program->binary) return NVRTC_ERROR_INVALID_PROGRAM;
    return copy_text(program, program->image, to);
}

}  // namespace software_gpu
