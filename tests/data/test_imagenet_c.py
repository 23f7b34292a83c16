"""The corruptions of photographs: the constants of ImageNet-C, by the functions of the other protocol."""

import numpy as np
import pytest

from drep_jax.data.corruptions import CIFAR10C, corrupt
from drep_jax.data.corruptions.imagenet_c import PHOTOGRAPHS
from drep_jax.data.corruptions.spec import parse_spec
from drep_jax.errors import ConfigError


def test_all_fifteen_change_a_photograph_and_stay_gray_levels():
    assert tuple(PHOTOGRAPHS) == CIFAR10C
    image = np.random.default_rng(0).uniform(40, 200, (1, 40, 56, 3)).astype(np.float32).round()
    for name, (_, constants) in PHOTOGRAPHS.items():
        assert len(constants) == 5
        seen = corrupt(image, np.zeros(1, int), f"imagenet_c:{name}:3", 0)
        assert seen.shape == image.shape and (seen == np.rint(seen)).all() and 0 <= seen.min() <= seen.max() <= 255
        assert np.abs(seen - image).mean() > 2, name


@pytest.mark.parametrize(("severity", "std"), list(enumerate((0.08, 0.12, 0.18, 0.26, 0.38), 1)))
def test_noise_has_the_published_deviation(severity, std):
    flat = np.full((1, 64, 64, 3), 127.0, np.float32)
    low, high = (
        np.quantile(corrupt(flat, np.zeros(1, int), f"imagenet_c:gaussian_noise:{severity}", 0), q) for q in (0.4, 0.6)
    )
    assert (high - low) / (2 * 0.2533) == pytest.approx(255 * std, rel=0.06)


def test_names_that_there_are_not():
    for text, said in (
        ("imagenet_c:fogg:3", r'Unknown ImageNet-C corruption "fogg".*"imagenet_c:NAME:SEVERITY"\. Did you mean "fog"'),
        ("imagenet_c:fog:6", r'severity of "imagenet_c:fog" is 1, 2, 3, 4 or 5'),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_spec(text)
