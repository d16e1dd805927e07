"""A tiny random Llama as a GGUF file: weights in Q8_0, a tokenizer of bytes, a chat template."""

from pathlib import Path
from typing import Any

import numpy as np

TEMPLATE = "{% for turn in messages %}[{{ turn['role'] }}]{{ turn['content'] }}{% endfor %}[assistant]"
_WIDTH, _HIDDEN, _LAYERS, _HEADS, _SHARED = 64, 96, 2, 4, 2


def byte_letters() -> list[str]:
    """The 256 letters that stand for bytes in tokenizers of bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    of = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [of[byte] for byte in range(256)]


def write_gguf(path: Path, *, architecture: str = "llama", without: str = "") -> dict[str, np.ndarray]:
    """Write one, without a tensor of that name; returns the values that the file stands for, by name."""
    import gguf

    rng = np.random.default_rng(0)
    tokens = ["<|end|>", "<|begin|>", *byte_letters(), "ab"]
    writer: Any = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    fields = (
        (writer.add_context_length, 2048),
        (writer.add_block_count, _LAYERS),
        (writer.add_embedding_length, _WIDTH),
        (writer.add_feed_forward_length, _HIDDEN),
        (writer.add_head_count, _HEADS),
        (writer.add_head_count_kv, _SHARED),
        (writer.add_rope_dimension_count, _WIDTH // _HEADS),
        (writer.add_rope_freq_base, 10_000.0),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_vocab_size, len(tokens)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_list, tokens),
        (writer.add_token_types, [3, 3, *[1] * (len(tokens) - 2)]),
        (writer.add_token_merges, ["a b"]),
        (writer.add_eos_token_id, 0),
        (writer.add_bos_token_id, 1),
        (writer.add_chat_template, TEMPLATE),
    )
    for add, value in fields:
        add(value)
    shared = _WIDTH // _HEADS * _SHARED
    shapes = {"token_embd": (len(tokens), _WIDTH), "output": (len(tokens), _WIDTH)}
    for i in range(_LAYERS):
        matrices = {"attn_q": (_WIDTH, _WIDTH), "attn_k": (shared, _WIDTH), "attn_v": (shared, _WIDTH)}
        matrices |= {"attn_output": (_WIDTH, _WIDTH), "ffn_gate": (_HIDDEN, _WIDTH), "ffn_up": (_HIDDEN, _WIDTH)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in (matrices | {"ffn_down": (_WIDTH, _HIDDEN)}).items()}
    values = {}
    for name, shape in shapes.items():
        packed = gguf.quantize(0.2 * rng.standard_normal(shape, np.float32), gguf.GGMLQuantizationType.Q8_0)
        values[name] = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        if name != without:
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("output_norm", *(f"blk.{i}.{part}_norm" for i in range(_LAYERS) for part in ("attn", "ffn"))):
        values[name] = 1 + 0.1 * rng.standard_normal(_WIDTH, np.float32)
        writer.add_tensor(f"{name}.weight", values[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
