"""Apple's package, in a process of its own: where it is, and how it is asked."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import coreai_kernels

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
    """The answer of `jobs.main` to ``job``; ``folder`` receives the files in between.

    Args:
        job: what to do.
        folder: for the files.
        accelerated: with the plugin that puts the engine under Apple's package.

    Raises:
        RuntimeError: if the process fails; the text is what it wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job_file, result_file = folder / "job.pickle", folder / "result.pickle"
    # The engine under test, and the plugin's source in case that it is not installed beside it.
    engine = [str(Path(str(coreai_kernels.__file__)).parents[1]), str(ROOT / "kernels")]
    facts = {"package_folder": str(FOLDER.resolve()), "engine": engine if accelerated else []}
    job_file.write_bytes(pickle.dumps(job | facts))
    # -P and no PYTHONPATH: the package under test must be the one in the oracle's folder, whoever starts us.
    program = (
        f"import sys; sys.path.append({str(ROOT)!r}); "
        f"from {__package__}.jobs import main; main(*sys.argv[1:])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # The plugin may be installed here, and would be activated by the import.
    environment["COREAI_ACCELERATE"] = str(int(accelerated))
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(job_file), str(result_file)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the oracle process failed:\n{done.stderr[-5000:]}")
    return pickle.loads(result_file.read_bytes())
