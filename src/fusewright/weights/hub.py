"""A model on the Hugging Face Hub, at a revision, through the Hub's own client and cache."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import WeightsError

_REF = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")
_BESIDE = (
    "*.json", "tokenizer*", "*.model", "merges.txt", "vocab.txt", "*.jinja", "LICENSE*",
    "README.md",
)  # fmt: skip
_SAFETENSORS, _TORCH = ("*.safetensors",), ("pytorch_model*.bin", "adapter_model.bin")
_IGNORED = ("*/*", "consolidated*", "*.fp16.safetensors", "training_args.bin")


def is_hub_ref(ref: str) -> bool:
    """Whether ``ref`` has the form ``org/name`` or ``name``, with an optional ``@revision``."""
    return _REF.fullmatch(ref) is not None and not ref.startswith((".", "/", "~"))


def fetch(ref: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """The local snapshot of ``org/name[@revision]``, downloaded if it can be.

    Only weights (safetensors if the repository has any, else ``.bin``), JSON, tokenizer, chat
    template, licence and card at the top level are fetched; no code. Offline, the cache answers.
    Raises WeightsError if the reference is malformed, has two revisions, or cannot be had.
    """
    repo, revision = _parse(ref, revision)
    cache = None if cache_dir is None else str(cache_dir)
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return _online(repo, revision, cache)
    except (
        GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError,
    ) as error:  # fmt: skip  # the Hub answered, and the answer is no
        raise _refusal(repo, revision, error) from error
    except Exception as error:  # no network: each release of the client raises other kinds
        return _cached(repo, revision, cache, error)


def _parse(ref: str, revision: str | None) -> tuple[str, str | None]:
    found = _REF.fullmatch(ref)
    if not found or not is_hub_ref(ref):
        raise WeightsError(
            "neither a path that exists nor a Hub id", where=ref,
            expected="a path, or org/name[@revision]", fix="check the path",
        )  # fmt: skip
    said = found["revision"]
    if said and revision and said != revision:
        raise WeightsError(
            "two revisions for one model", where=ref, expected=said, found=revision,
            fix="keep one of them",
        )  # fmt: skip
    return found["repo"], said or revision


def _online(repo: str, revision: str | None, cache: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    files = HfApi().list_repo_files(repo, revision=revision)
    top = [name for name in files if "/" not in name]
    weights = _SAFETENSORS if any(name.endswith(".safetensors") for name in top) else _TORCH
    return Path(
        snapshot_download(
            repo, revision=revision, cache_dir=cache,
            allow_patterns=[*weights, *_BESIDE], ignore_patterns=list(_IGNORED),
        )
    )  # fmt: skip


def _cached(repo: str, revision: str | None, cache: str | None, why: Exception) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(repo, revision=revision, cache_dir=cache, local_files_only=True)
    except OSError:
        raise _refusal(repo, revision, why) from why
    return Path(found)


def _refusal(repo: str, revision: str | None, error: Exception) -> WeightsError:
    at = f" --revision {revision}" if revision else ""
    return WeightsError(
        "the model is neither a local path, nor in the Hub's cache, nor can it be fetched",
        where=f"{repo}@{revision}" if revision else repo,
        found=f"{type(error).__name__}: {str(error).strip()[:200]}",
        fix=f"hf download {repo}{at}   (with a network; `hf auth login` if it is gated)",
    )
