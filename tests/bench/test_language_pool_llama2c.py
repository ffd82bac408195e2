"""Checkpoints of llama2.c: what their own format says, and nothing else."""

from __future__ import annotations

import struct

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from fusewright.bench.pools.llama2c import read_model, read_tokenizer  # noqa: E402
from fusewright.tasks.errors import DataError  # noqa: E402

WIDTH, HIDDEN, LAYERS, HEADS, KEYS, WORDS, CONTEXT = 16, 24, 2, 4, 2, 20, 8
HEAD = WIDTH // HEADS
SHAPES = {
    "embedding": (WORDS, WIDTH), "attention_norm": (LAYERS, WIDTH), "wq": (LAYERS, WIDTH, WIDTH),
    "wk": (LAYERS, KEYS * HEAD, WIDTH), "wv": (LAYERS, KEYS * HEAD, WIDTH),
    "wo": (LAYERS, WIDTH, WIDTH), "ffn_norm": (LAYERS, WIDTH), "w1": (LAYERS, HIDDEN, WIDTH),
    "w2": (LAYERS, WIDTH, HIDDEN), "w3": (LAYERS, HIDDEN, WIDTH), "norm": (WIDTH,),
    "rotations": (2, CONTEXT, HEAD // 2),
}  # fmt: skip


@pytest.fixture
def tensors():
    draw = np.random.default_rng(0)
    return {k: draw.normal(0, 0.5, shape).astype("<f4") for k, shape in SHAPES.items()}


def checkpoint(path, tensors, words=WORDS):
    header = struct.pack("<7i", WIDTH, HIDDEN, LAYERS, HEADS, KEYS, words, CONTEXT)
    path.write_bytes(header + b"".join(t.tobytes() for t in tensors.values()))
    return path


def normed(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def rotated(x):
    """Neighbouring pairs of each head's numbers, turned by place times frequency: (n, heads, h)."""
    places = np.arange(len(x))[:, None, None]
    angle = places / 10000 ** (np.arange(0, HEAD, 2) / HEAD)
    a, b = x[..., 0::2], x[..., 1::2]
    turned = [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)]
    return np.stack(turned, -1).reshape(x.shape)


def forward(w, ids):
    """The logits as run.c computes them, in float64."""
    x = w["embedding"][ids].astype(np.float64)
    for i in range(LAYERS):
        h = normed(x, w["attention_norm"][i])
        q = rotated((h @ w["wq"][i].T).reshape(len(ids), HEADS, HEAD))
        k = rotated((h @ w["wk"][i].T).reshape(len(ids), KEYS, HEAD))
        v = (h @ w["wv"][i].T).reshape(len(ids), KEYS, HEAD)
        k, v = (np.repeat(t, HEADS // KEYS, axis=1) for t in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(HEAD)
        scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", weights, v).reshape(len(ids), WIDTH) @ w["wo"][i].T
        h = normed(x, w["ffn_norm"][i])
        gate = h @ w["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][i].T)) @ w["w2"][i].T
    return normed(x, w["norm"]) @ w.get("output", w["embedding"]).T


@pytest.mark.parametrize("shared", [True, False])
def test_the_model_computes_what_llama2c_does(tmp_path, tensors, shared):
    if not shared:
        output = np.random.default_rng(1).normal(size=(WORDS, WIDTH))
        tensors["output"] = output.astype("<f4")
    path = checkpoint(tmp_path / "m.bin", tensors, WORDS if shared else -WORDS)
    ids = [3, 1, 4, 1, 5, 9]
    with torch.inference_mode():
        found = read_model(path).eval()(input_ids=torch.tensor([ids])).logits[0]
    np.testing.assert_allclose(found.numpy(), forward(tensors, ids), atol=1e-3, rtol=1e-3)


def test_it_stays_the_same_as_a_folder(tmp_path, tensors):
    model = read_model(checkpoint(tmp_path / "m.bin", tensors))
    model.save_pretrained(tmp_path / "folder")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


@pytest.mark.parametrize("damage", [lambda b: b[:-4], lambda b: b + b"\0" * 4, lambda b: b[:10],
                                    lambda b: b"\0" * 28 + b[28:]])  # fmt: skip
def test_a_damaged_checkpoint_is_refused(tmp_path, tensors, damage):
    path = checkpoint(tmp_path / "m.bin", tensors)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"llama2\.c"):
        read_model(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.bin"):
        read_model(tmp_path / "absent.bin")


def tokenizer(path, pieces):
    first = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{at:02X}>" for at in range(256))]
    said = [(piece, 0.0) for piece in first] + pieces
    raw = struct.pack("<i", 9)
    for piece, score in said:
        raw += struct.pack("<fi", score, len(piece.encode())) + piece.encode()
    path.write_bytes(raw)
    return path, len(said)


PIECES = [("ab", -1.0), ("bc", 0.0), (" a", -3.0), (" ", -9.0), ("a", -9.0), ("b", -9.0),
          ("c", -9.0)]  # fmt: skip


def test_pieces_are_merged_best_score_first(tmp_path):
    found = read_tokenizer(*tokenizer(tmp_path / "t.bin", PIECES))
    ids = found("abc")["input_ids"]
    assert found.convert_ids_to_tokens(ids) == ["▁a", "bc"]  # "bc" before "ab" before " a"


def test_what_has_no_piece_is_spelled_in_bytes(tmp_path):
    found = read_tokenizer(*tokenizer(tmp_path / "t.bin", PIECES))
    ids = found("a é")["input_ids"]
    assert found.convert_ids_to_tokens(ids)[-2:] == ["<0xC3>", "<0xA9>"]
    assert found.decode(ids) == "a é"


def test_a_damaged_tokenizer_is_refused(tmp_path):
    path, size = tokenizer(tmp_path / "t.bin", PIECES)
    for wrong in (size + 1, size - 1):
        with pytest.raises(DataError, match="damaged"):
            read_tokenizer(path, wrong)
