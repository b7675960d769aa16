"""The Triton backend gives the bits of the reference: in triton's interpreter, and on a CUDA device."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from noise_cases import differing, same_bits, same_sums

from l2l.noise import Key, MomentRequest, NoiseTerm, TensorSlice, active_backend, add_noise, backend_problem

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
HERE = Path(__file__).parent


def interpret(*command: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: triton reads the variable when it is imported."""
    path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


@needs_triton
def test_interpreted_kernels_equal_the_reference_bit_for_bit():
    done = interpret(str(HERE / "noise_cases.py"), "triton", "15", "5000")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
def test_interpreted_kernels_equal_the_reference_over_several_chunks():
    done = interpret(str(HERE / "noise_cases.py"), "triton", "3", "90000")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
def test_triton_can_be_forced_on_the_cpu_only_where_it_is_interpreted():
    code = "import os; os.environ['L2L_NOISE'] = 'triton'; from l2l.noise import active_backend; print(active_backend())"
    assert interpret("-c", code).stdout.strip() == "triton"


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_triton_tells_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backend_problem("triton") == "there is no CUDA device"


def test_importing_the_package_imports_neither_triton_nor_numba():
    code = "import sys, l2l.noise; print([m for m in ('triton', 'numba') if m in sys.modules])"
    assert interpret("-c", code).stdout.strip() == "[]"


@pytest.mark.gpu
@needs_triton
def test_compiled_kernels_equal_the_reference_bit_for_bit():
    assert differing("triton", range(200), 200_000, "cuda") == []


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_of_more_than_a_launch_of_sums_is_the_same_on_both_devices(dtype: torch.dtype):
    assert active_backend("cuda", dtype) == "triton"
    count = 16384 * 32768 + 12_345
    start = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    here, there = TensorSlice(start, "w", 2**32 - 99_999), TensorSlice(start.cuda(), "w", 2**32 - 99_999)
    terms, gather = [NoiseTerm(Key(1), [(1e-3,)])], MomentRequest([1e-3], [0.0])
    sums, others = add_noise([here], terms, gather), add_noise([there], terms, gather)
    assert same_sums(sums, others)
    assert same_bits(here.flat, there.flat.cpu())
