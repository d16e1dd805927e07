"""``gossamer run`` with pictures: a tiny random LLaVA and its processor, a folder of frames, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gossamer.cli import generation, main
from gossamer.cli.common import BadInput
from gossamer.cli.media import Media, prepare, read_media

Image = pytest.importorskip("PIL.Image")
pytestmark = [
    pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WORDS = ["<unk>", "<eos>", "<image>", *(f"w{i}" for i in range(61))]
SIDE, PATCH = 64, 8
PER_IMAGE = (SIDE // PATCH) ** 2
SPARSE = ["--method", "mminference", "--min-tokens", "0", "--max-new-tokens", "3"]


@pytest.fixture(scope="module")
def reader_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    path = tmp_path_factory.mktemp("reader")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    special: dict[str, Any] = {"extra_special_tokens": {"image_token": "<image>"}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", **special)
    size = {"height": SIDE, "width": SIDE}
    pictures: Any = CLIPImageProcessorPil
    LlavaProcessor(
        image_processor=pictures(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(path)
    small: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, **small)
    text = LlamaConfig(
        vocab_size=len(WORDS), num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=1, **small
    )
    torch.manual_seed(0)
    kind: Any = LlavaConfig
    config = kind(vision_config=vision, text_config=text, image_token_id=2)
    LlavaForConditionalGeneration(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve frames, whose names do not sort by themselves, and something else."""
    folder = tmp_path_factory.mktemp("frames")
    for number in range(12):
        Image.new("RGB", (40, 30), (20 * number, 90, 0)).save(folder / f"frame_{number}.png")
    (folder / "notes.txt").write_text("no frame")
    return folder


@pytest.fixture
def question(tmp_path: Path) -> Path:
    path = tmp_path / "question.txt"
    path.write_text(" ".join(f"w{i % 50}" for i in range(30)))
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[dict[str, Any], str]:
    assert main(["run", *map(str, argv), "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_a_folder_of_frames_is_read(capsys, reader_path: Path, frames: Path, question: Path) -> None:
    fields = ["--set", 'patterns=[{"method": "a_shape", "sink": 1, "window": 1}]']
    found, err = run(capsys, reader_path, question, "--video", frames, *SPARSE, *fields, "--compare")
    assert found["prompt_tokens"] == 12 * PER_IMAGE + 30
    assert "12 frames are read as images" in err
    assert len(found["tokens"]) == 3
    assert found["density"] < 0.5
    assert found["dense"]["density"] == 1.0
    assert found["dense_because"] == {}


def test_pictures_reach_the_model_and_full_budget_is_dense(
    capsys, monkeypatch, reader_path: Path, frames: Path, question: Path
) -> None:
    seen: list[Any] = []
    found = generation._as_model
    monkeypatch.setattr(generation, "_as_model", lambda given, model: seen.append(given) or found(given, model))
    given = ["--image", frames / "frame_0.png", "--image", frames / "frame_11.png"]
    shown, _ = run(capsys, reader_path, question, *given, "--method", "dense", "--max-new-tokens", 3)
    full, _ = run(capsys, reader_path, question, *given, *SPARSE)
    assert all(given["pixel_values"].shape == (2, 3, SIDE, SIDE) for given in seen)
    assert len(seen) == 2
    assert shown["prompt_tokens"] == full["prompt_tokens"] == 2 * PER_IMAGE + 30
    assert full["tokens"] == shown["tokens"]


def test_text_alone_is_read_too(capsys, reader_path: Path, question: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    dense, _ = run(capsys, reader_path, question, "--method", "dense", "--max-new-tokens", 3)
    full, _ = run(capsys, reader_path, question, *SPARSE, "--compare")
    model: Any = LlavaForConditionalGeneration.from_pretrained(reader_path)
    prompt = torch.tensor([[WORDS.index(word) for word in question.read_text().split()]])
    with torch.no_grad():
        expected = model.generate(input_ids=prompt, max_new_tokens=3, do_sample=False)[0, 30:].tolist()
    assert dense["prompt_tokens"] == 30
    assert dense["tokens"] == full["tokens"] == expected


def test_frames_come_by_their_numbers(frames: Path) -> None:
    (video,) = read_media([], [frames]).videos
    assert [frame.getpixel((0, 0))[0] for frame in video] == [20 * number for number in range(12)]


def test_what_cannot_be_shown_is_one_line(
    refused: Callable[..., str], model_path: Path, reader_path: Path, frames: Path, question: Path, tmp_path: Path
) -> None:
    shown = ["run", reader_path, question]
    picture = frames / "frame_0.png"
    assert "takes a folder of frames" in refused(*shown, "--video", picture)
    assert "there are no frames in it" in refused(*shown, "--video", tmp_path)
    assert "is no picture that Pillow can read" in refused(*shown, "--image", frames / "notes.txt")
    assert "is no picture that Pillow can read" in refused(*shown, "--image", frames / "missing.png")
    assert "leave --image and --video out" in refused("run", model_path, question, "--image", picture)
    assert "--filter takes prompts of text alone" in refused(*shown, "--image", picture, "--filter", "1:9")
    assert "has no chat template" in refused(*shown, "--image", picture, "--chat")
    question.write_text("w1 <image> w2 <image>")
    assert "has <image> 2 times, but 1" in refused(*shown, "--image", picture)


def test_a_processor_of_videos_gets_them_whole() -> None:
    seen: dict[str, Any] = {}

    def call(**given: Any) -> dict[str, Any]:
        seen.update(given)
        return {"input_ids": torch.zeros(1, 3), "names": ["left out"]}

    class Processor(SimpleNamespace):
        def __call__(self, **given: Any) -> dict[str, Any]:
            return call(**given)

        def apply_chat_template(self, turns: Any, **given: Any) -> str:
            return "+".join(part["type"] for part in turns[0]["content"])

    processor = Processor(image_token="<i>", video_token="<v>", video_processor=object(), chat_template="yes")
    media = Media(["one"], [["a", "b"]])
    assert set(prepare(processor, "text", media, False)) == {"input_ids"}
    assert seen == {"text": ["<i><v>text"], "images": ["one"], "videos": [["a", "b"]], "return_tensors": "pt"}
    prepare(processor, "text\n", media, True)
    assert seen["text"] == ["image+video+text"]
    processor.image_token = None
    with pytest.raises(BadInput, match="names no image_token: use --chat"):
        prepare(processor, "text", media, False)
