"""What the compressed programs compute, and what is refused."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

coreai_torch = pytest.importorskip("coreai_torch", reason="needs the extra coreai")

from coreai_opt.coreai_utils import (  # noqa: E402
    CompressionGranularity,
    DType,
    QScheme,
    palettize_weights,
    quantize_weights,
    sparsify_weights,
)
from coreai_opt.coreai_utils._masks import block_mask, magnitude_mask, nm_mask  # noqa: E402
from coreai_opt.coreai_utils._program import Unsuitable, Weight, compress  # noqa: E402

G = CompressionGranularity


def program_of(model: nn.Module, *inputs: Tensor) -> Any:
    exported = torch.export.export(model.eval(), inputs)
    converter = coreai_torch.TorchConverter()
    converter.add_exported_program(exported.run_decompositions(coreai_torch.get_decomp_table()))
    return converter.to_coreai()


@pytest.fixture(scope="module")
def linear() -> Any:
    torch.manual_seed(0)
    return program_of(nn.Linear(64, 32, bias=False), torch.randn(1, 64))


@pytest.fixture(scope="module")
def convolution() -> Any:
    torch.manual_seed(0)
    return program_of(nn.Conv2d(32, 32, 3, groups=2, bias=False), torch.randn(1, 32, 5, 5))


def operations(program: Any) -> list[str]:
    text = str(program)
    return [
        name
        for name in ("blockwise_shift_scale", "lut_to_dense", "build_sparse_with_bitmask", "coreai.cast")
        if name in text
    ]


def test_a_copy_is_changed_unless_asked(linear: Any):
    before = str(linear)
    changed = quantize_weights(linear, DType.INT8)
    assert changed is not linear
    assert str(linear) == before
    assert quantize_weights(changed, DType.INT4, in_place=True) is changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_weight_is_read(dtype: torch.dtype):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 70), nn.Linear(70, 30)).to(dtype)
    with torch.no_grad():
        layers[1].weight.fill_(0.75)  # stored as one value
    found = []

    def keep(weight: Weight, builder: Any) -> Any:
        found.append(weight.values.clone())
        raise Unsuitable("it is only looked at")

    compress(program_of(layers, torch.randn(1, 300, dtype=dtype)), 1024, False, keep)
    for values, layer in zip(found, layers, strict=True):
        assert values.dtype == dtype
        assert torch.equal(values, layer.weight)


def test_dense_constants_do_not_stay(linear: Any):
    # In Apple's package they do, and a second pass compresses them once more.
    quantized = quantize_weights(linear, DType.INT8)
    assert "tensor<32x64xf32>" not in str(quantized).split("blockwise_shift_scale")[0]
    again = quantize_weights(quantized, DType.INT8)
    assert str(again).count("coreai.blockwise_shift_scale") == 1


def test_per_channel_scales_belong_to_output_channels(linear: Any):
    # Apple's package takes them along the other axis, and the first one alone with quantized palettes.
    for lut_dtype in (None, DType.INT8):
        text = str(palettize_weights(linear, lut_dtype, enable_per_channel_scale=True))
        assert "tensor<32x1xf32>, tensor<32x1xf32>, tensor<32x1xf32>) -> tensor<32x64xf32>" in text


def test_vectors_of_a_convolution(convolution: Any):
    # Apple's package raises RuntimeError.
    text = str(palettize_weights(convolution, None, 2, cluster_dim=2))
    assert "tensor<16x16x3x3xui2>, tensor<1x1x1x1x4x2xf32>" in text


def test_zeros_between_unsigned_values_stay_zero(linear: Any):
    # In Apple's package they come back as -127 times the scale.
    text = str(sparsify_weights(linear, quantize_dtype=DType.UINT8))
    assert text.index("coreai.blockwise_shift_scale") < text.index("coreai.build_sparse_with_bitmask")


@pytest.mark.parametrize(
    ("granularity", "grid"),
    [(G.PER_TENSOR, "1x1x4x1"), (G.PER_CHANNEL, "32x1x4x1"), (G.PER_GROUPED_CHANNEL, "2x1x4x1")],
)
def test_palettes_of_groups(granularity: CompressionGranularity, grid: str, linear: Any):
    text = str(palettize_weights(linear, None, 2, granularity, group_size=16))
    assert f"tensor<32x64xui2>, tensor<{grid}xf32>, tensor<si16>) -> tensor<32x64xf32>" in text


def test_strings_serve_as_members(linear: Any):
    # Apple's package raises AttributeError.
    assert str(quantize_weights(linear, "int8", "symmetric", "per_channel")) == str(
        quantize_weights(linear, DType.INT8)
    )  # type: ignore[arg-type]


def test_what_does_not_fit_stays_with_a_warning(linear: Any, caplog: pytest.LogCaptureFixture):
    for change in (
        lambda: quantize_weights(linear, DType.INT8, granularity=G.PER_BLOCK, block_size=7),
        lambda: palettize_weights(linear, None, granularity=G.PER_GROUPED_CHANNEL, group_size=5),
        lambda: palettize_weights(linear, None, cluster_dim=3),
        lambda: sparsify_weights(linear, None, n_m_ratio=(20, 40)),
        lambda: sparsify_weights(linear, block_size=17),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert operations(change()) == []
        assert "is left as it is" in caplog.text
        assert "(32, 64)" in caplog.text


def test_values_that_are_not_finite_stay(caplog: pytest.LogCaptureFixture):
    layer = nn.Linear(64, 32, bias=False)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    program = program_of(layer, torch.randn(1, 64))
    assert operations(palettize_weights(program, None)) == []
    assert "not finite" in caplog.text


BAD: list[tuple[Callable[[Any], Any], str]] = [
    (lambda p: quantize_weights(p, DType.FP8_E8M0FNU), "is for scales"),
    (lambda p: quantize_weights(p, "int3"), "dtype must be one of"),
    (lambda p: quantize_weights(p, DType.INT8, scale_dtype=DType.FP8_E8M0FNU), "scale_dtype must be None"),
    (lambda p: quantize_weights(p, DType.FP8_E5M2, QScheme.ASYMMETRIC), "qscheme must be symmetric"),
    (lambda p: quantize_weights(p, DType.FP4_E2M1FN), "needs granularity per_block"),
    (
        lambda p: quantize_weights(
            p, DType.FP4_E2M1FN, granularity=G.PER_BLOCK, scale_dtype=DType.FP8_E8M0FNU
        ),
        "scale_dtype must be None",
    ),
    (lambda p: quantize_weights(p, DType.FP8_E5M2, scale_dtype=DType.INT8), "fp8_e8m0fnu"),
    (
        lambda p: quantize_weights(p, DType.INT8, granularity=G.PER_GROUPED_CHANNEL),
        "granularity must be one of",
    ),
    (lambda p: quantize_weights(p, DType.INT8, block_size=0), "block_size must be"),
    (lambda p: quantize_weights(p, DType.INT8, weight_num_threshold="1"), "weight_num_threshold must be"),
    (lambda p: palettize_weights(p, None, enable_per_channel_scale=True, cluster_dim=2), "cluster_dim 1"),
    (lambda p: palettize_weights(p, DType.INT4), "lut_dtype must be one of"),
    (lambda p: palettize_weights(p, None, 5), "n_bits must be one of"),
    (lambda p: palettize_weights(p, None, granularity=G.PER_BLOCK), "granularity must be one of"),
    (lambda p: sparsify_weights(p, 0.5, n_m_ratio=(1, 2)), "one of target_sparsity and n_m_ratio"),
    (lambda p: sparsify_weights(p, None), "one of target_sparsity and n_m_ratio"),
    (lambda p: sparsify_weights(p, 1.5), r"target_sparsity must be in \[0, 1\]"),
    (lambda p: sparsify_weights(p, quantize_dtype=DType.INT8, palettize_nbits=4), "exclude each other"),
    (lambda p: sparsify_weights(p, quantize_dtype=DType.INT4), "quantize_dtype must be one of"),
    (lambda p: sparsify_weights(p, palettize_nbits=5), "palettize_nbits must be"),
    (lambda p: sparsify_weights(p, block_size=1), "block_size must be"),
    (lambda p: sparsify_weights(p, None, n_m_ratio=(1, 2, 3)), "two whole numbers"),
    (lambda p: sparsify_weights(p, None, n_m_ratio=(1.0, 2)), "two whole numbers"),
    (lambda p: sparsify_weights(p, None, n_m_ratio=(0, 0)), "m > 0"),
    (lambda p: sparsify_weights(p, None, n_m_ratio=(3, 2)), "0 <= n <= m"),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_arguments(call: Callable[[Any], Any], words: str, linear: Any):
    with pytest.raises(ValueError, match=words):
        call(linear)


def test_programs_only():
    for call in (lambda: quantize_weights(nn.ReLU(), DType.INT8), lambda: sparsify_weights(None)):
        with pytest.raises(TypeError, match="coreai_program must be"):
            call()
    with pytest.raises(TypeError, match="lut_dtype"):
        palettize_weights(None)  # type: ignore[call-arg]


def test_masks():
    ties = torch.tensor([[1.0, 2, 2, 2], [3, 4, 5, 6]])
    assert magnitude_mask(ties, 0.25).int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert magnitude_mask(ties, 0.5).int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert magnitude_mask(ties, 0.0).all()
    assert not magnitude_mask(ties, 1.0).any()
    blocks = torch.tensor([[1.0, 9], [1, 9], [5, 1], [5, 1]])
    assert block_mask(blocks, 0.5, 2, 0).int().tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]
    assert nm_mask(torch.tensor([[1.0, -2, 3, -4, 8, 7, 6, 5]]), 2, 4, 1).int().tolist() == [
        [0, 0, 1, 1, 1, 1, 0, 0]
    ]
    assert nm_mask(torch.tensor([[1.0, -2, 3, -4, 8]]), 1, 2, 1).int().tolist() == [[0, 1, 0, 1, 1]]
    # Groups wider than the kernel takes.
    wide = torch.arange(1.0, 81)[None]
    assert nm_mask(wide, 30, 40, 1).int().tolist() == [([0] * 30 + [1] * 10) * 2]
