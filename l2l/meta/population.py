"""The members of a :class:`l2l.meta.state.PopulationObjective` in other processes: this one leads, workers evaluate.

An outer step is a file in the run's directory: weights of the model and of the tuner, run statistics, memory of the objective.
So a worker is told a number only, and sends a loss and a count of passes; and one that is hired later, or after the run was
resumed, needs nothing of the steps before. Whatever moves the model between outer steps, it has moved it once, here.
"""

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch

from l2l.meta.config import MEASURED, MetaTrainConfig
from l2l.meta.outer_step import OuterStep, learned_method, meta_state
from l2l.meta.pool import MetaInputs
from l2l.meta.state import MemberLoss, MetaState, PopulationObjective
from l2l.models.load import loading_bar
from l2l.params import Blocks, PerturbedParameters
from l2l.report.run_directory import RunDirectory, differences, read_tensors
from l2l.tasks import inspect as inspect_task
from l2l.train import cluster
from l2l.train.workers import Crew, LocalHiring, RayHiring
from l2l.tuners.features import RunStatistics

if TYPE_CHECKING:
    from torch import nn

OUTER_STEP = "outer_step.safetensors"
"""In the run's directory: the outer step whose members are evaluated."""


@final
class Worker:
    """In another process: evaluates members."""

    def __init__(self) -> None:
        self._inputs: MetaInputs | None = None
        self._point: MetaState | None = None
        self._step = -1

    def load(self, config: MetaTrainConfig, folder: str, threads: int, run: str, read: dict[str, Any]) -> None:
        """Load model and pool, and the tuner with what the leader has measured.

        Args:
            folder: the working directory.
            threads: of a pass, and of noise.
            run: identity of the run, whose files are read.
            read: fingerprint of what the leader has read.

        Raises:
            ValueError, FileNotFoundError: this machine lacks the directory, the run's files, the model or the data, or
                has others.
        """
        from l2l.meta.run import inputs_fingerprint, prepare_meta_training  # which imports this module

        cluster.enter(folder)
        torch.set_num_threads(threads)
        inspect_task.logger.disabled = True  # the leader warns
        measured = Path(config.out) / MEASURED
        with loading_bar(False):
            inputs = prepare_meta_training(config, None, None, measured)
        if changes := differences(read, inputs_fingerprint(inputs, config)):
            raise ValueError(
                f"machine {socket.gethostname()} reads something else than the leader: {changes[0]}: all machines need the "
                "same files under the same paths"
            )
        self._config, self._run, self._inputs = config, run, inputs
        self._objective = config.make_objective()
        self._theta = PerturbedParameters(Blocks.of(inputs.model))
        self._method = learned_method(inputs, config)

    def evaluate(self, step: int, number: int) -> MemberLoss:
        """A member of an outer step, whose file is in the run's directory."""
        if step != self._step:
            self._enter(step)
        assert isinstance(self._objective, PopulationObjective) and self._point is not None, "the configuration was checked"
        return self._objective.member(self._point, number)

    def _enter(self, step: int) -> None:
        assert self._inputs is not None, "a worker loads first"
        path = Path(self._config.out) / OUTER_STEP
        found = read_tensors(path, self._run)
        if found["step"] != step:
            here = f"outer step {found['step']} on machine {socket.gethostname()}"
            raise ValueError(f"{path} is {here}, and {step} for the leader: all machines need the same files")
        self._theta.assign(found["model"])
        self._inputs.tuner.network.load_state_dict(found["tuner"])
        at = OuterStep(step, found["task"], found["number"], RunStatistics(**found["history"]), found["memory"])
        self._point, self._step = meta_state(self._inputs, self._config, self._theta, self._method, at), step


@final
class Population:
    """The leader's view: hires workers, writes outer steps, and has members evaluated.

    Args:
        members: of an outer step; more workers than that are not hired.

    Raises:
        ValueError: see :func:`l2l.train.cluster.connect`.
    """

    def __init__(self, config: MetaTrainConfig, members: int) -> None:
        self._config, self._count, self._threads = config, min(config.processes, members), torch.get_num_threads()
        self._crew: Crew | None = None
        self._folder: RunDirectory | None = None
        if config.executor == "ray":
            ray = cluster.connect(config.ray_address, self._count * self._threads)
            self._hiring = RayHiring(ray, Worker, cluster.resources(config.device, self._threads))
        else:
            self._hiring = LocalHiring(Worker)

    def begin(self, folder: RunDirectory) -> None:
        """Hire the workers of a run, whose directory has what they read, and wait for the first of them."""
        told = replace(self._config, progress=False), os.getcwd(), self._threads, folder.run, folder.inputs
        self._folder, self._crew = folder, Crew(self._hiring, self._count, ("load", told))
        self._crew.begin()

    def evaluate(self, theta: PerturbedParameters, tuner: "nn.Module", at: OuterStep, count: int) -> list[MemberLoss]:
        """So many members of an outer step, in their order."""
        assert self._folder is not None and self._crew is not None, "it has begun"
        theta.restore()
        model = {block.name: block.tensor.detach() for block in theta.blocks}
        state = {"step": at.step, "task": at.task, "number": at.number, "history": vars(at.history), "memory": dict(at.memory)}
        self._folder.write(OUTER_STEP, state | {"model": model, "tuner": dict(tuner.state_dict())})
        return self._crew.map("evaluate", [(at.step, number) for number in range(count)])

    def close(self) -> None:
        """Dismiss the workers."""
        if self._crew is not None:
            self._crew.close()
