"""Sources of a few lines in place of the real kernels, and what the tests that build them share."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from flowformer.kernels.native import build, compiler

COMPILER = compiler.find_compiler()

HEADER = """
#define EXPORT extern "C" __attribute__((visibility("default")))
#define JOIN_(name, level) name##_##level
#define JOIN(name, level) JOIN_(name, level)
#define TEXT_(level) #level
#define TEXT(level) TEXT_(level)
"""
KERNELS = """
#include "names.h"
inline __attribute__((noinline)) const char *merged_by_the_linker() { return TEXT(FLOWFORMER_LEVEL); }
EXPORT const char *JOIN(flowformer_inline, FLOWFORMER_LEVEL)() { return merged_by_the_linker(); }
EXPORT const char *JOIN(flowformer_level, FLOWFORMER_LEVEL)() { return TEXT(FLOWFORMER_LEVEL); }
EXPORT int JOIN(flowformer_version, FLOWFORMER_LEVEL)() { return 1; }
"""
LIBRARY = """
#include "names.h"
#include <string.h>
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
static Parallel parallel = nullptr;
EXPORT void flowformer_set_parallel(void *gomp_parallel) { parallel = (Parallel)gomp_parallel; }
static void count(void *seen) { __atomic_fetch_add((int *)seen, 1, __ATOMIC_SEQ_CST); }
EXPORT int count_threads(int wanted) {
    int seen = 0;
    if (parallel) parallel(count, &seen, wanted, 0);
    else count(&seen);
    return seen;
}
EXPORT int flowformer_cpu_supports(const char *level) {
#ifdef __x86_64__
    if (!strcmp(level, "avx512")) return !!__builtin_cpu_supports("avx512f");
    if (!strcmp(level, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return !strcmp(level, "portable");
}
"""


def compilations(wrapper: Path) -> int:
    calls = wrapper.with_name(f"{wrapper.name}.calls")
    return sum(" -c " in line for line in calls.read_text().splitlines()) if calls.exists() else 0


def text(library: build.Library, name: str) -> str:
    function = getattr(library.handle, name)
    function.restype = ctypes.c_char_p
    return function().decode()


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Run code in a new process, which imports no torch: that starts faster."""
    head = "import sys; from pathlib import Path; from flowformer.kernels.native import build, cache, compiler\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def output(process: subprocess.Popen[str]) -> str:
    try:
        printed, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors
    return printed.strip()
