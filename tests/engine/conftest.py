"""Units of one chunk everywhere, so that the small tensors of these tests have several."""

from __future__ import annotations

import pytest

from fusewright.engine import jobs
from fusewright.methods.door import CHUNK


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "WIDEST", CHUNK)
