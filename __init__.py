"""QVD as a ComfyUI custom-node folder: ComfyUI imports this file when the repository is in `custom_nodes/`.

The packages are loaded from this folder under their own names, whether or not QVD is also pip-installed, and without
touching the import path: there is one copy of them in the process, the one beside this file.
"""

import importlib.util
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def _load_package(name: str) -> None:
    if name in sys.modules:
        return
    folder = _HERE / name
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


WEB_DIRECTORY = "./web"

# Where there is no ComfyUI this folder is no node pack: pytest, for one, imports every __init__.py above a test.
if importlib.util.find_spec("comfy_api") is not None:
    for _name in ("qvd_core", "qvd_nodes"):
        _load_package(_name)
    comfy_entrypoint = sys.modules["qvd_nodes"].comfy_entrypoint
