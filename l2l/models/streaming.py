"""A model whose lower layers stay in the files of its checkpoint: they are read one at a time while rows pass through them.

The embedding, and what lies above the lower layers, is loaded as usual. With the states of all rows kept behind the lower
layers (:mod:`l2l.models.prefix`) they are not needed again, so a model trains where its top alone fits.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from l2l.models.kinds import auto_class, kind_of_config
from l2l.models.prefix import TrainLayers, chosen_layers, layer_list

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@final
class LayerFiles:
    """The files of a checkpoint, by the tensors that they hold.

    Args:
        folder: a directory with ``model.safetensors``, or with an index of several files.

    Raises:
        FileNotFoundError, ValueError: there are no such files, or they are not readable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lower: list[list[tuple[torch.nn.Module, str, str]]] = []
        """For each lower layer its parameters: the module that owns one, its name there, and its name in the checkpoint."""
        if not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
            raise FileNotFoundError(
                f"stream_layers reads a directory with {SINGLE} or {INDEX}, and {str(folder)!r} is none: give one saved by "
                "save_pretrained, or leave stream_layers off"
            )
        try:
            if (folder / INDEX).is_file():
                self.files: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
                outside = [name for name in self.files.values() if Path(name).name != name or not (folder / name).is_file()]
                if outside:
                    raise ValueError(f"its index names {outside[0]!r}, which is no file of that directory")
            else:
                with safe_open(folder / SINGLE, "pt") as file:
                    self.files = dict.fromkeys(file.keys(), SINGLE)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"the checkpoint in {str(folder)!r} is not readable ({error}): download or save it again"
            ) from error

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint, in its own dtype, on the CPU."""
        with safe_open(self.folder / self.files[name], "pt") as file:
            return file.get_tensor(name)

    def put(self, owner: torch.nn.Module, attribute: str, name: str, device: torch.device | str) -> None:
        """Give a parameter its values, in its own dtype."""
        empty: Any = owner._parameters[attribute]
        value = self.tensor(name).to(device, empty.dtype, copy=True)
        owner._parameters[attribute] = torch.nn.Parameter(value, requires_grad=empty.requires_grad)

    @contextmanager
    def resident(self, index: int, device: torch.device | str) -> Iterator[None]:
        """While it is active, lower layer ``index`` has its weights."""
        empty = [owner._parameters[attribute] for owner, attribute, _ in self.lower[index]]
        try:
            for owner, attribute, name in self.lower[index]:
                self.put(owner, attribute, name, device)
            yield
        finally:
            for (owner, attribute, _), parameter in zip(self.lower[index], empty, strict=True):
                owner._parameters[attribute] = parameter

    def save(self, model: Any, target: Path) -> None:
        """Write the whole model as ``save_pretrained`` does: the checkpoint's files, but for what is in memory.

        No more than one file's tensors are in memory at a time.
        """
        target.mkdir(parents=True, exist_ok=True)
        resident = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False) if not p.is_meta}
        for file in sorted(set(self.files.values())):
            names = [name for name, where in self.files.items() if where == file]
            tensors = {name: resident[name].cpu().clone() if name in resident else self.tensor(name) for name in names}
            save_file({name: tensor.to(model.dtype) for name, tensor in tensors.items()}, target / file, {"format": "pt"})
        if (self.folder / INDEX).is_file():
            shutil.copyfile(self.folder / INDEX, target / INDEX)
        model.config.save_pretrained(target)
        if model.can_generate():
            model.generation_config.save_pretrained(target)


def load_streamed(
    folder: str | Path,
    train_layers: TrainLayers,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, LayerFiles]:
    """A model in eval mode whose layers below those to train have shapes and no memory, and the files that they are in.

    Args:
        folder: a directory saved by ``save_pretrained`` as safetensors.
        train_layers: see :func:`l2l.models.prefix.train_only`.
        dtype, device, attn_implementation: as :func:`l2l.load_model` takes them; the dtype as torch has it.

    Raises:
        FileNotFoundError, ValueError: there is no such directory, the model has no list of layers or not so many, or the
            checkpoint's tensors have other names.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    path, device = Path(folder).expanduser(), device or "cpu"
    files = LayerFiles(path)
    config = AutoConfig.from_pretrained(path)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with init_empty_weights(include_buffers=False):
        model = auto_class(kind_of_config(config)).from_config(config, dtype=dtype, **options)
    layers = layer_list(model)
    if layers is None:
        raise ValueError(f"{type(model).__name__} has no list of layers to stream: leave stream_layers off")
    owners = [(module, prefix) for prefix, module in model.named_modules()]
    lower = list(layers)[: min(chosen_layers(train_layers, len(layers)))]
    place = {id(module): index for index, layer in enumerate(lower) for module in layer.modules()}
    files.lower = [[] for _ in lower]
    for owner, prefix in owners:
        for attribute in owner._parameters:
            name = f"{prefix}.{attribute}" if prefix else attribute
            if owner._parameters[attribute] is None:
                continue
            if id(owner) in place:
                files.lower[place[id(owner)]].append((owner, attribute, name))
            elif name in files.files:
                files.put(owner, attribute, name, device)
        for attribute, buffer in owner._buffers.items():
            owner._buffers[attribute] = None if buffer is None else buffer.to(device)
    model.tie_weights()
    below = {name for entries in files.lower for *_, name in entries}
    absent = below - files.files.keys() | {name for name, p in model.named_parameters() if p.is_meta and name not in below}
    if absent:
        raise ValueError(
            f"stream_layers reads tensors by the model's names, and the checkpoint in {str(folder)!r} has no {min(absent)!r}: "
            "leave stream_layers off, or save the model anew with save_pretrained"
        )
    return model.eval(), files
