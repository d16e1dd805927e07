"""A tiny random Llama with a word tokenizer, saved as transformers saves a model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from notes import without_notes

from gossamer import cli

WORDS = [f"w{i}" for i in range(100)]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 words, so 300 tokens."""
    path = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    path.write_text(" ".join(WORDS[i * i % 100] for i in range(300)))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """600 words to train on."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i * i % 97}" for i in range(600)))
    return path


@pytest.fixture
def one_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the parser of the command line once: a hundred commands take no longer than they need."""
    parser = cli.make_parser()
    monkeypatch.setattr(cli, "make_parser", lambda: parser)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused; returns its one line on standard error."""

    def run(*argv: object) -> str:
        code = cli.main(list(map(str, argv)))
        captured = capsys.readouterr()
        assert (code, captured.out) == (2, ""), captured.err
        err = without_notes(captured.err)
        assert err.startswith("gossamer: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        return err

    return run
