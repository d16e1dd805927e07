"""The tokenizer: byte-level BPE whose pieces never cross a line end, with whole tokens for numbers and key words."""

import re

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gossamer.evaluate.words import KEY_WORDS

VOCABULARY = 5120
BOS, EOS, PAD = 0, 1, 2
SPECIAL = ("<bos>", "<eos>", "<pad>")
PIECES = r"\n| ?[0-9]{1,3}| ?\p{L}+| ?[^\s\p{L}0-9]+|[^\S\n]+(?!\S)|[^\S\n]+"
TRAINING_CHARS = 12_000_000


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Learn merges from a strided sample of the texts and add the tokens that the tasks need.

    Every number of one to three digits is one token, with and without a space before it, and so is every key
    word after a
    space: a two-word key and the number after it are then matched token by token, whatever their spelling.
    """
    forced = [f"{n:0{width}d}" for width in (1, 2, 3) for n in range(10**width)]
    forced += ["Ġ" + number for number in forced]
    forced += ["Ġ" + word for word in KEY_WORDS]
    stride = max(1, sum(map(len, texts)) // TRAINING_CHARS)
    sample = [re.sub(r"[0-9]+", "", text) for text in texts[::stride]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _pre_tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL), initial_alphabet=alphabet, show_progress=False, max_token_length=16
    )
    learner.train_from_iterator(sample, trainer)
    import json

    learned = json.loads(learner.to_str())["model"]
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    for token in forced:
        vocabulary.setdefault(token, len(vocabulary))
    merges = []
    for left, right in learned["merges"]:
        if left + right not in vocabulary:
            if len(vocabulary) == VOCABULARY:
                break
            vocabulary[left + right] = len(vocabulary)
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=131072,
    )


def encode_all(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts as one array of uint16 tokens, each ended by <eos>, without <bos>."""
    backend = tokenizer.backend_tokenizer
    parts = []
    for start in range(0, len(texts), 256):
        for encoding in backend.encode_batch(texts[start : start + 256], add_special_tokens=False):
            parts.append(np.array([*encoding.ids, EOS], dtype=np.uint16))
    return np.concatenate(parts)


def boundary_tables(tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per token id: is it a line end, does it end a sentence, does it begin with a space."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    line = np.array([token == "Ċ" for token in tokens])
    sentence = np.array([token[-1] in ".!?" for token in tokens])
    space = np.array([token[0] == "Ġ" for token in tokens])
    return line, sentence, space


def whole_words(tokenizer: PreTrainedTokenizerFast, shortest: int = 4) -> list[str]:
    """Lower-case words of at least `shortest` letters that are one token after a space, in the order of their ids."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    words = [token[1:] for token in tokens if token[0] == "Ġ"]
    return [word for word in words if len(word) >= shortest and re.fullmatch("[a-z]+", word)]


def number_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of the tokens that are digits alone, or digits after a space."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [i for i, token in enumerate(tokens) if token.removeprefix("Ġ").isdigit()]
