"""Run the tests of the frozen vectors as other processors would: by other kernels of NumPy, torch and OpenBLAS."""

import os
import subprocess
import sys

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

for title, variables in SETTINGS.items():
    print(f"vectors by {title}: {variables}", flush=True)
    tests = [sys.executable, "-m", "pytest", "-q", "-n", "2", "tests/test_vectors.py"]
    if code := subprocess.run(tests, env=os.environ | variables).returncode:
        sys.exit(code)
