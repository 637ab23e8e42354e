"""Prints the folders of NVIDIA's runtime libraries on this machine, as LD_LIBRARY_PATH takes them.

What LD_LIBRARY_PATH has comes first, then CUDA's own folders, then those of packages below nvidia/ of this Python
(what torch brings). Only folders that hold cuBLAS, cuSOLVER or NVRTC, or what these load, are named.
"""

import os
import sys
from pathlib import Path

WANTED = ("libcublas", "libcusolver", "libnvrtc", "libcusparse", "libnvJitLink", "libcudart")


def folders() -> list[str]:
    given = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    system = sorted(Path("/usr/local").glob("cuda*/lib64"))
    packages = [folder for place in sys.path for folder in sorted(Path(place).glob("nvidia/*/lib"))]
    useful = [folder for folder in [*system, *packages] if any(list(folder.glob(f"{name}.so*")) for name in WANTED)]
    return list(dict.fromkeys(str(folder) for folder in [*given, *useful]))


if __name__ == "__main__":
    print(":".join(folders()))
