"""The example workflows in ComfyUI's own front end, in a headless browser: their prompts, and their pictures.

`python -m tests.comfyui.front_end` takes the pictures anew. Needs Node.js, `npm install` and Chromium (`QVD_CHROMIUM`
names it; `QVD_NODE_MODULES` a folder of packages elsewhere).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from tests.comfyui.server import ROOT, Server, comfyui_path

SCRIPT = Path(__file__).resolve().parent / "pictures.mjs"
MODULES = Path(os.environ.get("QVD_NODE_MODULES", ROOT / "node_modules"))
CHROMIUM = os.environ.get("QVD_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-headless-shell") or ""


def lacking() -> str:
    """What is missing for a browser, or an empty text."""
    if not shutil.which("node"):
        return "Node.js"
    if not (MODULES / "playwright-core").is_dir():
        return "playwright-core (npm install)"
    return "" if CHROMIUM else "Chromium"


def place_holders(server: Server) -> list[Path]:
    """Files under the names of all models (empty) and images, so that the front end misses none; the new ones."""
    made = []
    image = server.folder("input") / "example.png"
    if not image.exists():
        Image.linear_gradient("L").resize((512, 288)).convert("RGB").save(image)
        made.append(image)
    for workflow in sorted((ROOT / "examples").glob("*.json")):
        for node in json.loads(workflow.read_text())["nodes"]:
            for model in node["properties"].get("models", []):
                path = server.folder(model["directory"]) / model["name"]
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.touch()
                    made.append(path)
    return made


def open_all(server: Server, pictures: Path | None = None) -> dict[str, dict[str, Any]]:
    """What the browser says of each workflow (see pictures.mjs), by name; writes `<name>.jpg` into `pictures`."""
    command = ["node", str(SCRIPT), server.url, str(ROOT), *([str(pictures)] if pictures else [])]
    environment = os.environ | {"QVD_CHROMIUM": CHROMIUM, "QVD_NODE_MODULES": str(MODULES)}
    made = place_holders(server)
    try:
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    finally:
        for path in made:
            path.unlink()
    if ran.returncode:
        raise RuntimeError(f"the browser ended with code {ran.returncode}: {ran.stderr[-2000:]}")
    return {entry["name"]: entry for entry in map(json.loads, ran.stdout.splitlines())}


def main() -> None:
    """Take the pictures."""
    path = comfyui_path()
    if path is None or lacking():
        sys.exit(f"needs {lacking() or 'COMFYUI_PATH'}")
    with Server(path) as server:
        for name, entry in open_all(server, ROOT / "examples").items():
            print(name, *entry["overlaps"], *entry["complaints"])


if __name__ == "__main__":
    main()
