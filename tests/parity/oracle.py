"""Apple's package, in a process of its own: where it is, and how it is asked."""

import os
import pickle
from pathlib import Path
from typing import Any

import coreai_kernels
from tests import forked

__all__ = ["INSTALL", "ask", "find"]

ROOT = Path(__file__).parents[2]
VERSION = "0.4.0"
FOLDER = Path(os.environ.get("COREAI_ORACLE", ROOT / ".oracle"))
INSTALL = (
    f"the parity tests need Apple's coreai-opt {VERSION} in {FOLDER} (COREAI_ORACLE names another folder): "
    f"pip install --no-deps --target .oracle coreai-opt=={VERSION}"
)


def find() -> bool:
    """Whether the oracle is there, in the version that we compare with."""
    return (FOLDER / "coreai_opt" / "__init__.py").exists() and bool(
        list(FOLDER.glob(f"coreai_opt-{VERSION}.dist-info"))
    )


def ask(job: dict[str, Any], folder: Path, accelerated: bool = False) -> Any:
    """The answer of `jobs.main` to ``job``, in a process of its own; ``folder`` receives its files.

    Args:
        job: what to do. ``keep_traces``: False for a release that `torchao_patterns` is not for.
        folder: for files in between.
        accelerated: with the plugin that puts the engine under Apple's package.

    Raises:
        RuntimeError: if the process fails; the text is what it wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job_file, result_file = folder / "job.pickle", folder / "result.pickle"
    job_file.write_bytes(pickle.dumps(job))
    # The engine under test, and the plugin's source in case that it is not installed beside it.
    engine = [str(Path(str(coreai_kernels.__file__)).parents[1]), str(ROOT / "kernels")]
    # The package under test must be the one in the oracle's folder, whoever starts us. The plugin may be
    # installed here, and would be activated by the import.
    package = str(FOLDER.resolve())
    imports = (
        f"import os, sys; sys.path.append({str(ROOT)!r}); os.environ['COREAI_ACCELERATE'] = '0'; "
        f"from {__package__}.jobs import load, main; "
        f"load({package!r}, {job.get('keep_traces', True)})"
    )
    script = f"main({str(job_file)!r}, {str(result_file)!r}, {accelerated})"
    done = forked.run(script, imports, [package, *engine], COREAI_ACCELERATE=str(int(accelerated)))
    if done.returncode:
        raise RuntimeError(f"the oracle process failed:\n{done.stderr[-5000:]}")
    return pickle.loads(result_file.read_bytes())
