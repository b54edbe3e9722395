"""The figures of compressed models, and the page that shows them."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coreai_opt.inspection import bits_per_weight, figures, report, scalars
from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, ModuleKMeansPalettizerConfig
from coreai_opt.palettization import PalettizationSpec as Palettes
from coreai_opt.palettization.spec import PerGroupedChannelGranularity
from coreai_opt.pruning import (
    MagnitudePruner,
    MagnitudePrunerConfig,
    ModuleMagnitudePrunerConfig,
    PruningSpec,
)
from coreai_opt.pruning.spec import ChannelStructured, NMStructured
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, Quantizer, QuantizerConfig
from coreai_opt.quantization.spec import PerBlockGranularity

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def quantized(weight: QuantizationSpec, activations: QuantizationSpec | None = None) -> nn.Module:
    acts = None if activations is None else {"*": activations}
    config = ModuleQuantizerConfig(op_state_spec={"weight": weight}, op_input_spec=acts, op_output_spec=None)
    return (
        Quantizer(model(), QuantizerConfig(global_config=config, execution_mode="eager")).prepare((X,)).eval()
    )


def tensors(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in found["tensors"]}


def test_quantized_weights():
    spec = QuantizationSpec(dtype="int4", float_range=[-0.1, 0.1])
    net = quantized(spec)
    found = figures(net)
    assert found["model"]["total_bits"] == bits_per_weight(net).total_bits
    entry = tensors(found)["0.weight"]
    weight = net[0].parametrizations.weight.original
    (compression,) = entry["compression"]
    assert compression["dtype"] == "int4"
    step = 0.1 / 7.5
    assert compression["clipped"] == pytest.approx(
        ((weight > 7.5 * step) | (weight < -8.5 * step)).float().mean().item(), abs=1e-6
    )
    values = net[0].weight
    at_the_ends = ((values == values.min()) | (values == values.max())).float().mean().item()
    assert compression["saturated"] == pytest.approx(at_the_ends, abs=2 / 512)
    expected = ((values - weight) ** 2).sum() / (weight**2).sum()
    assert entry["relative_error"] == pytest.approx(expected.item(), rel=1e-5)
    assert sum(entry["histogram"]) == 512
    assert (entry["minimum"], entry["maximum"]) == (values.min().item(), values.max().item())
    assert "compression" not in tensors(found)["0.bias"]


def test_blocks_are_judged_by_their_own_range():
    net = quantized(QuantizationSpec(dtype="int8", granularity=PerBlockGranularity(axis=1, block_size=8)))
    (compression,) = tensors(figures(net))["0.weight"]["compression"]
    assert compression["blocks"] == 64
    assert compression["clipped"] == 0
    assert 1 / 16 < compression["saturated"] < 0.2


def test_activations_are_watched_in_a_forward():
    net = quantized(QuantizationSpec(dtype="int8"), QuantizationSpec(dtype="int8", float_range=[-0.5, 0.5]))
    without = figures(net)["activations"]
    assert [entry["name"] for entry in without] == ["0.linear_quantize_input", "2.linear_quantize_input"]
    assert all("clipped" not in entry for entry in without)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    hooks = [dict(module._forward_pre_hooks) for module in net.modules()]
    found = figures(net, (X,))["activations"]
    step = 0.5 / 127.5
    clipped = ((-128.5 * step > X) | (127.5 * step < X)).float().mean().item()
    assert found[0]["clipped"] == pytest.approx(clipped, abs=1e-6)
    assert clipped > 0.3
    assert found[0]["minimum"] == pytest.approx(-0.5, rel=0.01)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [dict(module._forward_pre_hooks) for module in net.modules()] == hooks


def test_palettes_and_their_dead_entries():
    net = model()
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight.sign())
    spec = Palettes(n_bits=2, granularity=PerGroupedChannelGranularity(axis=0, group_size=4))
    config = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    KMeansPalettizer(net, KMeansPalettizerConfig(global_config=config)).prepare((X,))
    found = tensors(figures(net))
    (signs,), (rest,) = found["0.weight"]["compression"], found["2.weight"]["compression"]
    # Two values fill two of four entries.
    assert (signs["palettes"], signs["entries"], signs["dead_entries"], signs["dead"]) == (8, 32, 16, 0.5)
    assert (rest["palettes"], rest["dead_entries"]) == (1, 0)
    assert found["0.weight"]["relative_error"] == 0


@pytest.mark.parametrize(
    ("scheme", "sparsity", "pattern"),
    [
        (None, 0.5, "unstructured"),
        (NMStructured(m=4, axis=1), 0.5, "2 of 4"),
        (ChannelStructured(axis=0), 0.5, "whole output channels"),
        (ChannelStructured(axis=1), 0.5, "whole input channels"),
        (None, 0.0, "dense"),
    ],
)
def test_masks(scheme: Any, sparsity: float, pattern: str):
    arguments = {} if scheme is None else {"pruning_scheme": scheme}
    spec = PruningSpec(target_sparsity=sparsity, **arguments)
    config = ModuleMagnitudePrunerConfig(op_state_spec={"weight": spec})
    net = MagnitudePruner(model(), MagnitudePrunerConfig(global_config=config)).prepare((X,))
    (compression,) = tensors(figures(net))["0.weight"]["compression"]
    assert compression["sparsity"] == pytest.approx(sparsity)
    assert compression["pattern"] == pattern
    picture = torch.tensor(compression["picture"])
    assert picture.shape == (32, 16)
    assert torch.equal(picture, net[0].parametrizations.weight[0].mask)


class Page(HTMLParser):
    """Checks that tags close in order, and lists what a page would load."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.counts: dict[str, int] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_file(tmp_path: Path):
    net = quantized(QuantizationSpec(dtype="int4", float_range=[-0.1, 0.1]), QuantizationSpec(dtype="uint8"))
    found = report(net, tmp_path / "report.html", (X,))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.loaded == []
    assert "script" not in page.counts
    assert page.counts["svg"] == 4
    for entry in (*found["tensors"], *found["activations"]):
        assert entry["name"] in page.text
    assert f"{found['model']['bytes']:,}" in page.text
    assert found == figures(net, (X,))


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# What the page looks like once it is laid out, written where --dump-dom shows it.
PROBE = """<script>
const seen = [...document.querySelectorAll("svg")].filter(each => each.getBoundingClientRect().height > 10);
const rows = document.querySelectorAll("tr").length;
const overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.title = `pictures=${seen.length} overflow=${overflow} rows=${rows}`;
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_in_a_browser(tmp_path: Path):
    net = quantized(QuantizationSpec(dtype="int4"), QuantizationSpec(dtype="uint8"))
    report(net, tmp_path / "report.html", (X,))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", "--dump-dom"]
    flags.append(f"--user-data-dir={tmp_path / 'profile'}")
    run = subprocess.run(
        [str(CHROMIUM), *flags, probed.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    # A picture of each tensor; two headings, four tensors, and the activations.
    assert "<title>pictures=4 overflow=0 rows=8</title>" in run.stdout


def mean_of_two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


def test_graphs():
    inputs = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)
    graph = Quantizer(mean_of_two_layers(), QuantizerConfig()).prepare(inputs)
    state = {name: value.clone() for name, value in graph.state_dict().items()}
    found = figures(graph, inputs)
    assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())
    entry = tensors(found)["0.weight"]
    # Values and a scale for each channel; the convolution reads its weight as the norm behind it scales it.
    assert entry["bits"] == 108 * 8 + 4 * 32
    assert entry["relative_error"] < 1e-3
    norm = mean_of_two_layers()[1]
    scaled = mean_of_two_layers()[0].weight / (norm.running_var + norm.eps).sqrt().reshape(-1, 1, 1, 1)
    assert entry["minimum"] == pytest.approx(scaled.min().item(), abs=0.01)
    eager = Quantizer(mean_of_two_layers(), QuantizerConfig(execution_mode="eager")).prepare(inputs)
    assert found["model"]["total_bits"] == figures(eager)["model"]["total_bits"]
    assert all("clipped" in each for each in found["activations"])


def test_names_are_escaped(tmp_path: Path):
    net = nn.ModuleDict({"<b>&": nn.Linear(2, 2)})
    report(net, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "<b>&.weight" in page.text
    assert "b" not in {tag for tag in page.counts if page.counts[tag] != 3}


def test_figures_for_loggers():
    net = quantized(QuantizationSpec(dtype="int4"), QuantizationSpec(dtype="int8"))
    found = figures(net, (X,))
    json.dumps(found)
    flat = scalars(found)
    assert flat["model/bits_per_weight"] == found["model"]["bits_per_weight"]
    assert flat["0.weight/bits"] == 512 * 4 + 32
    assert flat["0.weight/compression/quantization/clipped"] == 0.0
    assert 0 <= flat["0.linear_quantize_input/saturated"] <= 1
    assert all(isinstance(value, float) for value in flat.values())


def test_other_models(tmp_path: Path):
    found = figures(nn.Sequential(nn.Embedding(4, 4), nn.BatchNorm1d(4)))
    assert tensors(found)["1.num_batches_tracked"]["histogram"] == [1]
    with pytest.raises(TypeError, match="example_inputs must be a tuple"):
        figures(quantized(QuantizationSpec(dtype="int8")), X)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="graph has no quantizers"):
        report(torch.fx.symbolic_trace(nn.ReLU()), tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_inputs_by_keyword():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 8)

        def forward(self, x: Tensor, *, scale: float) -> Tensor:
            return self.layer(x) * scale

    inputs = {"x": torch.randn(4, 32), "scale": 2.0}
    prepared = Quantizer(Scaled(), QuantizerConfig(execution_mode="eager")).prepare(inputs)
    prepared(inputs["x"], scale=2.0)
    activations = figures(prepared, inputs)["activations"]
    assert activations
    assert all(entry["clipped"] is not None for entry in activations)


def test_what_has_no_figures():
    with pytest.raises(RuntimeError, match="'weight' is on the meta device and has no values"):
        figures(nn.Linear(4, 4, device="meta"))
    for function in (figures, bits_per_weight):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module; got NoneType"):
            function(None)  # type: ignore[operator]
