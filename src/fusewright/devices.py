"""Where models are run: the devices that this machine has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusewright.errors import RecipeError

if TYPE_CHECKING:
    import torch


def checked(name: str | torch.device) -> torch.device:
    """A device that is there. Raises RecipeError for any other, naming those that are."""
    import torch

    try:
        device = torch.device(name)
        there = device.type == "cpu" or bool(len(torch.zeros(1, device=device).tolist()))
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        there = False
    if not there:
        found = torch.accelerator.current_accelerator()
        raise RecipeError("this machine has no such device", found=str(name),
                          expected="cpu" if found is None else f"cpu or {found}",
                          fix="--device cpu (in Python: device='cpu')")  # fmt: skip
    return device
