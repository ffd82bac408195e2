"""Checkpoints of llama2.c (Karpathy 2023, MIT) as ordinary Llama folders: ``stories260K``.

A checkpoint is seven int32 (width, hidden, layers, heads, key-value heads, vocabulary, context;
a negative vocabulary says that the output layer is its own) and float32 tensors in a fixed order;
a tokenizer is the longest piece's length, then each piece's score, length and bytes.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusewright.extras import needs
from fusewright.tasks.errors import DataError

SPACE = "▁"
SPECIAL = ("<unk>", "<s>", "</s>")


def read_model(path: Path) -> Any:
    """A ``transformers.LlamaForCausalLM`` of a checkpoint's weights.

    llama2.c rotates neighbouring pairs of a head's numbers, transformers the two halves: rows of
    the query and key matrices change places so that both compute the same.

    Raises DataError if the file is missing, or not as long as its header says.
    """
    header, numbers = _read(path)
    width, hidden, layers, heads, key_heads, said, context = header
    vocabulary, head = abs(said), width // heads
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (vocabulary, width), "attention_norm": (layers, width),
        "wq": (layers, width, width), "wk": (layers, key_heads * head, width),
        "wv": (layers, key_heads * head, width), "wo": (layers, width, width),
        "ffn_norm": (layers, width), "w1": (layers, hidden, width),
        "w2": (layers, width, hidden), "w3": (layers, hidden, width), "norm": (width,),
        "rotations": (2, context, head // 2),
    } | ({"output": (vocabulary, width)} if said < 0 else {})  # fmt: skip
    parts = _cut(numbers, shapes, path)
    parts["wq"], parts["wk"] = _halves(parts["wq"], heads), _halves(parts["wk"], key_heads)
    transformers = needs("transformers", "demo")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=hidden,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        max_position_embeddings=context, rms_norm_eps=1e-5, tie_word_embeddings=said > 0,
    ))  # fmt: skip
    model.load_state_dict(_named(parts, layers))
    return model


def read_tokenizer(path: Path, vocabulary: int) -> Any:
    """A tokenizer as ``transformers`` opens it: BPE whose merges are in the order of scores, with
    single bytes for what it has no piece for.

    Raises DataError if the file is missing or damaged.
    """
    pieces = _pieces(path, vocabulary)
    tokenizers = needs("tokenizers", "demo")
    ids = {piece: at for at, (piece, _) in enumerate(pieces)}
    ranked = sorted((p for p in pieces[len(SPECIAL) + 256 :] if len(p[0]) > 1), key=lambda p: -p[1])
    merges = [
        (piece[:at], piece[at:]) for piece, _ in ranked for at in range(1, len(piece))
        if piece[:at] in ids and piece[at:] in ids
    ]  # fmt: skip
    model = tokenizers.Tokenizer(tokenizers.models.BPE(
        ids, merges, unk_token=SPECIAL[0], fuse_unk=True, byte_fallback=True
    ))  # fmt: skip
    normal, decode = tokenizers.normalizers, tokenizers.decoders
    model.normalizer = normal.Sequence([normal.Prepend(SPACE), normal.Replace(" ", SPACE)])
    model.decoder = decode.Sequence([
        decode.Replace(SPACE, " "), decode.ByteFallback(), decode.Fuse(), decode.Strip(" ", 1, 0)
    ])  # fmt: skip
    return needs("transformers", "demo").PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError("a llama2.c file cannot be read", where=path, found=error,
                        fix="put it below the folder that --data names") from error  # fmt: skip


def _read(path: Path) -> tuple[tuple[int, ...], Tensor]:
    raw = _bytes(path)
    if len(raw) < 28 or len(raw) % 4:
        raise DataError(
            "a checkpoint of llama2.c is damaged", where=path,
            expected="a header of 28 bytes, then float32", found=f"{len(raw)} bytes",
        )  # fmt: skip
    header = struct.unpack("<7i", raw[:28])
    if min(header[:5]) < 1 or header[5] == 0 or header[6] < 1 or header[0] % header[3]:
        raise DataError("a checkpoint of llama2.c is damaged", where=path,
                        expected="a header of seven sizes", found=list(header))  # fmt: skip
    return header, torch.from_numpy(np.frombuffer(raw, "<f4", offset=28).copy())


def _cut(numbers: Tensor, shapes: dict[str, tuple[int, ...]], path: Path) -> dict[str, Tensor]:
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    if sum(sizes) != len(numbers):
        raise DataError("a checkpoint of llama2.c is not as long as its header says", where=path,
                        expected=f"{sum(sizes)} numbers", found=len(numbers))  # fmt: skip
    parts = numbers.split(sizes)
    return {n: p.view(shape) for (n, shape), p in zip(shapes.items(), parts, strict=True)}


def _halves(stacked: Tensor, heads: int) -> Tensor:
    """(layers, rows, columns) with each head's rows 0, 2, 4, … first, then 1, 3, 5, …"""
    layers, rows, columns = stacked.shape
    pairs = stacked.view(layers, heads, rows // heads // 2, 2, columns)
    return pairs.transpose(2, 3).reshape(layers, rows, columns)


def _named(parts: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    each = {
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "wq", "self_attn.k_proj": "wk", "self_attn.v_proj": "wv",
        "self_attn.o_proj": "wo", "mlp.gate_proj": "w1", "mlp.down_proj": "w2", "mlp.up_proj": "w3",
    }  # fmt: skip
    found = {
        f"model.layers.{at}.{name}.weight": parts[part][at]
        for at in range(layers) for name, part in each.items()
    }  # fmt: skip
    output = parts.get("output", parts["embedding"])
    return found | {
        "model.embed_tokens.weight": parts["embedding"], "model.norm.weight": parts["norm"],
        "lm_head.weight": output,
    }  # fmt: skip


def _pieces(path: Path, vocabulary: int) -> list[tuple[str, float]]:
    """Each piece with its score; spaces as sentencepiece writes them."""
    raw, at = _bytes(path), 4
    found: list[tuple[str, float]] = []
    try:
        for _ in range(vocabulary):
            score, length = struct.unpack_from("<fi", raw, at)
            at += 8 + length
            piece = raw[at - length : at].decode("utf-8")
            found.append((piece.replace(" ", SPACE), score))
    except (struct.error, UnicodeDecodeError) as error:
        raise DataError("a tokenizer of llama2.c is damaged", where=path,
                        expected=f"{vocabulary} pieces", found=error) from error  # fmt: skip
    if at != len(raw):
        raise DataError("a tokenizer of llama2.c is damaged", where=path,
                        expected=f"{at} bytes", found=len(raw))  # fmt: skip
    return [(name, 0.0) for name in SPECIAL] + found[len(SPECIAL) :]
