"""The accelerator that some tests need; they are skipped where there is none."""

from __future__ import annotations

import pytest
import torch


def accelerator() -> str:
    found = torch.accelerator.current_accelerator()
    return "" if found is None else found.type


needs_accelerator = pytest.mark.skipif(not accelerator(), reason="there is no accelerator")
