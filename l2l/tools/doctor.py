"""``l2l doctor``: what this machine has, which noise backends run on it and how fast, and what would help."""

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from l2l.arguments import Arguments
from l2l.noise import Key, MomentRequest, NoiseTerm, TensorSlice, active_backend, add_noise, backend_problem, reference
from l2l.noise.dispatch import BACKENDS, VARIABLE
from l2l.noise.native import compiler, folders
from l2l.report.console import print_table
from l2l.report.memory import available_bytes
from l2l.report.run_directory import RunDirectory
from l2l.tools.bench import GIB, hardware, wait

ELEMENTS = 2**22
"""Weights that noise is added to, for the speed and for the comparison with the reference."""
REPEATS = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SCALE = 1e-3 / 147.8
"""Of the noise added: an ordinary epsilon over the standard deviation of the integer noise."""
TERMS = [NoiseTerm(Key(7, 3), [(SCALE, -2 * SCALE)])]


@dataclass(frozen=True)
class DoctorConfig(Arguments):
    """Say what this machine has, which noise backend serves it, how fast it is, and what would help."""

    out: str | None = None
    """Directory for ``config.yaml`` and ``summary.json``; None: print only."""
    overwrite: bool = False
    """Remove what an earlier run left in ``out``."""


def run_doctor(config: DoctorConfig) -> dict[str, Any]:
    """Examine, print, and write to ``out`` where one is given; the findings. A problem is advice, never an error.

    Raises:
        ValueError: ``out`` holds something else.
    """
    folder = RunDirectory(config.out, asdict(config), config.overwrite) if config.out else None
    found = examine()
    machine = dict(found["machine"])
    print_table("machine", [machine.pop("versions") | {name: _text(value) for name, value in machine.items()}])
    backends = [
        {"backend": name, "device": BACKENDS[name], "runs": "yes" if why is None else f"no: {why}"}
        for name, why in found["problems"].items()
    ]
    print_table("noise backends", [*backends, {"backend": "reference", "device": "any", "runs": "yes"}])
    exact = {True: "bit for bit", False: "NO", None: "-"}
    speeds = [
        {name: row[name] for name in ("device", "dtype")}
        | {"backend": row["backend"] or "none", "weights/s": _text(row["elements_per_second"])}
        | {"equals the specification": exact[row["exact"]]}
        for row in found["serving"]
    ]
    print_table(f"noise of {ELEMENTS} weights", speeds)
    for line in found["advice"]:
        print(f"advice: {line}")
    if folder is not None:
        folder.create()
        folder.finish(found | {"config": asdict(config)})
    return found


def examine() -> dict[str, Any]:
    """What the machine has, the backend of each device and dtype, and a line of advice per problem."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    machine = hardware() | {
        "threads": torch.get_num_threads(),
        "memory_available_gib": round(available_bytes() / GIB, 1),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "compiler": compiler(),
        "cache_folders": [str(folder) for folder in folders()],
    }
    found = {
        "machine": machine,
        "problems": {name: backend_problem(name) for name in BACKENDS},
        "serving": [serving(device, dtype) for device in devices for dtype in DTYPES],
    }
    return found | {"advice": list(advice(found))}


def serving(device: str, dtype: str) -> dict[str, Any]:
    """The backend that serves a device and dtype, its weights per second, whether its bits are the reference's, and the
    problem where none can serve."""
    row: dict[str, Any] = {"device": device, "dtype": dtype}
    try:
        row["backend"] = active_backend(device, DTYPES[dtype])
    except ValueError as error:  # a backend is forced that cannot run
        return row | {"backend": None, "elements_per_second": None, "exact": None, "problem": str(error)}
    speed = elements_per_second(device, DTYPES[dtype])
    return row | {"elements_per_second": speed, "exact": equals_reference(device, DTYPES[dtype]), "problem": None}


def elements_per_second(device: str, dtype: torch.dtype) -> float:
    """Weights per second that the serving backend adds noise to: the median of :data:`REPEATS` calls."""
    slices, seconds = [TensorSlice(_sample(device, dtype), "sample")], []
    for _ in range(REPEATS + 1):  # the first may compile
        wait(torch.device(device))
        start = time.perf_counter()
        add_noise(slices, TERMS)
        wait(torch.device(device))
        seconds.append(time.perf_counter() - start)
    return ELEMENTS / median(seconds[1:])


def equals_reference(device: str, dtype: torch.dtype) -> bool:
    """Whether weights and moments there are, bit for bit, those of the reference on the CPU."""
    there, here = _sample(device, dtype), _sample("cpu", dtype)
    request = MomentRequest([SCALE], [0.01])
    fast = add_noise([TensorSlice(there, "sample", 5)], TERMS, request)
    slow = reference.add_noise([TensorSlice(here, "sample", 5)], TERMS, request)
    assert fast is not None and slow is not None, "moments were requested"
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    same_sums = all(np.array_equal(value, getattr(slow, name)) for name, value in vars(fast).items())
    return same_sums and torch.equal(there.cpu().view(bits), here.view(bits))


def _sample(device: str, dtype: torch.dtype) -> torch.Tensor:
    """[ELEMENTS] weights, the same on every device."""
    return torch.linspace(-1.0, 1.0, ELEMENTS, dtype=torch.float32).to(dtype).to(device)


def advice(found: dict[str, Any]) -> Iterator[str]:
    """A line for each thing that could be better."""
    machine, problems = found["machine"], found["problems"]
    yield from dict.fromkeys(row["problem"] for row in found["serving"] if row["problem"])
    if os.environ.get(VARIABLE, "auto") != "auto":
        yield f"{VARIABLE}={os.environ[VARIABLE]} forces the noise backend: unset it to let l2l choose"
    if machine["compiler"] is None:
        yield "no C compiler is on PATH: install one (gcc or clang), or `pip install l2l[fast]` for numba"
    elif problems["native"] is not None:
        named = " or ".join(machine["cache_folders"])
        yield f"{machine['compiler']} is there, but {problems['native']}: make {named} writable, or set L2L_CACHE"
    if machine["cuda_devices"] and problems["triton"] is not None:
        yield f"noise on CUDA is slow without triton ({problems['triton']}): `pip install triton`"
    for row in found["serving"]:
        if row["exact"] is False:
            where = f"{row['device']}/{row['dtype']}"
            yield f"{row['backend']} differs from the specification on {where}: set {VARIABLE}=reference and report it"
    if machine["noisy"]:
        yield f"load {machine['load_average']:.1f} on {machine['cores']} cores: measurements will be noisy"


def _text(value: object) -> object:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "none" if value is None else value
