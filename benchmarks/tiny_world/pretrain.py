"""Pretrain the embedded model ``l2l/tiny`` on texts of the tiny world. Run from the repository:

python benchmarks/tiny_world/pretrain.py --help
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from corpus import documents
from tokenizer import BOS, EOS, PAD, build_tokenizer, split_words
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Batch: TypeAlias = list[list[int]]
"""Rows of token ids, right-padded to one length."""

_DOCUMENTS = 8192
"""Documents per chunk: sorted by length inside it, so that batches hold little padding."""

_SPELLED = 0.002
"""Share of words spelt letter by letter, so that the tokens for unknown words are trained."""

VALIDATION_SEED = 10**6
"""Seed of the corpus that measures the validation loss; a pretraining seed lies below it."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of a pretraining run."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/tiny_world/pretrain.py", description="Pretrain l2l/tiny on the tiny world."
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write; an earlier model there is replaced")
    parser.add_argument("--steps", type=int, default=None, help="number of AdamW steps (same weights for a seed on CPU)")
    parser.add_argument("--minutes", type=float, default=None, help="train for this long instead of a number of steps")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step, padding included (default: 2048)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default: 3e-3)")
    parser.add_argument("--hidden", type=int, default=128, help="width of the model (default: 128)")
    parser.add_argument("--layers", type=int, default=4, help="number of decoder layers (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and text (default: 0)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--workers", type=int, default=0, help="processes that generate text (default: 0, this one)")
    options = parser.parse_args(argv)
    if (options.steps is None) == (options.minutes is None):
        parser.error("give exactly one of --steps and --minutes")
    if not 0 <= options.seed < VALIDATION_SEED:
        parser.error(f"--seed is {options.seed}; it must be at least 0 and below {VALIDATION_SEED}")
    if options.out.exists() and not (options.out / "pretraining.json").exists():
        parser.error(f"--out {options.out} exists and holds no pretrained model; name a new directory")
    return options


def encode(rng: random.Random, document: str, vocabulary: Mapping[str, int]) -> list[int]:
    """Token ids of a document, with begin and end marks."""
    ids = [vocabulary[BOS]]
    for word in split_words(document):
        if rng.random() < _SPELLED and word.isalpha():
            ids += [vocabulary[word[0]], *(vocabulary[f"##{letter}"] for letter in word[1:])]
        else:
            ids.append(vocabulary[word])
    return [*ids, vocabulary[EOS]]


def chunk(seed: int, index: int, vocabulary: Mapping[str, int], tokens: int) -> list[Batch]:
    """The ``index``-th chunk of the corpus, in shuffled batches of at most ``tokens`` ids each, padding included."""
    rng = random.Random(f"l2l chunk {seed} {index}")
    rows = sorted((encode(rng, text, vocabulary) for text in islice(documents(seed, str(index)), _DOCUMENTS)), key=len)
    batches: list[Batch] = []
    while rows:
        longest = len(rows[min(len(rows), max(1, tokens // len(rows[0]))) - 1])
        taken = max(1, tokens // longest)
        batches.append(_pad(rows[:taken], vocabulary[PAD]))
        rows = rows[taken:]
    rng.shuffle(batches)
    return batches


def _pad(rows: list[list[int]], pad: int) -> Batch:
    width = max(map(len, rows))
    return [row + [pad] * (width - len(row)) for row in rows]


def stream(seed: int, vocabulary: Mapping[str, int], tokens: int, workers: int) -> Iterator[Batch]:
    """Batches without end, in an order that does not depend on ``workers`` (0: made in this process)."""
    if not workers:
        for index in count():
            yield from chunk(seed, index, vocabulary, tokens)
    with ProcessPoolExecutor(workers) as pool:
        ahead = [pool.submit(chunk, seed, index, vocabulary, tokens) for index in range(2 * workers)]
        for index in count(len(ahead)):
            ready = ahead.pop(0).result()
            ahead.append(pool.submit(chunk, seed, index, vocabulary, tokens))
            yield from ready


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> LlamaForCausalLM:
    """A fresh Llama with tied embeddings and heads of 32 dimensions, in float32."""
    ids = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
    )
    return LlamaForCausalLM(config).float()


def batch_loss(model: Any, rows: Batch, pad: int, device: str) -> torch.Tensor:
    """Mean cross entropy (nats per token) of a batch, padding left out."""
    ids = torch.tensor(rows, device=device)
    logits = model(input_ids=ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad)


@torch.no_grad()
def validation_loss(model: Any, tokenizer: PreTrainedTokenizerFast, device: str, batches: int = 40) -> float:
    """Mean cross entropy (nats per token) on text of a seed that pretraining never uses."""
    rows = chunk(VALIDATION_SEED, 0, tokenizer.get_vocab(), 2048)[:batches]
    model.eval()
    losses = [batch_loss(model, row, tokenizer.get_vocab()[PAD], device).item() for row in rows]
    model.train()
    return sum(losses) / len(losses)


def _progress(options: argparse.Namespace, step: int, start: float) -> float:
    return step / options.steps if options.steps else (time.perf_counter() - start) / (60 * options.minutes)


def _rate(peak: float, step: int, progress: float) -> float:
    """Learning rate: 100 steps of warm-up, then a cosine to zero."""
    return peak * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def train(model: Any, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> dict[str, float]:
    """Trains in place; steps done, tokens seen, seconds taken and the mean loss of the last 100 steps."""
    optimizer, start, step, tokens = _optimizer(model), time.perf_counter(), 0, 0
    pad, recent = tokenizer.get_vocab()[PAD], []
    for rows in stream(options.seed, tokenizer.get_vocab(), options.tokens, options.workers):
        progress = _progress(options, step, start)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = _rate(options.lr, step, progress)
        loss = batch_loss(model, rows, pad, options.device)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, tokens = step + 1, tokens + len(rows) * len(rows[0])
        recent = [*recent[-99:], loss.detach()]
        if step % 500 == 0:
            print(
                f"step {step}  loss {torch.stack(recent).mean().item():.4f}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    train_loss = torch.stack(recent).mean().item()
    return {"steps": step, "tokens": tokens, "seconds": round(time.perf_counter() - start, 1), "train_loss": train_loss}


def save(model: Any, tokenizer: PreTrainedTokenizerFast, facts: dict[str, Any], out: Path) -> None:
    """Model, tokenizer and ``pretraining.json``, written beside ``out`` and then renamed; a card there is kept."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.cpu().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "model.safetensors").chmod(0o644)
    (partial / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n")
    if (out / "README.md").exists():
        shutil.copy(out / "README.md", partial)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)


def main(argv: list[str] | None = None) -> None:
    """Pretrain, measure, save."""
    options = parse(argv)
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, options.hidden, options.layers).to(options.device)
    print(f"{sum(weight.numel() for weight in model.parameters())} parameters, {len(tokenizer)} tokens", flush=True)
    facts: dict[str, Any] = train(model, tokenizer, options)
    facts["validation_loss"] = validation_loss(model, tokenizer, options.device)
    facts |= {"tokens_per_step": options.tokens, "lr": options.lr, "seed": options.seed}
    facts["parameters"] = sum(weight.numel() for weight in model.parameters())
    save(model, tokenizer, facts, options.out)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
