"""The word-level tokenizer of the embedded model, as a file that ``AutoTokenizer`` loads."""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Iterable
from itertools import islice

from corpus import SHARES, documents
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from l2l.tasks.tiny_world.scenes import LEXICON

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)
_SAMPLE = 100_000
"""Documents whose word counts order the vocabulary."""


def split_words(text: str) -> list[str]:
    """Words and punctuation marks, as the tokenizer cuts them."""
    return re.findall(r"\w+|[^\w\s]", text)


def _spelling() -> Iterable[str]:
    """Letters, digits and punctuation: tokens that spell a word outside the world."""
    yield from string.punctuation
    for mark in string.ascii_lowercase + string.digits:
        yield from (mark, f"##{mark}")


def vocabulary() -> dict[str, int]:
    """Word to id: special tokens, then words from frequent to rare, then the tokens for spelling."""
    counts: Counter[str] = Counter()
    for document in islice(documents(0, "vocabulary"), _SAMPLE):
        counts.update(split_words(document))
    rng = random.Random("l2l rare forms")
    for family, _ in SHARES:
        counts.update(word for _ in range(2000) for word in split_words(family(rng)))
    for group in LEXICON.values():
        counts.update(group)
    frequent = sorted(counts, key=lambda word: (-counts[word], word))
    return {token: index for index, token in enumerate(dict.fromkeys((*SPECIAL, *frequent, *_spelling())))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word of the world; any other word is spelt."""
    words = vocabulary()
    core = Tokenizer(models.WordPiece(vocab=words, unk_token=UNK, max_input_chars_per_word=64))
    core.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, words[BOS])]
    )
    core.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=True), decoders.Replace(" :", ":")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="right",
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
