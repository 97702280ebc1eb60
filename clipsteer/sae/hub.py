"""SAEs on the Hugging Face hub: what of a repository is fetched, and where in it SAEs lie."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path, PurePosixPath

PREFIX = "hf-hub:"
_SECONDS = 10
# the files of an SAE, whatever the library
_FILES = (
    "cfg.json",
    "config.json",
    "model.safetensors",
    "sae_weights.safetensors",
    "sae.safetensors",
    "ae.pt",
    "sae.pt",
    "weights.pt",
    "n_images_*.pt",
)
# which of them, together, make a folder one of an SAE
_SETS = (
    {"cfg.json", "model.safetensors"},
    {"cfg.json", "sae_weights.safetensors"},
    {"cfg.json", "sae.safetensors"},
    {"config.json", "ae.pt"},
    {"config.json", "weights.pt"},
    {"sae.pt"},
)


def has_sae(names: Set[str]) -> bool:
    """Whether files of these names, in one folder, are those of an SAE."""
    images = any(name.startswith("n_images_") and name.endswith(".pt") for name in names)
    return images or any(names >= together for together in _SETS)


def parse_hub(path: str) -> tuple[str, str]:
    """ "hf-hub:org/repo/sub/folder" -> ("org/repo", "sub/folder"). Raises ValueError."""
    parts = path.removeprefix(PREFIX).split("/")
    if len(parts) < 2 or not all(parts) or any(part in (".", "..") for part in parts):
        raise ValueError(
            "SAE.from_pretrained: expected 'hf-hub:org/repo', 'hf-hub:org/repo/subfolder' or "
            f"'hf-hub:org/repo/file.pt', got {path!r}"
        )
    return "/".join(parts[:2]), "/".join(parts[2:])


def download(path: str) -> Path:
    """The folder, or the file, that "hf-hub:…" names, on this machine.

    Raises ValueError, RuntimeError naming the alternative, FileNotFoundError.
    """
    repo, inside = parse_hub(path)
    alternative = f"download the folder by hand and pass its path in place of {path!r}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise RuntimeError(
            f"reading {path!r} needs huggingface_hub; install it, or {alternative}"
        ) from error
    patterns = [str(PurePosixPath(inside, name)) for name in _FILES]
    if PurePosixPath(inside).suffix in (".pt", ".pth"):
        patterns = [inside, str(PurePosixPath(inside).parent / "config.json")]
    try:
        root = snapshot_download(repo, allow_patterns=patterns)
    except Exception as error:
        raise RuntimeError(
            f"the hub did not give {repo!r} ({type(error).__name__}: {error}); {alternative}"
        ) from error
    found = Path(root) / inside
    if not found.exists():
        listed = folders(path)
        there = f"; it has some in {', '.join(listed[:40])}" if listed else ""
        raise FileNotFoundError(f"the hub repository {repo!r} has no SAE in {inside!r}{there}")
    return found


def folders(path: str) -> list[str]:
    """The folders of the repository that have the files of an SAE, as "hf-hub:…" names; none where
    the hub cannot say."""
    repo, _ = parse_hub(path)
    try:
        from huggingface_hub import model_info

        # unlike list_repo_files it gives up at once where there is no network
        files = model_info(repo, timeout=_SECONDS).siblings or []
        names = [PurePosixPath(file.rfilename) for file in files]
    except Exception:
        return []
    inside: dict[PurePosixPath, set[str]] = {}
    for name in names:
        inside.setdefault(name.parent, set()).add(name.name)
    return [f"{PREFIX}{repo}/{folder}" for folder in sorted(inside) if has_sae(inside[folder])]
