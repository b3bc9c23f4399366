"""The kernel for colors in the interpreter, against the torch functions that define it."""

import pytest
import torch

from ssd_addon.kernels import colors as chain
from ssd_addon.kernels.color_tiles import colors, runs_on
from ssd_addon.kernels.colors import BLEND, HUE, NOTHING, SATURATE, SOLARIZE, Chain

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def table(n, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 5, (n, k), generator=g)
    numbers = torch.rand(n, k, 4, generator=g)
    numbers[codes == HUE] = numbers[codes == HUE] * 6 - 3
    numbers[codes == BLEND] *= torch.tensor([1.5, 1.0, 0.7, -0.5])
    numbers[::2, :, 2] *= codes[::2] != BLEND  # blends without a mean
    return Chain(codes, numbers)


def images(n, h, w):
    x = torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(1))
    x[0] = 0.5
    x[-1, :, 0] = 0
    return x


@pytest.mark.parametrize("size", [(5, 7), (32, 33), (40, 40)])
@pytest.mark.parametrize("columns", [1, 4, 7])
@pytest.mark.parametrize("ends", [False, True])
def test_it_is_the_torch_functions(size, columns, ends):
    assert runs_on(torch.device("cpu"))
    made, x = table(9, columns), images(9, *size)
    last = (torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)) if ends else None
    want = chain.run(made, x.clone(), last)
    got = colors(x.clone(), made.codes, made.numbers, last)
    close = ((got - want).abs() < 2e-5 * (5 if ends else 1)).float().mean()
    assert close > 0.999  # but at the threshold of a solarization, where one bit decides
    if not ends:
        untouched = (made.codes == NOTHING).all(1)
        assert torch.equal(got[untouched], x[untouched])


@pytest.mark.parametrize("code", [BLEND, HUE, SATURATE, SOLARIZE])
def test_every_instruction_alone(code):
    g = torch.Generator().manual_seed(code)
    numbers = torch.rand(4, 1, 4, generator=g)
    made, x = Chain(torch.full((4, 1), code), numbers), images(4, 6, 9)
    got, want = colors(x.clone(), made.codes, made.numbers), chain.run(made, x.clone())
    assert ((got - want).abs() < 1e-5).float().mean() > 0.99


def test_no_instruction_and_one_number_for_all_channels():
    x, none = images(3, 4, 4), Chain(torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0, 4))
    assert torch.equal(colors(x.clone(), none.codes, none.numbers), x)
    got = colors(x.clone(), none.codes, none.numbers, (torch.tensor([0.5]), torch.tensor([0.25])))
    torch.testing.assert_close(got, (x - 0.5) / 0.25)


@pytest.mark.parametrize(
    "x", [torch.rand(2, 4, 4, 4), torch.rand(2, 3, 4, 4).double(), torch.rand(2, 4, 4, 3).permute(0, 3, 1, 2)]
)
def test_other_images_are_refused(x):
    with pytest.raises(ValueError, match=r"expected contiguous float32 images \[N, 3, H, W\]"):
        colors(x, torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match=r"codes \[2, K\] and numbers"):
        colors(torch.rand(2, 3, 4, 4), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1, 4))
