"""ComfyUI's folders: all below a temporary one, which tests replace (`stub_control.use_folder`)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

base_path = os.path.join(tempfile.gettempdir(), "qvd-comfyui-stub")
models_dir = os.path.join(base_path, "models")
folder_names_and_paths: dict[str, tuple[list[str], set[str]]] = {
    "diffusion_models": ([os.path.join(models_dir, "diffusion_models")], {".safetensors"})
}

_base = Path(base_path)


def get_output_directory() -> str:
    return str(_base / "output")


def get_temp_directory() -> str:
    return str(_base / "temp")


def get_user_directory() -> str:
    return str(_base / "user")


def add_model_folder_path(folder_name: str, full_folder_path: str, is_default: bool = False) -> None:
    """Search one more folder for a kind of files; a new kind begins without any file name extensions."""
    folders, _ = folder_names_and_paths.setdefault(folder_name, ([], set()))
    if full_folder_path not in folders:
        folders.insert(0 if is_default else len(folders), full_folder_path)


def get_filename_list(folder_name: str) -> list[str]:
    """The files of a kind by their paths below its folders."""
    folders, extensions = folder_names_and_paths[folder_name]
    names = {
        path.relative_to(folder).as_posix()
        for folder in folders
        for path in Path(folder).rglob("*")
        if path.is_file() and (not extensions or path.suffix.lower() in extensions)
    }
    return sorted(names)


def get_full_path(folder_name: str, filename: str) -> str | None:
    """Where a file of a kind is; a name cannot lead out of the kind's folders."""
    inside = os.path.relpath(os.path.join("/", filename), "/")
    for folder in folder_names_and_paths.get(folder_name, ([], set()))[0]:
        path = os.path.join(folder, inside)
        if os.path.isfile(path):
            return path
    return None


def get_full_path_or_raise(folder_name: str, filename: str) -> str:
    path = get_full_path(folder_name, filename)
    if path is None:
        raise FileNotFoundError(f"no file {filename} in {folder_name}")
    return path


def get_save_image_path(
    filename_prefix: str, output_dir: str, image_width: int = 0, image_height: int = 0
) -> tuple[str, str, int, str, str]:
    """Folder (made where missing), name, next free number, folder below `output_dir`, prefix. No %variables%."""
    subfolder, name = os.path.split(os.path.normpath(filename_prefix))
    folder = os.path.join(output_dir, subfolder)
    if os.path.commonpath([os.path.abspath(output_dir), os.path.abspath(folder)]) != os.path.abspath(output_dir):
        raise Exception(f"{folder} is outside of the output folder")
    os.makedirs(folder, exist_ok=True)
    numbers = [file.removeprefix(f"{name}_")[:5] for file in os.listdir(folder) if file.startswith(f"{name}_")]
    counter = 1 + max((int(number) for number in numbers if number.isdigit()), default=0)
    return folder, name, counter, subfolder, filename_prefix
