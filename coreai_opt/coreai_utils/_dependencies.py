"""Says what to install where Core AI's packages are missing."""

import importlib

for _name in ("coreai", "coreai_torch", "ml_dtypes"):
    try:
        importlib.import_module(_name)
    except ImportError as error:
        raise ImportError(
            f"coreai_opt.coreai_utils needs the package {_name}: pip install coreai-torch "
            f"(or coreai-opt-fused[coreai])"
        ) from error
