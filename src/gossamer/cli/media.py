"""Images and folders of frames beside a prompt, for models whose processor takes them. Imports transformers late."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gossamer.cli.common import BadInput, first_line

__all__ = ["Media", "load_processor", "prepare", "read_media"]

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Media:
    """What a prompt shows: images, and the frames of videos, each as PIL has them."""

    images: Sequence[Any]
    videos: Sequence[Sequence[Any]]

    def __bool__(self) -> bool:
        return bool(self.images or self.videos)


def read_media(images: Sequence[Path], videos: Sequence[Path]) -> Media:
    """Images by file, and videos by a folder of frames, which come by the numbers in their names.

    Raises:
        BadInput: no such file or folder, no frames in it, what is no picture, or no Pillow.
    """
    return Media([_picture(path) for path in images], [_frames(path) for path in videos])


def _frames(folder: Path) -> list[Any]:
    if not folder.is_dir():
        raise BadInput(f"--video takes a folder of frames ({', '.join(ENDINGS)}), got {folder}; cut the video up first")
    paths = [path for path in folder.iterdir() if path.suffix.lower() in ENDINGS]
    if not paths:
        raise BadInput(f"--video {folder}: there are no frames in it ({', '.join(ENDINGS)})")
    return [_picture(path) for path in sorted(paths, key=_by_number)]


def _by_number(path: Path) -> list[Any]:
    """``frame_9`` before ``frame_10``."""
    parts = re.split("([0-9]+)", path.name)  # every second one is a number
    return [(1, int(part), "") if n % 2 else (0, 0, part) for n, part in enumerate(parts)]


def _picture(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise BadInput("--image and --video need Pillow: pip install pillow") from error
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # of a damaged PNG
        raise BadInput(f"{path} is no picture that Pillow can read: {first_line(error)}") from error


def load_processor(path: Path) -> Any:
    """The processor of a model's folder, which makes tensors of text and pictures.

    Raises:
        BadInput: the model has none that takes pictures.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers do
        raise BadInput(f"{path} has no processor that transformers can load: {first_line(error)}") from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise BadInput(f"{path} reads no pictures: leave --image and --video out, or name a model that does")
    return processor


def prepare(processor: Any, text: str, media: Media, chat: bool) -> dict[str, Tensor]:
    """What the model is called with: ``input_ids [1, S]`` and whatever goes with them.

    Frames go to a processor of videos where there is one, else they are images, one after the other. Where the prompt
    does not say by the processor's own tokens where pictures stand, they stand before the text.

    Raises:
        BadInput: the processor makes nothing of it, or has no chat template.
    """
    videos = list(media.videos)
    images = list(media.images)
    if videos and getattr(processor, "video_processor", None) is None:
        images += [frame for video in videos for frame in video]
        count, videos = sum(map(len, videos)), []
        print(f"note: this model's processor takes no videos; {count} frames are read as images", file=sys.stderr)
    try:
        shown = _with_places(processor, text, len(images), len(videos), chat)
        given: dict[str, Any] = {"images": images} if images else {}
        given |= {"videos": videos} if videos else {}
        begin = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
        if begin and shown.startswith(begin):  # a template says it already
            given["add_special_tokens"] = False
        made = processor(text=[shown], return_tensors="pt", **given)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"this model's processor does not take these pictures: {first_line(error)}") from error
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def _with_places(processor: Any, text: str, images: int, videos: int, chat: bool) -> str:
    """The text with the tokens that stand for pictures, in a chat template where it was asked for."""
    if chat:
        if not getattr(processor, "chat_template", None):
            raise BadInput("--chat: this model's processor has no chat template; leave --chat out")
        parts = [{"type": "image"}] * images + [{"type": "video"}] * videos
        turns = [{"role": "user", "content": [*parts, {"type": "text", "text": text.rstrip("\n")}]}]
        return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    for name, count in (("video_token", videos), ("image_token", images)):
        token = getattr(processor, name, None)
        if not count:
            continue
        if not isinstance(token, str):
            raise BadInput(f"this model's processor names no {name}: use --chat, whose template says where pictures go")
        named = text.count(token)
        if named not in (0, count):
            raise BadInput(f"the prompt has {token} {named} times, but {count} pictures or videos were given")
        text = text if named else token * count + text
    return text
