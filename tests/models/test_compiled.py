"""The compiled decoder: the same numbers, and weights that are changed behind its back."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import nn

from l2l.models.batching import Grouping
from l2l.models.heads import compile_decoder, token_logprobs, uncompiled
from l2l.models.shapes import tiny_random
from l2l.tasks.encode import Batch, Encoded, EncodedOption, collate


def batch_of(*lengths: int) -> Batch:
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = [tuple(torch.randint(3, 128, (length,), generator=generator).tolist()) for length in lengths]
    return collate([Encoded((EncodedOption(row, 2),), (0,)) for row in rows], "classification", 0)


@pytest.mark.slow
@torch.inference_mode()
def test_a_compiled_decoder_gives_the_same_numbers_and_follows_weights_written_through_their_address():
    from torch._dynamo.testing import (
        CompileCounterWithBackend,
    )  # counts graphs; part of torch, used by nothing but tests

    plain, compiled = tiny_random("llama", initializer_range=0.3), tiny_random("llama", initializer_range=0.3)
    counter = CompileCounterWithBackend("inductor")
    with pytest.MonkeyPatch.context() as patch:
        compile_method = nn.Module.compile
        patch.setattr(nn.Module, "compile", lambda self, **options: compile_method(self, backend=counter, **options))
        compile_decoder(compiled)
    batches = [batch_of(9, 30, 14), batch_of(5, 12, 7, 8), batch_of(40, 11), batch_of(21, 22, 50, 9, 3)]
    for batch in batches:
        for parts in ((), Grouping(2).split(batch)):
            torch.testing.assert_close(token_logprobs(compiled, batch, parts), token_logprobs(plain, batch), atol=1e-5, rtol=0)
    frames = counter.frame_count
    for model in (plain, compiled):
        write_through_its_address(model.get_parameter("model.layers.0.mlp.down_proj.weight"))
    changed = [(token_logprobs(compiled, batch), token_logprobs(plain, batch)) for batch in batches]
    for ours, expected in changed:
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert counter.frame_count == frames
    assert frames <= 8


def write_through_its_address(weight: torch.Tensor) -> None:
    """Double it without telling torch."""
    values = (ctypes.c_float * weight.numel()).from_address(weight.data_ptr())
    before = weight.detach().clone()
    for index, value in enumerate(before.flatten().tolist()):
        values[index] = 2 * value
    assert torch.equal(weight, 2 * before)


def test_without_a_compiler_or_a_decoder_the_error_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler and 'no-such-compiler' is not there"):
        compile_decoder(tiny_random("llama"))
    with pytest.raises(ValueError, match="Linear names no decoder apart from its head; leave compile off"):
        compile_decoder(nn.Linear(2, 2))


def test_what_is_asked_for_uncompiled_runs_uncompiled():
    model = tiny_random("llama")
    calls: list[int] = []

    def backend(graph, _):
        calls.append(len(graph.graph.nodes))
        return graph

    model.get_decoder().compile(backend=backend)
    with torch.no_grad(), uncompiled(model):
        token_logprobs(model, batch_of(9, 14))
    assert not calls
    with torch.no_grad():
        token_logprobs(model, batch_of(9, 14))
    assert calls
