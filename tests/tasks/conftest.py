"""Tokenizers and data that the tests of tasks share."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from l2l.models.load import load_model, load_tokenizer

torch.set_num_threads(1)

REPO = Path(__file__).parents[2]
sys.path += [str(REPO / "benchmarks"), str(REPO / "benchmarks" / "tiny_world")]  # scripts that tests import
CORPUS = [
    "the film was great and the story was good . It was great",
    "a dull film . It was terrible",
    "Question: who led the band? Answer: Yes\nNo\nMaybe\n",
]


def _build_tokenizer(bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer that may add a token before and after each text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=380, special_tokens=["<s>", "</s>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    template = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return _build_tokenizer


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = Path(os.environ.get("L2L_SHARED", REPO.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set L2L_SHARED)")
    return folder


@pytest.fixture(scope="session")
def stories(shared: Path):
    """A small trained model and its tokenizer."""
    folder = shared / "models" / "stories260K"
    return load_model(folder), load_tokenizer(folder)


@pytest.fixture(scope="session")
def todays_seed() -> int:
    """Draws the rows of a large set that the default run takes: other ones every day."""
    return datetime.date.today().toordinal()
