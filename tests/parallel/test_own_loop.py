"""A loop of one's own: a process group that the program has made, and the closure of its part of a batch. Two processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

LOOP = """
import sys, torch, l2l
from l2l.parallel import DataParallel, ranks_of_environment
from l2l.params.blocks import tensors_hash

def parts(size):
    draw = torch.Generator().manual_seed(3)
    x, y = torch.randn(8, 4, generator=draw), torch.randint(2, (8,), generator=draw)
    return list(zip(x.chunk(size), y.chunk(size)))

torch.manual_seed(0)
model = torch.nn.Linear(4, 2)
loss = lambda part: torch.nn.functional.cross_entropy(model(part[0]), part[1])
{start}
ranks = ranks_of_environment()
shared = DataParallel(ranks)
optimizer = l2l.MeZO(model, lr=1e-2)
own = parts(ranks.size)[ranks.rank]
for _ in range(5):
    optimizer.step(shared.shard(lambda: loss(own)))
shared.begin(99)
shared.compare(optimizer)
print("hash", tensors_hash(model.parameters()))
"""
STARTS = {
    "torch.distributed": "torch.distributed.init_process_group('gloo')",
    "accelerate": "from accelerate import Accelerator; model = Accelerator(cpu=True).prepare(model)",
    "fabric": (
        "import lightning; fabric = lightning.Fabric(accelerator='cpu', strategy='ddp', devices=2); fabric.launch(); "
        "model = fabric.setup(model)"
    ),
}
ALONE = """
import torch, l2l
from l2l.estimators import MicroBatched
from l2l.params.blocks import tensors_hash
{parts}
optimizer = l2l.MeZO(model, lr=1e-2)
pieces = tuple(lambda part=part: loss(part) for part in parts(2))
for _ in range(5):
    optimizer.step(MicroBatched(pieces, (0.5, 0.5)))
print("hash", tensors_hash(model.parameters()))
"""


def ran(code: str, given: dict[str, str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **given}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **pipes)  # type: ignore[call-overload]


def digest(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=280)
    assert process.returncode == 0, error
    return out.split("hash ")[1].split()[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("start", STARTS)
def test_a_loop_of_two_processes_has_the_weights_of_one(start: str, tmp_path: Path):
    if start != "torch.distributed":
        pytest.importorskip({"accelerate": "accelerate", "fabric": "lightning"}[start], reason="this launcher is not installed")
    with closing(socket.socket()) as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    code = LOOP.replace("{start}", STARTS[start])
    waiting = [ran(code, {**both, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    inner = LOOP[LOOP.index("def parts") : LOOP.index("{start}")]
    alone = digest(ran(ALONE.replace("{parts}", inner), {}))
    assert [digest(one) for one in waiting] == [alone, alone]
