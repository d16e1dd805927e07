"""Logits of OpenVINO's paged attention at chosen positions, which its GenAI pipeline does not give.

The model is put through the same transformation as GenAI does, and run in the same chunks with the same inputs: what
is sparse there is sparse here. with one chunk, and with Tri-shape in several, the pipeline's echo gives the same
log-probability of each token of a prompt to 0.0003.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 32
WANTED = "wanted_tokens"
# The defaults of GenAI's SparseAttentionConfig and SchedulerConfig.
LAST_DENSE, START, RECENT, THRESHOLD, XBLOCK, STRIDE, CHUNK = 100, 128, 1920, 0.8, 64, 8, 256
# Of a layer that is to be dense.
ALL = 1.0


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start`` to ``stop``, the blocks of earlier ones that they read, and whether they read them sparsely."""

    start: int
    stop: int
    blocks: tuple[int, ...]
    sparse: bool


def chunks(length: int, settings: Mapping[str, Any]) -> Iterator[Chunk]:
    """A prompt as the scheduler cuts it, each piece with the blocks that Tri-shape leaves it."""
    mode, size = settings.get("mode"), settings.get("chunk") or length
    last = settings.get("num_last_dense_tokens_in_prefill", LAST_DENSE)
    first = settings.get("num_retained_start_tokens_in_cache", START) // BLOCK
    recent = settings.get("num_retained_recent_tokens_in_cache", RECENT) // BLOCK
    for start in range(0, length, size):
        stop = min(length, start + size)
        # Tri-shape leaves a chunk dense that reaches into the last tokens, XAttention one that begins there.
        sparse = mode is not None and (start + last < length if mode == "XATTENTION" else stop + last <= length)
        known = -(-start // BLOCK)
        skip = range(first, known - recent) if sparse and mode == "TRISHAPE" else range(0)
        blocks = tuple(block for block in range(-(-stop // BLOCK)) if block not in skip)
        yield Chunk(start, stop, blocks, sparse)


class Paged:
    """A model with paged attention, its caches and the settings of a pipeline."""

    def __init__(self, folder: str, threads: int, settings: Mapping[str, Any]) -> None:
        import openvino  # pyright: ignore[reportMissingImports]
        from openvino._offline_transformations import (  # pyright: ignore[reportMissingImports]
            paged_attention_transformation,
        )

        self.openvino, self.settings = openvino, settings
        core = openvino.Core()
        model = core.read_model(Path(folder) / "openvino_model.xml")
        xattention = settings.get("mode") == "XATTENTION"
        paged_attention_transformation(model, allow_xattention=xattention)
        self._only_wanted(model)
        self.model = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads})
        self.names = {name: port for port in self.model.inputs for name in port.get_names()}

    def _only_wanted(self, model: Any) -> None:
        """Let the head compute the logits of wanted tokens alone."""
        from openvino import opset13  # pyright: ignore[reportMissingImports]

        node = model.outputs[0].get_node()
        while node.get_type_name() != "MatMul":
            node = node.input_value(0).get_node()
        wanted = opset13.parameter([-1], np.int64, name=WANTED)
        wanted.output(0).set_names({WANTED})
        gathered = opset13.gather(node.input_value(0), wanted, opset13.constant(0, np.int64))
        node.input(0).replace_source_output(gathered.output(0))
        model.add_parameters([wanted])
        model.validate_nodes_and_infer_types()

    def logits(self, ids: Sequence[int], positions: Sequence[int]) -> Any:
        """``[positions, vocabulary]``."""
        request = self.model.create_infer_request()
        count = -(-len(ids) // BLOCK)
        for name, port in self.names.items():
            if "_cache." in name:
                shape = port.get_partial_shape()
                sizes = [count, *(shape[axis].get_length() for axis in range(1, len(shape)))]
                request.set_tensor(name, self.openvino.Tensor(port.get_element_type(), self.openvino.Shape(sizes)))
        found = []
        for chunk in chunks(len(ids), self.settings):
            for name, value in self._inputs(ids, chunk).items():
                request.set_tensor(name, self.openvino.Tensor(value))
            wanted = [position - chunk.start for position in positions if chunk.start <= position < chunk.stop]
            request.set_tensor(WANTED, self.openvino.Tensor(np.array(wanted or [0], np.int64)))
            request.infer()
            if wanted:
                found.append(request.get_output_tensor(0).data.reshape(len(wanted), -1).copy())
        return np.concatenate(found)

    def _inputs(self, ids: Sequence[int], chunk: Chunk) -> dict[str, Any]:
        skipped = -(-chunk.stop // BLOCK) - len(chunk.blocks)
        past = chunk.start - skipped * BLOCK
        size = chunk.stop - chunk.start
        given: dict[str, Any] = {
            "input_ids": np.array(ids[chunk.start : chunk.stop], np.int64),
            "position_ids": np.arange(chunk.start, chunk.stop, dtype=np.int64),
            "max_context_len": np.array(past + size, np.int32),
            "past_lens": np.array([past], np.int32),
            "subsequence_begins": np.array([0, size], np.int32),
            "block_indices_begins": np.array([0, len(chunk.blocks)], np.int32),
            "block_indices": np.array(chunk.blocks, np.int32),
            "xattention_block_size": np.array(self.settings.get("xattention_block_size", XBLOCK), np.int32),
            "xattention_stride": np.array(self.settings.get("xattention_stride", STRIDE), np.int32),
        }
        threshold = self.settings.get("xattention_threshold", THRESHOLD) if chunk.sparse else ALL
        for name in self.names:
            if name.startswith("xattention_threshold"):
                given[name] = np.array([threshold], np.float32)
        return {name: value for name, value in given.items() if name in self.names}
