"""A model larger than its device: the weights of its layers lie in the host's memory, and are on the device while a layer runs.

What lies outside of the layers (embeddings, the last norm, the head) and all buffers stay on the device. While a layer
computes, the weights of the one that was called after it the last time are on their way, so that two layers are on the device
at most. A parameter is the same object all the time: only the memory that it stands for changes.

An optimizer that moves weights is told when a layer has arrived (:attr:`LayerStream.watcher`). It makes the moves that wait
for the layer there, on the device, and what they give is written back while the layer computes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, final
from weakref import ref

import torch

from l2l.models.prefix import layer_list


class Watcher(Protocol):
    """Who moves the layers' weights, and is told where they are."""

    def arrived(self, layer: int, write_back: Callable[[], None]) -> None:
        """The layer's parameters are on the device. What is written into them there is lost unless ``write_back`` is called."""
        ...

    def left(self, layer: int) -> None:
        """The layer's parameters are in the host's memory again."""
        ...

    def settle(self) -> None:
        """Write into the host's memory what waits for layers to arrive."""
        ...


@dataclass(frozen=True)
class _Loaded:
    """Copies of a layer's parameters on the device."""

    copies: list[torch.Tensor]
    seen: list[tuple[int, int]]
    """Version and place of each parameter when it was copied: whoever has written it since has made the copy useless."""
    event: Any = None
    """CUDA: when the copies are complete."""


@final
class LayerStream:
    """The layers of an offloaded model; made by :func:`offload_layers`.

    Args:
        layers: modules that share no parameter.
        device: where they compute. The CPU serves to test: a copy is then other memory of the host.
    """

    def __init__(self, layers: list[torch.nn.Module], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.resident_bytes = self.peak_bytes = 0
        """Bytes of copies on the device, now and at most."""
        self.watcher: Callable[[], Watcher | None] = lambda: None
        self._loaded: dict[int, _Loaded] = {}
        self._after: dict[int, int] = {}
        self._last: int | None = None
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None
        """CUDA: of copies to the device, and of what is written back."""

    def watch(self, watcher: Watcher) -> None:
        """Tell this one from now on, and no other; it is not kept alive."""
        if (before := self.watcher()) is not None and before is not watcher:
            before.settle()
        self.watcher = ref(watcher)

    def load(self, index: int) -> None:
        """Begin to copy a layer to the device, unless it is there."""
        if index in self._loaded:
            return
        parameters = list(self.layers[index].parameters())
        seen = [(p._version, p.data_ptr()) for p in parameters]
        if self._streams is None:
            loaded = _Loaded([p.data.to(self.device, copy=True) for p in parameters], seen)
        else:
            fetch, back = self._streams
            with torch.cuda.stream(fetch):
                fetch.wait_stream(back)  # what is being written back is written before it is read
                loaded = _Loaded([p.data.to(self.device, non_blocking=True) for p in parameters], seen, torch.cuda.Event())
                loaded.event.record()
        self._loaded[index] = loaded
        self.resident_bytes += _bytes(loaded)
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)

    def drop(self, index: int) -> None:
        """Let go of a layer's copies."""
        self.resident_bytes -= _bytes(self._loaded.pop(index))

    def _arrive(self, index: int) -> list[torch.Tensor]:
        """The copies of a layer, complete and of its present values."""
        for other in [i for i in self._loaded if i != index]:  # it was expected, and another one is called
            self.drop(other)
        loaded = self._loaded.get(index)
        if loaded is not None and loaded.seen != [(p._version, p.data_ptr()) for p in self.layers[index].parameters()]:
            self.drop(index)
        self.load(index)
        loaded = self._loaded[index]
        if loaded.event is not None:
            torch.cuda.current_stream(self.device).wait_event(loaded.event)
            for copy in loaded.copies:
                copy.record_stream(torch.cuda.current_stream(self.device))
        return loaded.copies

    def _write_back(self, homes: list[torch.Tensor], copies: list[torch.Tensor]) -> None:
        if self._streams is None:
            for home, copy in zip(homes, copies, strict=True):
                home.copy_(copy)
            return
        _, back = self._streams
        back.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(back):
            for home, copy in zip(homes, copies, strict=True):
                home.copy_(copy, non_blocking=True)
                copy.record_stream(back)

    def settle(self) -> None:
        """Before the host's memory is read or written otherwise: all is written back, and no copy is of former values."""
        if self._streams is not None:
            self._streams[1].synchronize()
        for index in list(self._loaded):
            self.drop(index)

    @contextmanager
    def resident(self, index: int) -> Iterator[None]:
        """While it is active, a layer's parameters are on the device."""
        parameters, watcher = list(self.layers[index].parameters()), self.watcher()
        with _plainly():
            homes, copies = [p.data for p in parameters], self._arrive(index)
        try:
            with _plainly():
                for parameter, copy in zip(parameters, copies, strict=True):
                    parameter.data = copy
                if watcher is not None:
                    watcher.arrived(index, partial(self._write_back, homes, copies))
                if self._last is not None:
                    self._after[self._last] = index
                self._last = index
                following = self._after.get(index, (index + 1) % len(self.layers))
                if following != index:
                    self.load(following)
            yield
        finally:
            with _plainly():
                for parameter, home in zip(parameters, homes, strict=True):
                    parameter.data = home
                if watcher is not None:
                    watcher.left(index)
                self.drop(index)

    def __reduce__(self) -> Any:
        raise TypeError(
            "an offloaded model is not copied or pickled: save it with save_pretrained, and load the copy from there"
        )


@contextmanager
def _plainly() -> Iterator[None]:
    """Inside it, parameters are what is stored, whoever watches or replaces what a model reads; tensors are ordinary ones."""
    with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
        yield


def _bytes(loaded: _Loaded) -> int:
    return sum(copy.nbytes for copy in loaded.copies)


@final
class StreamedForward:
    """The forward of an offloaded layer."""

    def __init__(self, stream: LayerStream, index: int, forward: Callable[..., Any]) -> None:
        self.stream = stream
        self._index, self._forward = index, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.stream.layers[self._index]
        if torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters()):
            raise RuntimeError(
                "offloaded layers have no backward pass: run the model inside torch.no_grad(), and use a method that takes no "
                "derivatives, as mezo does"
            )
        with self.stream.resident(self._index):
            return self._forward(*args, **kwargs)


def stream_of(model: torch.nn.Module | None) -> LayerStream | None:
    """The stream of an offloaded model, or of one that contains it; None where a model lies where it computes."""
    for module in () if model is None else model.modules():
        if isinstance(forward := module.__dict__.get("forward"), StreamedForward):
            return forward.stream
    return None


def check_offload(device: torch.device | str | None) -> None:
    """Raise ValueError where layers would be offloaded from the host's memory into the host's memory."""
    if device is None or torch.device(device).type == "cpu":
        raise ValueError(
            f"offload=True keeps layers in the host's memory while they do not compute, and device={device!r} has no other: "
            "give --device cuda, or leave offload off"
        )


def offload_layers(model: torch.nn.Module, device: torch.device | str) -> LayerStream:
    """Keep the weights of a model's layers in the host's memory, page-locked for CUDA, and all else on the device.

    Args:
        model: best on the CPU, as it may be larger than the device. It stays the same object; adapters may be added afterwards.
        device: where layers compute. The CPU serves to test.

    Raises:
        ValueError: it has no list of layers, or these share parameters with others or with what lies outside; nothing has
            changed then.
    """
    device, layers = torch.device(device), layer_list(model)
    if layers is None or stream_of(model) is not None:
        what = "no list of layers to offload" if layers is None else "layers that are offloaded already"
        raise ValueError(f"{type(model).__name__} has {what}: leave offload off")
    parts = {id(module) for layer in layers for module in layer.modules()}
    inside = [{id(p): p for p in layer.parameters()} for layer in layers]
    outside = {id(p): p for m in model.modules() if id(m) not in parts for p in m._parameters.values() if p is not None}
    if len({key for own in (*inside, outside) for key in own}) < sum(map(len, (*inside, outside))):
        raise ValueError(f"a layer of {type(model).__name__} shares parameters with other parts: leave offload off")
    with torch.no_grad():
        for parameter in outside.values():
            parameter.data = parameter.data.to(device)
        for parameter in (p for own in inside for p in own.values()):
            home = parameter.data.to("cpu")
            parameter.data = home.pin_memory() if device.type == "cuda" else home
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
    stream = LayerStream(list(layers), device)
    for index, layer in enumerate(layers):
        layer.forward = StreamedForward(stream, index, layer.forward)
    return stream
