"""Compile copy_cast.cu to copy_cast.ptx, or check that the committed PTX is current.

    pip install nvidia-cuda-nvrtc-cu12==12.2.140
    python kernels/generate.py            # writes copy_cast.ptx
    python kernels/generate.py --check    # exit 1 when it differs, 2 when NVRTC is absent

No GPU is needed. The NVRTC version is pinned: 12.2 emits PTX 8.2, which the drivers of JetPack 6 accept;
a newer one emits newer PTX, which they refuse. compute_70 is the oldest architecture of interest; the driver
compiles from there for whatever GPU it finds.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "copy_cast.cu"
PTX = HERE / "copy_cast.ptx"
NVRTC = (12, 2)
PACKAGE = "nvidia-cuda-nvrtc-cu12==12.2.140"
OPTIONS = ["--gpu-architecture=compute_70", "--std=c++17", "--fmad=false"]


class NvrtcMissingError(Exception):
    """NVRTC of the pinned version cannot be had."""


def find_nvrtc() -> ctypes.CDLL:
    try:
        spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise NvrtcMissingError(f"NVRTC is not installed here; `pip install {PACKAGE}` and run this again")
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    library = ctypes.CDLL(str(folder / "libnvrtc.so.12"))
    major, minor = ctypes.c_int(), ctypes.c_int()
    if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) != 0:
        raise NvrtcMissingError("nvrtcVersion failed")
    if (major.value, minor.value) != NVRTC:
        raise NvrtcMissingError(
            f"NVRTC {major.value}.{minor.value} is installed, not {NVRTC[0]}.{NVRTC[1]}; `pip install {PACKAGE}`"
        )
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def compile_ptx(nvrtc: ctypes.CDLL, source: str) -> str:
    def check(code: int) -> None:
        if code != 0:
            raise SystemExit(f"NVRTC: {nvrtc.nvrtcGetErrorString(code).decode()}\n{log()}")

    program = ctypes.c_void_p()

    def log() -> str:
        size = ctypes.c_size_t()
        if not program or nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)) != 0:
            return ""
        text = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, text)
        return text.value.decode()

    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), SOURCE.name.encode(), 0, None, None))
    try:
        options = (ctypes.c_char_p * len(OPTIONS))(*(o.encode() for o in OPTIONS))
        check(nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options))
        size = ctypes.c_size_t()
        check(nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size)))
        text = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetPTX(program, text))
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    # NVRTC's built-in <nv/target> leaves some forty constants that nothing here refers to.
    lines = [line.rstrip() for line in text.value.decode().strip().splitlines() if "2nv6target" not in line]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed PTX, write nothing")
    args = parser.parse_args()
    try:
        ptx = compile_ptx(find_nvrtc(), SOURCE.read_text())
    except NvrtcMissingError as error:
        print(f"{PTX.name}: not checked: {error}" if args.check else str(error), file=sys.stderr)
        return 2
    if not args.check:
        PTX.write_text(ptx)
        print(f"wrote {PTX.name}, {len(ptx)} bytes")
        return 0
    if not PTX.exists() or PTX.read_text() != ptx:
        print(f"{PTX.name} is not what {SOURCE.name} compiles to: run python kernels/{Path(__file__).name}")
        return 1
    print(f"{PTX.name} is current")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
