"""Where the pack's files live: bundled assets, and model folders that merge with what the user configured in the host."""

from __future__ import annotations

from pathlib import Path

import folder_paths

ASSETS = Path(__file__).resolve().parents[2] / "assets"
NEGATION_SETS = "negation_sets"
BUNDLED_SUFFIX = " (bundled)"
EXTENSIONS = {".safetensors"}


def register_model_folders() -> None:
    """Make `models/negation_sets` known to the host, keeping folders that `extra_model_paths` already added."""
    default = str(Path(folder_paths.models_dir) / NEGATION_SETS)
    paths, _ = folder_paths.folder_names_and_paths.get(NEGATION_SETS, ([], set()))
    folder_paths.folder_names_and_paths[NEGATION_SETS] = (list(dict.fromkeys([*paths, default])), EXTENSIONS)


def negation_set_names() -> list[str]:
    """Names to choose from: bundled sets first, then files of the model folders."""
    bundled = sorted(path.stem + BUNDLED_SUFFIX for path in (ASSETS / NEGATION_SETS).glob("*.safetensors"))
    return bundled + folder_paths.get_filename_list(NEGATION_SETS)


def negation_set_path(name: str) -> Path:
    """The file behind a name from `negation_set_names`.

    Raises:
        FileNotFoundError: no such set; the message says where it belongs.
    """
    if name.endswith(BUNDLED_SUFFIX):
        path = ASSETS / NEGATION_SETS / f"{Path(name.removesuffix(BUNDLED_SUFFIX)).name}.safetensors"
        if path.is_file():
            return path
    else:
        found = folder_paths.get_full_path(NEGATION_SETS, name)
        if found is not None:
            return Path(found)
    raise FileNotFoundError(f"There is no negation set named '{name}'. Put its file into models/{NEGATION_SETS} or choose another.")
