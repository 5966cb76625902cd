"""Run the tests of the frozen vectors as other processors would: by other kernels of NumPy, torch and OpenBLAS."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from numpy._core import _multiarray_umath as umath

enabled = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__.get(name)]
avx512 = [name for name in enabled if name.startswith("AVX512") or name == "X86_V4"]

SETTINGS = {
    "NumPy without AVX-512": {"NPY_DISABLE_CPU_FEATURES": " ".join(avx512)},
    "NumPy without AVX2": {"NPY_DISABLE_CPU_FEATURES": " ".join(enabled)},
    "torch without vector kernels": {"ATEN_CPU_CAPABILITY": "default"},
    "OpenBLAS for Haswell": {"OPENBLAS_CORETYPE": "Haswell"},
    "OpenBLAS for Nehalem": {"OPENBLAS_CORETYPE": "Nehalem"},
}

TESTS = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_vectors.py"]


def run(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """One setting on one process, since every process more imports torch once more."""
    return subprocess.run(
        TESTS, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


# Two settings run at a time; the lines of each are printed together, in the order above.
with ThreadPoolExecutor(2) as both:
    codes = []
    for (title, variables), done in zip(SETTINGS.items(), both.map(run, SETTINGS.values()), strict=True):
        print(f"vectors by {title}: {variables}\n{done.stdout}", flush=True)
        codes.append(done.returncode)
sys.exit(next(filter(None, codes), 0))
