"""``gossamer eval-masked``: lines, going on, tables, a report, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from gossamer.cli import main
from gossamer.evaluate.summary import read_results


@pytest.fixture(scope="module")
def masked_model(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the tokenizer of the tiny Llama."""
    from transformers import AutoTokenizer, EuroBertConfig, EuroBertForMaskedLM

    path = tmp_path_factory.mktemp("masked") / "tiny"
    torch.manual_seed(0)
    config = EuroBertConfig(
        vocab_size=103, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, pad_token_id=0, mask_token_id=102,
    )  # fmt: skip
    EuroBertForMaskedLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(path)
    return path


@pytest.fixture
def run(masked_model: Path, text: Path, tmp_path: Path) -> Callable[..., int]:
    options = ["--methods", "sparsed(block=16,share=0.2)", "--lengths", "64", "--steps", "4", "--limit", "1"]
    options += ["--text", str(text), "--dtype", "float32", "--out", str(tmp_path / "masked.jsonl")]
    return lambda *more: main(["eval-masked", str(masked_model), *options, *more])


def test_it_writes_lines_and_goes_on(run: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    more = ["--beside", "window,fresh", "--span", "0.5", "--overlap", "sparsed(block=16,share=0.2)"]
    assert run(*more) == 0
    records = read_results(tmp_path / "masked.jsonl")
    kinds = [record["kind"] for record in records]
    assert kinds == ["run", *["fill"] * 8, "overlap"]
    assert len({record["method"] for record in records if record["kind"] == "fill"}) == 8
    assert records[0]["model"]["architecture"] == "EuroBertForMaskedLM"
    assert "blocks in common" in capsys.readouterr().out
    assert run(*more, "--json") == 0
    assert len(read_results(tmp_path / "masked.jsonl")) == len(records)
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["rows"]) == 8
    assert len(shown["overlaps"]) == 1
    assert run("--seeds", "2") == 0
    assert len(read_results(tmp_path / "masked.jsonl")) == len(records) + 3  # and a line that says how
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "masked.jsonl"), "--out", str(page)]) == 0
    assert "What is filled in under masks" in page.read_text()
    assert (tmp_path / "page_csv" / "overlaps.csv").is_file()


def test_texts_with_fewer_masks_than_steps_and_stretches_are_filled_in(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("--share", "0.1", "--steps", "8", "--block", "8", "--limit", "2") == 0
    lines = [record for record in read_results(tmp_path / "masked.jsonl") if record["kind"] == "fill"]
    assert [line["filled"] for line in lines] == [2] * 4
    assert all(line["kl"] is None or line["kl"] >= 0 for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "1"], "--steps must be numbers from 2 to 100000, got 1"),
        (["--steps", "4,8"], "--steps must be one number, or one for each of 1 lengths"),
        (["--limit", "0"], "--limit must be 1 to 10000, got 0"),
        (["--methods", "nothing"], "unknown method 'nothing'"),
        (["--beside", "nearest"], "choice must be one of isolated"),
        (["--overlap", "dense"], "--overlap takes settings of sparsed, such as sparsed(share=0.3), got dense"),
        (["--methods", "dense", "--beside", "window"], "--beside varies sparsed, and --methods has none"),
        (["--methods", "dense", "--span", "0.5"], "--span varies sparsed, and --methods has none"),
        (["--span", "1"], "--span must be a share of the steps between 0 and 1, got 1"),
        (["--block", "6"], "4 steps cannot be shared evenly by 3 stretches of 6 tokens, as the last quarter of 64 has"),
        (["--share", "0"], "--share must be above 0 and at most 1, got 0"),
        (["--share", "1.5"], "--share must be above 0 and at most 1, got 1.5"),
        (["--lengths", "2k"], "this model takes 1024 tokens, got a length of 2048"),
        (["--lengths", "700"], "the text has 600 tokens, 700 are needed"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    run: Callable[..., int], capsys: Any, options: list[str], message: str
) -> None:
    assert run(*options) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_another_model_is_refused(model_path: Path, tmp_path: Path, capsys: Any) -> None:
    for folder, message in ((model_path, "cannot be loaded as a masked language model"), (tmp_path, "no config.json")):
        assert main(["eval-masked", str(folder), "--out", str(tmp_path / "x.jsonl")]) == 2
        assert message in capsys.readouterr().err
