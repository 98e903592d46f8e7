"""The setting of traces and comparisons: everything stays in float64, and what is changed comes back."""

import logging

import pytest
import torch
from families import make

from secateur.discovery.setting import plain_forward, quiet_transformers


@pytest.fixture
def double():
    with plain_forward(make("llama").double()):
        yield torch.arange(6, dtype=torch.float64).reshape(1, 6) / 7


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.float(),
        lambda x: x.to(torch.float32),
        lambda x: x.to("cpu", torch.float32),
        lambda x: x.to(device="cpu", dtype=torch.float32),
        lambda x: x.type(torch.float32),
        lambda x: torch.as_tensor(x, dtype=torch.float32),
    ],
)
def test_what_a_model_converts_to_float32_is_a_copy_in_float64(double, convert):
    found = convert(double)
    assert torch.equal(found, double) and found.dtype == torch.float64
    found.add_(1)
    assert not torch.equal(found, double)


def test_what_is_made_or_computed_in_float32_is_in_float64(double):
    assert torch.ones(2, dtype=torch.float32).dtype == torch.float64
    assert torch.nn.functional.softmax(double, -1, dtype=torch.float32).dtype == torch.float64
    assert torch.softmax(double, -1, torch.float32).dtype == torch.float64
    assert torch.arange(3).float().dtype == torch.float64


def test_other_arguments_of_a_conversion_count(double):
    assert double.to(device="meta", dtype=torch.float32).device.type == "meta"
    image = double.reshape(1, 2, 3, 1).expand(1, 2, 3, 4)
    there = image.to(torch.float32, memory_format=torch.channels_last)
    assert there.is_contiguous(memory_format=torch.channels_last)
    assert torch.zeros(4, dtype=torch.int32).view(torch.float32).shape == (4,)  # reads the bits, and converts nothing


def test_the_level_of_the_log_comes_back():
    logger = logging.getLogger("transformers")
    before = logger.level
    with quiet_transformers(), quiet_transformers():
        assert logger.level == logging.CRITICAL
    assert logger.level == before
