"""Linear, Conv1D and convolutions as what they are: a matrix that is multiplied with rows."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, pad, unfold

ConvNd = nn.modules.conv._ConvNd
Convolution = nn.Conv1d | nn.Conv2d


def is_convolution(base: nn.Module) -> bool:
    """Whether it multiplies with patches."""
    return isinstance(base, ConvNd)


def matrix(base: nn.Module) -> Tensor:
    """W (out, in) of a layer; of a convolution, ``in`` are channels times the window's places."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    if is_convolution(base):
        return weight.flatten(1)
    return weight.T if in_first(base) else weight


def stored(base: nn.Module, whole: Tensor) -> Tensor:
    """A matrix (out, in) as the layer keeps it."""
    if is_convolution(base):
        return whole.unflatten(1, base.weight.shape[1:])  # type: ignore[index]
    return whole.T.contiguous() if in_first(base) else whole


def in_first(base: nn.Module) -> bool:
    """Whether it keeps its weight in by out."""
    return type(base).__name__ == "Conv1D"


def rows(base: nn.Module, inputs: Tensor) -> Tensor:
    """What the matrix is multiplied with, (samples, …, in): inputs as they are, or a convolution's
    patches (samples, places, in)."""
    if not isinstance(base, Convolution):
        return inputs
    x, windows = _padded(base, inputs), (base.kernel_size, base.dilation, base.stride)
    flat = x.dim() == 3
    kernel, dilation, stride = ((1, *each) if flat else each for each in windows)
    return unfold(x[:, :, None] if flat else x, kernel, dilation, 0, stride).mT


def answered(base: nn.Module, inputs: Tensor, found: Tensor) -> Tensor:
    """The products (…, out) as the layer's answer to ``inputs``."""
    if not isinstance(base, Convolution):
        return found.reshape(*inputs.shape[:-1], found.shape[-1])
    whole = found.reshape(len(inputs), *places(base, inputs), found.shape[-1])
    return whole.movedim(-1, 1)


def places(base: Convolution, inputs: Tensor) -> list[int]:
    """How large a convolution's answer is, axis by axis."""
    sizes = _padded(base, inputs[:1, :1].detach()).shape[2:]
    windows = zip(sizes, base.kernel_size, base.dilation, base.stride, strict=True)
    return [(size - d * (k - 1) - 1) // s + 1 for size, k, d, s in windows]


def convolved(base: Convolution, inputs: Tensor, matrices: Tensor) -> Tensor:
    """The convolution, without its bias, with another matrix (1, out, in), of any number of
    outputs, or with one for each sample (samples, out, in)."""
    kernels = matrices.to(inputs.dtype).flatten(0, 1).unflatten(1, base.weight.shape[1:])
    x, groups = _padded(base, inputs), len(matrices)
    x = x.reshape(-1, groups * x.shape[1], *x.shape[2:])
    run = conv1d if isinstance(base, nn.Conv1d) else conv2d
    found: Tensor = run(x, kernels, None, base.stride, 0, base.dilation, groups)
    return found.reshape(len(inputs), matrices.shape[1], *found.shape[2:])


def _padded(base: Convolution, inputs: Tensor) -> Tensor:
    mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
    around = list(base._reversed_padding_repeated_twice)
    return pad(inputs, around, mode=mode) if any(around) else inputs
