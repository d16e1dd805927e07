"""Cards: their figures are those of their definitions, and both forms say them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from gossamer.compressed.cards import Card, card  # noqa: E402
from gossamer.compressed.measures import Measures, Size, Time  # noqa: E402
from gossamer.compressed.model import compress  # noqa: E402
from gossamer.evaluate.haystack import Haystack  # noqa: E402
from gossamer.evaluate.tasks import create  # noqa: E402

TEXT = Haystack("some_text|x.md", " ".join(f"w{i * i % 50}" for i in range(400)))


class Words:
    """A word is a token; nothing stands in front."""

    pad_token_id, eos_token_id, chat_template = 0, None, None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [self._id(word) for word in text.split()]}

    @staticmethod
    def _id(word: str) -> int:
        return int(word[1:]) if word[1:].isdecimal() and word[0] == "w" else 50 + sum(map(ord, word)) % 10

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(f"w{token}" for token in tokens)


def tiny(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    return model


def compressed_of(original: Any, recipe: Any = "sparsegpt") -> Any:
    samples = [torch.randint(60, (2, 24), generator=torch.Generator().manual_seed(1))]
    return compress(copy.deepcopy(original), recipe, samples)


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any, Card]:
    original = tiny()
    model = compressed_of(original)
    tasks = (create("passkey"), create("needle_single", haystack="noise"))
    measures = Measures(TEXT, 3, 40, tasks, 2, 150, (16, 32), 2)
    told: list[str] = []
    more: dict[str, Any] = {"name": "tiny *", "made": {"calibrated on": ["a|b.txt"]}, "progress": told.append}
    found = card(original, model, Words(), measures, **more)
    assert told[0] == "predictions: window 1 of 3"
    assert told[-1] == "times: 32 tokens, 2 rounds"
    return original, model, found


@torch.no_grad()
def test_predictions_are_those_of_whole_logits(made: tuple[Any, Any, Card]) -> None:
    original, model, found = made
    tokens = Words()(TEXT.text)["input_ids"]
    nats: list[list[float]] = [[], []]
    kl, same = [], []
    for start in (0, 180, 360):  # three windows at even distances
        ids = torch.tensor([tokens[start : start + 40]])
        before, after = (one(input_ids=ids).logits[0].double().log_softmax(-1) for one in (original, model))
        for own, logs in zip(nats, (before, after), strict=True):
            own += (-logs[:-1].gather(1, ids[0, 1:, None])[:, 0]).tolist()
        kl.append(float((before.exp() * (before - after)).sum(-1).mean()))
        same.append(float((before.argmax(-1) == after.argmax(-1)).double().mean()))
    predicted = found.predictions
    assert (predicted.text, predicted.windows, predicted.tokens) == ("some_text|x.md", 3, 117)
    means = [sum(own) / len(own) for own in nats]
    assert predicted.nats == pytest.approx(means, rel=1e-4)
    assert predicted.perplexity == pytest.approx([math.exp(mean) for mean in means], rel=1e-3)
    assert predicted.more[0] == pytest.approx(means[1] - means[0], rel=1e-3)
    assert predicted.kl[0] == pytest.approx(sum(kl) / 3, rel=1e-4)
    assert predicted.agreement[0] == pytest.approx(sum(same) / 3)
    low, high = predicted.kl[1] or (0.0, 0.0)
    assert min(kl) * 0.999 <= low <= predicted.kl[0] <= high <= max(kl) * 1.001
    assert predicted.kl[0] > 0.01  # or all of this is of zeros


@pytest.mark.parametrize(
    ("recipe", "dtype", "per_layer"),
    [
        # A bit for each weight, half of the weights, an int64 for each row and one more.
        ("magnitude", torch.float32, lambda out, inner: out * -(-inner // 8) + 4 * (out * inner // 2) + 8 * (out + 1)),
        ("magnitude", torch.bfloat16, lambda out, inner: out * -(-inner // 8) + out * inner + 8 * (out + 1)),
        ("int8", torch.bfloat16, lambda out, inner: out * inner + 4 * out + 4),
        ("sign_and_scale", torch.bfloat16, lambda out, inner: 2 * out * inner),
    ],
)
def test_bytes_are_what_the_layers_store(recipe: str, dtype: torch.dtype, per_layer: Any) -> None:
    from gossamer.compressed.measures import size

    original = tiny()
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)] * 2
    weights = sum(out * inner for out, inner in shapes)
    width = torch.empty(0, dtype=dtype).element_size()
    found = size(original, compressed_of(original, recipe).to(dtype))
    assert (found.layers, found.weights) == (14, weights)
    assert found.linear == (width * weights, sum(per_layer(*shape) for shape in shapes))
    assert found.bits == (8 * width, 8 * found.linear[1] / weights)
    rest = 60 * 32 + 2 * (32 + 16 + 16 + 2 * 32) + 32  # embeddings, biases, norms; the head is the embeddings'
    assert found.whole == (width * (weights + rest), found.linear[1] + width * rest)


def test_times_take_turns_and_are_beside_the_faster_original() -> None:
    time = Time(
        512, {"original, float32": [4.0, 3.0, 9.0], "original, bfloat16": [2.0, 8.0, 8.0], "compressed": [1, 2, 3]}
    )
    assert time.median("original, float32") == 4.0
    assert time.beside == "original, float32"
    assert time.speedup == 3.0  # of 4, 1.5 and 3


def test_an_original_in_another_dtype_is_timed_in_both() -> None:
    original = tiny()
    measures = Measures(TEXT, 1, 16, lengths=(16,), rounds=2)
    found = card(original, compressed_of(original, "int8").to(torch.bfloat16), Words(), measures)
    assert found.dtypes == ("float32", "bfloat16")
    (row,) = found.times
    assert {name: len(seconds) for name, seconds in row.seconds.items()} == {
        "original, float32": 2,
        "original, bfloat16": 2,
        "compressed": 2,
    }
    assert original.dtype == torch.float32
    assert found.predictions.kl[1] is None  # one window has no interval


def test_a_card_as_json(made: tuple[Any, Any, Card]) -> None:
    _, _, found = made
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["recipe"] == {"recipe": "sparsegpt", "pattern": "0.5", "damp": 0.01, "block": 128, "bits": None}
    assert data["predictions"]["perplexity"] == pytest.approx(found.predictions.perplexity)
    assert [task["task"] for task in data["tasks"]] == ["passkey", "needle_single(haystack=noise)"]
    assert [time["length"] for time in data["times"]] == [16, 32]
    assert data["times"][0]["medians"].keys() == {"original, float32", "compressed"}
    assert data["size"]["bits"][1] == pytest.approx(8 * data["size"]["linear"][1] / data["size"]["weights"])
    assert data["machine"]["torch"] == torch.__version__


def test_a_card_as_a_page(made: tuple[Any, Any, Card]) -> None:
    _, _, found = made
    page = found.to_markdown()
    assert page.startswith(
        "---\nlibrary_name: transformers\ntags:\n- gossamer\n- sparsegpt\n---\n\n# tiny \\*, compressed\n"
    )
    assert "`sparsegpt` (`pattern=0.5`, `damp=0.01`, `block=128`)" in page
    kl, interval = found.predictions.kl
    assert interval is not None
    shown = f"| KL divergence from the original, nats |  | {kl:.3g} [{interval[0]:.3g}, {interval[1]:.3g}] |"
    assert shown in page
    assert "117 tokens of some\\_text\\|x.md, 3 windows" in page
    assert "right answers, passkey, 2 prompts of 150 tokens" in page
    assert "seldom right" in page  # a random model answers nothing
    assert "a\\|b.txt" in page
    for line in page.splitlines():
        cells = line.replace("\\|", "")
        if cells.startswith("|"):
            assert cells.endswith("|")
            width = cells.count("|")
            assert width in (3, 4, 5), line
    assert "from_pretrained" in page


def test_what_has_no_figure_has_no_row() -> None:
    original = tiny()
    page = card(original, compressed_of(original), Words(), Measures(TEXT, 2, 16)).to_markdown()
    assert "## Time" not in page
    assert "right answers" not in page
    assert "files of weights" not in page


def test_losses_beyond_all_numbers_are_none_in_json(made: tuple[Any, Any, Card]) -> None:
    import dataclasses

    _, _, found = made
    predicted = dataclasses.replace(found.predictions, nats=(1.0, 800.0))
    changed = dataclasses.replace(found, predictions=predicted)
    assert changed.to_dict()["predictions"]["perplexity"] == [pytest.approx(math.e), None]
    assert "| 2.718 | inf |" in changed.to_markdown()


def test_models_that_do_not_belong_together_are_refused() -> None:
    original = tiny()
    config = copy.deepcopy(original.config)
    config.intermediate_size = 64
    other = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=r"no layer like model\.layers\.0\.mlp\.gate_proj"):
        card(original, other, Words())
    with pytest.raises(ValueError, match="is it compressed itself"):
        card(compressed_of(original), original, Words())
    config = copy.deepcopy(original.config)
    config.vocab_size = 61
    wide = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="vocabularies of 60 and 61"):
        card(original, wide, Words(), Measures(TEXT, 1, 16))
    with pytest.raises(TypeError, match="transformers language model"):
        card(torch.nn.Linear(2, 2), original, Words(), name="x")


def test_what_cannot_be_measured_is_said_before() -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"windows": 0}, "windows must be at least 1"),
        ({"length": 1}, "length must be at least 2"),
        ({"lengths": (0,)}, "lengths must be at least 1"),
        ({"rounds": 0}, "rounds must be"),
    )
    for fields, said in wrong:
        with pytest.raises(ValueError, match=said):
            Measures(**fields)
    original = tiny()
    model = compressed_of(original)
    for measures, said in (
        (Measures(TEXT, 11, 40), "11 windows of 40 take more"),
        (Measures(TEXT, 1, 513), "takes 512 tokens, got a length of 513"),
        (Measures(TEXT, 1, 16, lengths=(401,)), "perplexity at 401 needs as many"),
    ):
        with pytest.raises(ValueError, match=said):
            card(original, model, Words(), measures)


def test_files_are_shown(tmp_path: Path) -> None:
    sizes = Size(1, 8, (16, 4), (20, 8), (123_456_789, 3_000))
    assert sizes.bits == (16.0, 4.0)
    original = tiny()
    found = card(original, compressed_of(original), Words(), Measures(TEXT, 1, 16), files=(123_456_789, 3_000))
    assert "| files of weights | 123.5 MB | 3,000 bytes |" in found.to_markdown()
