"""Small models with configurations: each shows one rule of graph mode's placement.

Public names only: the same file runs on both packages.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreai_opt import ExportBackend
from coreai_opt.palettization import KMeansPalettizer
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, QuantizerConfig
from coreai_opt.quantization.config.quantization_config import KVCacheQuantConfig, OpQuantizerConfig
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity

__all__ = ["PROBES", "Probe"]

# A model, its inputs, and how to quantize it.
Probe = tuple[nn.Module, tuple[Any, ...], QuantizerConfig]
PROBES: dict[str, Callable[[], Probe]] = {}


def probe(function: Callable[[], Probe]) -> Callable[[], Probe]:
    PROBES[function.__name__] = function
    return function


class Function(nn.Module):
    """A model whose forward is a function of the model and its inputs."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def x(*shape: int) -> Tensor:
    return torch.randn(shape)


def asymmetric(dtype: str = "int8") -> QuantizationSpec:
    return QuantizationSpec(dtype=dtype, qscheme="asymmetric")


def only(**specs: Any) -> ModuleQuantizerConfig:
    """Nothing but what is given."""
    return ModuleQuantizerConfig(
        **{"op_input_spec": None, "op_output_spec": None, "op_state_spec": None, **specs}
    )


def everywhere(**specs: Any) -> QuantizerConfig:
    return QuantizerConfig(global_config=ModuleQuantizerConfig(**specs))


def mlp(middle: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), middle or nn.ReLU(), nn.Linear(6, 3))


@probe
def linear_relu_linear() -> Probe:
    return mlp(), (x(2, 4),), QuantizerConfig()


@probe
def fixed_ranges() -> Probe:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Tanh())
    return model, (x(2, 4),), QuantizerConfig()


@probe
def conv_bn_relu6_pool() -> Probe:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    return model.eval(), (x(2, 3, 8, 8),), QuantizerConfig()


def conv_bn(channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))


@probe
def residual() -> Probe:
    model = Function(
        lambda m, t: torch.relu(m.second(torch.relu(m.first(t))) + t), first=conv_bn(), second=conv_bn()
    )
    return model, (x(2, 3, 6, 6),), QuantizerConfig()


@probe
def parallel_conv_bn() -> Probe:
    model = Function(
        lambda m, t: m.first(t) + m.second(t) * m.third(t),
        first=conv_bn(),
        second=conv_bn(),
        third=nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
    )
    return model, (x(2, 3, 6, 6),), QuantizerConfig()


@probe
def tied_embedding() -> Probe:
    model = Function(lambda m, t: m.head(m.emb(t)), emb=nn.Embedding(7, 4), head=nn.Linear(4, 7, bias=False))
    model.head.weight = model.emb.weight  # type: ignore[assignment, union-attr]
    return model, (torch.arange(5),), QuantizerConfig()


@probe
def tied_embedding_one_declined() -> Probe:
    model, inputs, _ = tied_embedding()
    return model, inputs, QuantizerConfig(module_name_configs={"emb": None})


@probe
def blocks_that_do_not_fit() -> Probe:
    spec = QuantizationSpec(granularity=PerBlockGranularity(block_size=4, axis=1))
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    return model, (x(2, 4),), QuantizerConfig(global_config=only(op_state_spec={"weight": spec}))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, t: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(2, 3, 2, 4).transpose(1, 2)

        q, k, v = heads(self.q(t)), heads(self.k(t)), heads(self.v(t))
        weights = torch.softmax((q @ k.transpose(-1, -2)) * 0.5, -1)
        return self.o((weights @ v).transpose(1, 2).reshape(2, 3, 8))


@probe
def attention() -> Probe:
    return Attention(), (x(2, 3, 8),), QuantizerConfig()


@probe
def multihead_attention() -> Probe:
    model = Function(
        lambda m, t: m.mha(t, t, t, need_weights=False)[0], mha=nn.MultiheadAttention(4, 2, batch_first=True)
    )
    return model.eval(), (x(2, 3, 4),), QuantizerConfig()


@probe
def cat_of_two_activations() -> Probe:
    model = Function(
        lambda m, t: torch.cat([torch.relu(m.a(t)), torch.sigmoid(m.b(t))], 1),
        a=nn.Conv2d(2, 3, 1),
        b=nn.Conv2d(2, 3, 1),
    )
    return model, (x(1, 2, 4, 4),), QuantizerConfig()


@probe
def view_and_reshape() -> Probe:
    model = Function(
        lambda m, t: m.l2(torch.relu(m.l1(t)).view(2, 2, 3).reshape(2, 6)),
        l1=nn.Linear(4, 6),
        l2=nn.Linear(6, 2),
    )
    return model, (x(2, 4),), QuantizerConfig()


@probe
def dropout_between() -> Probe:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2))
    return model.eval(), (x(2, 4),), QuantizerConfig()


@probe
def dropout_and_no_outputs() -> Probe:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2))
    return model.eval(), (x(2, 4),), everywhere(op_output_spec=None)


@probe
def op_type_linear_none() -> Probe:
    return mlp(), (x(2, 4),), everywhere(op_type_config={"linear": None})


@probe
def op_type_relu_none() -> Probe:
    return mlp(), (x(2, 4),), everywhere(op_type_config={"relu": None})


@probe
def op_name_none() -> Probe:
    return mlp(), (x(2, 4),), everywhere(op_name_config={"linear_1": None})


@probe
def type_level() -> Probe:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    linear = ModuleQuantizerConfig(
        op_input_spec={"*": asymmetric("uint8")}, op_output_spec={"*": asymmetric("uint8")}
    )
    return model, (x(1, 1, 4, 4),), QuantizerConfig(module_type_configs={nn.Linear: linear})


def two_readers(second: Any) -> Probe:
    model = Function(lambda m, t: (m.l1(t), m.l2(t)), l1=nn.Linear(4, 2), l2=nn.Linear(4, 2))
    inputs = {"*": QuantizationSpec()}
    config = QuantizerConfig(global_config=only(op_input_spec=inputs))
    return model, (x(2, 4),), config.set_module_name("l2", second)


@probe
def two_readers_of_two_schemes() -> Probe:
    return two_readers(only(op_input_spec={"*": asymmetric()}))


@probe
def two_readers_of_two_dtypes() -> Probe:
    return two_readers(only(op_input_spec={"*": asymmetric("uint8")}))


@probe
def two_readers_one_declined() -> Probe:
    return two_readers(None)


class Boundary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, t: Tensor) -> Tensor:
        return F.softplus(self.fc(self.norm(t)))


@probe
def module_boundary() -> Probe:
    model = Function(lambda m, t: m.o(m.a(t)), a=Boundary(), o=nn.Linear(4, 2))
    entry = ModuleQuantizerConfig(
        module_input_spec={0: asymmetric("uint8")}, module_output_spec={0: asymmetric("uint8")}
    )
    return model, (x(2, 4),), QuantizerConfig(module_name_configs={"a": entry})


@probe
def module_states() -> Probe:
    model = Function(lambda m, t: m.o(m.a(t)), a=Boundary(), o=nn.Linear(4, 2))
    weight = QuantizationSpec(granularity=PerChannelGranularity(axis=0))
    entry = ModuleQuantizerConfig(module_state_spec={"*": weight})
    return model, (x(2, 4),), QuantizerConfig(module_type_configs={nn.LayerNorm: entry})


@probe
def nested_boundaries() -> Probe:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = nn.Sequential(nn.Sequential(inner, nn.Linear(4, 4)), nn.Linear(4, 2))

    def entry(dtype: str) -> ModuleQuantizerConfig:
        return ModuleQuantizerConfig(
            module_input_spec={"*": asymmetric(dtype)}, module_output_spec={"*": asymmetric(dtype)}
        )

    return model, (x(2, 4),), QuantizerConfig(module_name_configs={"0": entry("uint8"), "0.0": entry("int4")})


@probe
def recurrent_head() -> Probe:
    model = Function(
        lambda m, t: m.fc(m.lstm(t)[0][:, -1]), lstm=nn.LSTM(3, 4, batch_first=True), fc=nn.Linear(4, 2)
    )
    return model, (x(2, 5, 3),), QuantizerConfig()


@probe
def single_elements() -> Probe:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)), (x(1, 4),), QuantizerConfig()


@probe
def one_by_one() -> Probe:
    return nn.Sequential(nn.Linear(1, 1)), (x(1, 1),), QuantizerConfig()


@probe
def palettized() -> Probe:
    model, inputs = mlp().eval(), (x(2, 4),)
    palettizer = KMeansPalettizer(model)
    palettizer.prepare(inputs)
    return palettizer.finalize(backend=ExportBackend.CoreAI), inputs, QuantizerConfig()


@probe
def mean_of_all() -> Probe:
    return Function(lambda m, t: t.mean()), (x(2, 4),), QuantizerConfig()


@probe
def gated() -> Probe:
    model = Function(
        lambda m, t: m.d(F.silu(m.g(t)) * m.u(t)), g=nn.Linear(4, 6), u=nn.Linear(4, 6), d=nn.Linear(6, 4)
    )
    return model, (x(2, 4),), QuantizerConfig()


@probe
def floats_with_blocks() -> Probe:
    activation = QuantizationSpec(dtype="float8_e4m3fn")
    weight = QuantizationSpec(dtype="float4_e2m1fn", granularity=PerBlockGranularity(block_size=32))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 40))
    config = everywhere(
        op_input_spec={"*": activation}, op_output_spec={"*": activation}, op_state_spec={"weight": weight}
    )
    return model, (x(2, 64),), config


@probe
def inputs_only() -> Probe:
    return mlp(), (x(2, 4),), QuantizerConfig(global_config=only(op_input_spec={"*": QuantizationSpec()}))


@probe
def outputs_only() -> Probe:
    return mlp(), (x(2, 4),), QuantizerConfig(global_config=only(op_output_spec={"*": QuantizationSpec()}))


@probe
def weights_only() -> Probe:
    return mlp(), (x(2, 4),), QuantizerConfig.presets.w8()


@probe
def weights_only_of_conv_bn() -> Probe:
    model = nn.Sequential(conv_bn(), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return model, (x(2, 3, 6, 6),), QuantizerConfig.presets.w4()


@probe
def inputs_int8_outputs_uint8() -> Probe:
    config = ModuleQuantizerConfig(op_output_spec={"*": asymmetric("uint8")})
    return mlp(nn.Tanh()), (x(2, 4),), QuantizerConfig(module_type_configs={nn.Linear: config})


def pool(axis: int) -> Probe:
    spec = QuantizationSpec(granularity=PerChannelGranularity(axis=axis))
    model = nn.MaxPool2d(2)
    return model, (x(2, 3, 4, 4),), everywhere(op_input_spec={"*": spec}, op_output_spec={"*": spec})


@probe
def pool_per_kept_axis() -> Probe:
    return pool(1)


@probe
def pool_per_reduced_axis() -> Probe:
    return pool(2)


def concatenation(axis: int, same: bool = False) -> Probe:
    spec = QuantizationSpec(granularity=PerChannelGranularity(axis=axis))
    model = Function(lambda m, a, b: torch.cat([a, a if same else b], 1))
    return model, (x(2, 3), x(2, 3)), everywhere(op_input_spec={"*": spec}, op_output_spec={"*": spec})


@probe
def cat_per_its_axis() -> Probe:
    return concatenation(1)


@probe
def cat_per_other_axis() -> Probe:
    return concatenation(0)


@probe
def cat_of_one_tensor() -> Probe:
    return concatenation(1, same=True)


@probe
def cat_with_a_shared_input() -> Probe:
    model = Function(
        lambda m, t: torch.cat([torch.relu(m.a(t)), torch.sigmoid(m.b(t)), t], 1),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 4),
    )
    return model, (x(2, 4),), QuantizerConfig()


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, t: Tensor) -> Tensor:
        return t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


@probe
def rms_norm() -> Probe:
    return nn.Sequential(RMSNorm(), nn.Linear(4, 2)), (x(2, 4),), QuantizerConfig()


@probe
def arithmetic() -> Probe:
    def forward(m: Any, a: Tensor, b: Tensor) -> Tensor:
        y = a + b
        y = torch.relu(y * 2 - b)
        y = F.leaky_relu(torch.add(y, a))
        y += b
        return torch.tanh(y * a) - (1 - b)

    return Function(forward), (x(2, 4), x(2, 4)), QuantizerConfig()


@probe
def matrix_products() -> Probe:
    def forward(m: Any, a: Tensor, b: Tensor) -> Tensor:
        y = torch.softmax(a @ b, -1)
        return F.gelu(torch.einsum("ij,jk->ik", y, torch.matmul(b, a)))

    return Function(forward), (x(4, 4), x(4, 4)), QuantizerConfig()


@probe
def pools_and_flatten() -> Probe:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.Hardswish(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 2, 1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    return model, (x(1, 1, 10, 10),), QuantizerConfig()


@probe
def linear_bn_and_padding() -> Probe:
    model = Function(
        lambda m, t: m.bn(m.fc(torch.relu(m.conv(t)).flatten(1))),
        conv=nn.Conv2d(1, 2, 3, padding="same"),
        fc=nn.Linear(32, 4),
        bn=nn.BatchNorm1d(4),
    )
    return model, (x(2, 1, 4, 4),), QuantizerConfig()


@probe
def transposed_convolutions() -> Probe:
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2, bias=False),
        nn.Sigmoid(),
    )
    weight = QuantizationSpec(granularity=PerChannelGranularity())
    return model, (x(2, 3, 3, 3),), everywhere(op_state_spec={"weight": weight})


@probe
def convolutions_of_three_axes() -> Probe:
    model = nn.Sequential(
        nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.ReLU(), nn.MaxPool3d(2), nn.ConvTranspose3d(2, 2, 2)
    )
    return model, (x(2, 1, 5, 5, 5),), QuantizerConfig()


@probe
def convolutions_of_one_axis() -> Probe:
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3),
        nn.BatchNorm1d(4),
        nn.SiLU(),
        nn.MaxPool1d(2),
        nn.ConvTranspose1d(4, 2, 3),
        nn.BatchNorm1d(2),
    )
    return model, (x(2, 2, 9),), QuantizerConfig()


@probe
def transposed_weight() -> Probe:
    model = Function(lambda m, t: F.linear(t, m.fc.weight.t()), fc=nn.Linear(4, 4))
    return model, (x(2, 4),), QuantizerConfig()


@probe
def linear_of_itself() -> Probe:
    return Function(lambda m, t: F.linear(t, t)), (x(4, 4),), QuantizerConfig()


@probe
def shared_module() -> Probe:
    fc = nn.Linear(4, 4)
    return Function(lambda m, t: m.b(torch.relu(m.a(t))), a=fc, b=fc), (x(2, 4),), QuantizerConfig()


@probe
def shared_module_with_an_entry() -> Probe:
    model, inputs, _ = shared_module()
    entry = ModuleQuantizerConfig(op_input_spec={0: asymmetric("uint8")}, op_output_spec={})
    return model, inputs, QuantizerConfig(module_name_configs={"b": entry})


@probe
def no_opinion_and_declined() -> Probe:
    config = QuantizerConfig(
        module_name_configs={
            "0": ModuleQuantizerConfig(op_output_spec={}),
            "2": ModuleQuantizerConfig(op_input_spec=None),
        }
    )
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, (x(2, 4),), config


@probe
def copied_over_a_reshape() -> Probe:
    model = Function(
        lambda m, t: m.l2(torch.sigmoid(m.l1(t)).reshape(4, 3)), l1=nn.Linear(4, 6), l2=nn.Linear(3, 2)
    )
    entry = ModuleQuantizerConfig(op_input_spec={"*": QuantizationSpec(float_range=[-1, 1])})
    return model, (x(2, 4),), QuantizerConfig(module_name_configs={"l2": entry})


@probe
def permuted_images() -> Probe:
    model = Function(
        lambda m, t: m.fc(m.conv(t).permute(0, 2, 3, 1)[:, 1:].unsqueeze(1).squeeze(1)).expand(2, 3, 4, 2),
        conv=nn.Conv2d(2, 4, 1),
        fc=nn.Linear(4, 2),
    )
    return model, (x(2, 2, 4, 4),), QuantizerConfig()


@probe
def per_channel_over_a_permutation() -> Probe:
    spec = QuantizationSpec(granularity=PerChannelGranularity(axis=1))
    model = Function(
        lambda m, t: m.fc(m.conv(t).permute(0, 2, 3, 1)), conv=nn.Conv2d(2, 4, 1), fc=nn.Linear(4, 2)
    )
    return model, (x(2, 2, 4, 4),), everywhere(op_input_spec={"*": spec}, op_output_spec={"*": spec})


@probe
def parent_and_child() -> Probe:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), nn.Linear(4, 2))
    config = QuantizerConfig(
        module_name_configs={
            "0": ModuleQuantizerConfig(op_input_spec={"*": asymmetric()}),
            "0.2": ModuleQuantizerConfig(op_input_spec={"*": QuantizationSpec(dtype="int4")}),
        }
    )
    return model, (x(2, 4),), config


@probe
def by_operation() -> Probe:
    model = Attention()
    op = OpQuantizerConfig(op_input_spec={0: asymmetric("uint8")}, op_output_spec={0: None})
    config = everywhere(op_type_config={"matmul": op, "linear": None}, op_name_config={"linear_3": op})
    return model, (x(2, 3, 8),), config


@probe
def dynamic_activations() -> Probe:
    spec = QuantizationSpec(qparam_calculator_cls="dynamic")
    return mlp(nn.GELU()), (x(2, 4),), everywhere(op_input_spec={"*": spec}, op_output_spec=None)


@torch.library.custom_op("parity_probes::cache_update", mutates_args=())
def cache_update(cache: Tensor, new: Tensor, position: int) -> Tensor:
    result = cache.clone()
    result[:, position] = new
    return result


@cache_update.register_fake
def _(cache: Tensor, new: Tensor, position: int) -> Tensor:
    return torch.empty_like(cache)


def _of_cache(m: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return grad, grad[:, 0], None


cache_update.register_autograd(_of_cache)


@probe
def key_value_cache() -> Probe:
    model = Function(
        lambda m, t, c: torch.ops.parity_probes.cache_update(c, m.k(t), 0) * 1.0, k=nn.Linear(4, 4)
    )
    entry = KVCacheQuantConfig(
        op_quantizer_config=OpQuantizerConfig(
            op_input_spec={1: QuantizationSpec()}, op_output_spec=None, op_state_spec=None
        )
    )
    config = QuantizerConfig(global_config=None, kv_cache_quant_configs={"cache_update": entry})
    return model, (x(2, 4), x(2, 3, 4)), config
