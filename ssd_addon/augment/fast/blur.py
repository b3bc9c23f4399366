"""Gaussian blurs with a width per image, as one weighted sum along each axis.

Legend: n images, C channels, [H, W] size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_addon.kernels.colors import put

TAIL = 2e-4
"""Largest share of a kernel's weight that may be cut off at its ends; the rest is renormalized."""
TOGETHER = 2**17
"""Pixel values that each thread blurs at once, about as many as fit in a core's own cache."""


def kernels(sigma: Tensor, size: int) -> Tensor:
    """[n, size] weights of Gaussians of width sigma [n] at the pixels around the middle one; sigma 0 is no blur."""
    at = torch.arange(size, dtype=torch.float64) - size // 2
    weight = torch.exp(-at.square() / (2 * sigma.double().square()[:, None]).clamp(min=1e-30))
    outer = 2 * weight.cumsum(1)[:, : size // 2] < TAIL * weight.sum(dim=1, keepdim=True)  # from one end inwards
    weight[:, : size // 2].masked_fill_(outer, 0)
    weight[:, size // 2 + 1 :].masked_fill_(outer.flip(1), 0)
    return (weight / weight.sum(dim=1, keepdim=True)).float()


def blur(x: Tensor, rows: Tensor, sigma: Tensor, size: tuple[int, int], border: str) -> None:
    """Blur some of the images [N, C, H, W], in place.

    Args:
        rows: [n] indices of the images to blur.
        sigma: [n] widths in pixels.
        size: (height, width) of the window in pixels, both odd.
        border: "reflect" or "replicate".
    """
    vertical, horizontal = kernels(sigma, size[0]), kernels(sigma, size[1])
    if x.device.type != "cpu":
        at = rows.to(x.device)
        x[at] = _convolved(x[at], vertical, horizontal, border)
        return
    order = sigma.argsort()  # group images of similar width: kernels of a group are cut to the widest
    for some in order.split(max(1, TOGETHER * torch.get_num_threads() // x[0].numel())):
        y = _along_rows(x.index_select(0, rows[some]), _cut(vertical[some]), border)
        put(x, rows[some], _along_columns(y, _cut(horizontal[some]), border))


def _cut(weight: Tensor) -> Tensor:
    """The kernels without the ends where all of them are 0."""
    middle = weight.shape[1] // 2
    ends = int((weight[:, :middle] == 0).all(dim=0).sum())
    return weight[:, ends : weight.shape[1] - ends]


def _along_rows(x: Tensor, weight: Tensor, border: str) -> Tensor:
    n, c, h, w = x.shape
    r = weight.shape[1] // 2
    if r == 0:
        return x
    padded = F.pad(x, (0, 0, r, r), mode=border).view(n, c, -1)
    return _sum(padded, weight, torch.empty(n, c, h * w), w).view(n, c, h, w)


def _along_columns(x: Tensor, weight: Tensor, border: str) -> Tensor:
    n, c, h, w = x.shape
    r = weight.shape[1] // 2
    if r == 0:
        return x
    padded = F.pad(x, (r, r, 0, 0), mode=border).view(n, 1, -1)
    out = torch.empty_like(padded)
    _sum(padded, weight, out[:, :, : padded.shape[2] - 2 * r], 1)  # sums across an edge are cut off below
    return out.view(n, c, h, w + 2 * r)[..., :w]


def _sum(padded: Tensor, weight: Tensor, out: Tensor, step: int) -> Tensor:
    """sum_k weight_k * padded[..., k * step : k * step + length], as sums of long contiguous slices."""
    taps, length = weight[:, :, None, None].unbind(1), out.shape[2]
    torch.mul(padded[:, :, :length], taps[0], out=out)
    for k, tap in enumerate(taps[1:], 1):
        out.addcmul_(padded[:, :, k * step : k * step + length], tap)
    return out


def _convolved(x: Tensor, vertical: Tensor, horizontal: Tensor, border: str) -> Tensor:
    """Blur all images at once, with one grouped convolution along each axis."""
    n, c, h, w = x.shape
    flat = x.reshape(1, n * c, h, w)
    for weight, down in ((vertical, True), (horizontal, False)):
        r = weight.shape[1] // 2
        each = weight.to(x.device).repeat_interleave(c, 0)[:, None]
        padding, kernel = ((0, 0, r, r), each[..., None]) if down else ((r, r, 0, 0), each[:, :, None])
        flat = F.conv2d(F.pad(flat, padding, mode=border), kernel, groups=n * c)
    return flat.view(n, c, h, w)
