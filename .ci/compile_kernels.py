"""Compile every CUDA source with NVRTC, for each architecture and set of macros, without a GPU.

The compiler and its headers come from PyPI, into a virtual environment of this step's own:

    python .ci/compile_kernels.py [FOLDER]

makes one in FOLDER (.ci/venv by default), installs what `[ctk]` of cuobs brings for each CUDA
release that it supports, and compiles there. It fails when an install or a compilation does.
"""

import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing import Pool
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
EXTRAS = ("cuda12", "cuda13")


def main(folder):
    # While the second release is installed, the first compiles.
    with ThreadPoolExecutor() as pool:
        homes = (install(Path(folder) / extra, extra) for extra in EXTRAS)
        running = [pool.submit(compile_in, home) for home in homes]
        for one in running:
            one.result()


def install(home, extra):
    """An environment with what an extra brings."""
    venv.create(home, with_pip=True, clear=not (home / "bin" / "pip").exists())
    root = Path(__file__).resolve().parent.parent
    pip = [home / "bin" / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"{root}[{extra}]"], check=True)
    return home


def compile_in(home):
    subprocess.run([home / "bin" / "python", __file__, "--here"], check=True, cwd=home)


def compile_here():
    """Compile with the NVRTC of this environment, a process a core."""
    from cupy.cuda import nvrtc

    from cuobs.ops.cuda import loader

    variants = sorted({(source, loader.options(macros)) for source, macros in loader.variants()})
    missing = set(loader.sources()) - {source for source, _ in variants}
    if missing:
        raise SystemExit(f"no variants are listed for {', '.join(map(str, sorted(missing)))}")
    # Types do not depend on the architecture: double once is enough. Some sources are for Hopper
    # alone, by another name.
    jobs = [
        (source, options, architecture)
        for source, options in variants
        for architecture in ARCHITECTURES
        if architecture == "sm_90" or not (for_hopper(source) or "-DREAL=double" in options)
    ]
    with Pool() as pool:
        faults = [fault for fault in pool.imap_unordered(compile_one, jobs, chunksize=4) if fault]
    if faults:
        raise SystemExit("\n".join(faults))
    version = ".".join(map(str, nvrtc.getVersion()))
    print(f"NVRTC {version}: {len(jobs)} programs compile for {', '.join(ARCHITECTURES)}")


def for_hopper(source):
    """Whether a source has instructions that no other architecture has."""
    return source.stem.endswith("_hopper")


def compile_one(job):
    """What is wrong with one program, or an empty text."""
    from cupy.cuda import nvrtc

    from cuobs.ops.cuda import loader

    source, options, architecture = job
    include = [f"-I{path}" for path in _include_folders()]
    program = nvrtc.createProgram(loader.text(source), source.name, (), ())
    target = architecture + ("a" if for_hopper(source) else "")
    name = f"{source.name} {' '.join(options)} for {target}"
    try:
        nvrtc.compileProgram(program, (*options, f"-arch={target}", *include))
        return "" if nvrtc.getCUBIN(program) else f"{name}: no machine code came out"
    except nvrtc.NVRTCError:
        return f"{name}:\n{nvrtc.getProgramLog(program)}"
    finally:
        nvrtc.destroyProgram(program)


@cache
def _include_folders():
    """Where the packages put CUDA's headers."""
    import nvidia

    headers = [p for base in nvidia.__path__ for p in Path(base).rglob("cuda_fp16.h")]
    if not headers:
        raise SystemExit("no package has brought cuda_fp16.h")
    return [path.parent for path in headers]


if __name__ == "__main__":
    if sys.argv[1:] == ["--here"]:
        compile_here()
    else:
        main(*sys.argv[1:] or [Path(__file__).resolve().parent / "venv"])
