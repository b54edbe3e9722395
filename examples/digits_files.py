"""A quantized classifier of handwritten digits as files: written, then run by the runtimes that read them.

    python examples/digits_files.py               # trains a network first; --out says where the files go

Kinds of files whose packages are not installed are left out: the extras ``coreai`` and ``onnx`` bring them.
"""

import argparse
import asyncio
import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from digits_model import DigitsNet, load_data
from torch import Tensor, nn
from training import accuracy, predict, train

from coreai_opt.export import save
from coreai_opt.quantization import Quantizer


def run_core_ai(path: Path, images: Tensor) -> Tensor:
    """Scores that a Core AI program computes."""
    from coreai.authoring import AIModelAsset
    from coreai.runtime import NDArray

    async def call() -> Tensor:
        async with AIModelAsset.load(path).executable() as executable:
            outputs = await executable.load_function("main")(inputs={"images": NDArray(images)})
            return torch.from_numpy(outputs["output"].numpy().copy())

    return asyncio.run(call())


def run_onnx(path: Path, images: Tensor) -> Tensor:
    """Scores that ONNX Runtime computes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Fused, products of 8-bit integers saturate on CPUs without VNNI.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


RUNTIMES: dict[str, tuple[str, Callable[[Path, Tensor], Tensor]]] = {
    ".aimodel": ("coreai_torch", run_core_ai),
    ".onnx": ("onnxruntime", run_onnx),
}


def write_and_run(model: nn.Module, images: Tensor, labels: Tensor, folder: Path) -> dict[str, float]:
    """Write a prepared model as each kind of file, run each, and print what it computes.

    Returns:
        The accuracy of each, by suffix.
    """
    folder.mkdir(parents=True, exist_ok=True)
    accuracies = {}
    for suffix, (package, run) in RUNTIMES.items():
        if importlib.util.find_spec(package) is None:
            print(f"{suffix:10} left out: {package} is not installed")
            continue
        saved = save(model, folder / f"digits{suffix}", (images,), progress=False)
        accuracies[suffix] = accuracy(run(saved.path, images), labels)
        print(
            f"{suffix:10} {saved.size / 1024:6.0f} KiB   test accuracy {accuracies[suffix]:.2%}   "
            f"outputs differ by {saved.difference:.1e}"
        )
    return accuracies


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    data = load_data(options.seed)
    model = DigitsNet(options.width)
    train(model, data, "float32", epochs=options.epochs, learning_rate=1e-3, seed=options.seed)
    scores = predict(model, data.test_images)
    print(f"float32    {'':10}   test accuracy {accuracy(scores, data.test_labels):.2%}")
    quantizer = Quantizer(copy.deepcopy(model).eval())
    prepared = quantizer.prepare((data.test_images,))
    with quantizer.calibration_mode(), torch.no_grad():
        prepared(data.train_images[: len(data.test_images)])
    return write_and_run(prepared, data.test_images, data.test_labels, options.out)


if __name__ == "__main__":
    main()
