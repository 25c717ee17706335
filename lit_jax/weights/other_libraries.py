"""Recognise the folders of other libraries, and read the pooling of sentence-transformers."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from lit_jax.files import parse_json

_CONVERT = "use a copy of the model that transformers wrote"
# A file that only one library writes -> (the library, the remedy).
_MARKS: Mapping[str, tuple[str, str]] = {
    "open_clip_config.json": ("open_clip", _CONVERT),
    "adapter_config.json": (
        "PEFT, an adapter without its model",
        "merge it into its base model (merge_and_unload) and save that",
    ),
    "model_index.json": ("diffusers", "give the folder of one of its models, such as text_encoder"),
    "modules.json": (
        "sentence-transformers",
        "give the folder in it that has the transformer, such as 0_Transformer",
    ),
}
# The boolean keys of sentence-transformers' pooling config -> mode. Newer versions write one key instead.
_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def explain_folder(folder: pathlib.Path) -> str:
    """Return a clause about the library that wrote a folder without config.json, and the remedy, or ''."""
    for mark, (library, remedy) in _MARKS.items():
        if (folder / mark).is_file():
            return f"{mark} says that it is of {library}; {remedy}"
    return ""


def explain_config(content: Mapping[str, Any]) -> str:
    """Return a clause about a config.json without model_type, and the remedy."""
    if "batch_size" in content and "policy" in content:
        return (
            "is that of a run and not of a model; export the run (python -m lit_jax.export), evaluate it by "
            "--workdir, or read it by lit_jax.load_run"
        )
    # timm's config.json names an architecture instead.
    names_timm = isinstance(content.get("architecture"), str)
    return f"has no model_type{', so timm wrote it' if names_timm else ''}; {_CONVERT}"


class SentencePooling(NamedTuple):
    """The pooling of a sentence-transformers model.

    Attributes:
        modes: 'mean', 'cls' ...; the vectors of several modes are concatenated.
        layers: the class names of layers with weights behind the pooling.
    """

    modes: tuple[str, ...]
    layers: tuple[str, ...]


def sentence_pooling(folder: pathlib.Path) -> SentencePooling | None:
    """Return the pooling of the transformer in `folder`, or None if it is not of sentence-transformers."""
    # modules.json lies beside the transformer's files, or above its folder (0_Transformer).
    for root in (folder, folder.parent):
        modules = _read(root / "modules.json")
        if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
            continue
        if not modules or root / str(modules[0].get("path", "")) != folder:
            continue
        # A type is a dotted path, whose package changes between versions: only the class name is compared.
        kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
        if "Pooling" not in kinds:
            return None
        at = kinds.index("Pooling")
        modes = _read_modes(root / str(modules[at].get("path", "")) / "config.json")
        layers = tuple(kind for kind in kinds[at + 1 :] if kind != "Normalize")
        return SentencePooling(modes, layers) if modes else None
    return None


def _read_modes(file: pathlib.Path) -> tuple[str, ...]:
    config = _read(file)
    if not isinstance(config, dict):
        return ()
    if isinstance(mode := config.get("pooling_mode"), str):
        return (mode,)
    return tuple(mode for key, mode in _POOLINGS.items() if config.get(key) is True)


def _read(file: pathlib.Path) -> Any:
    try:
        return parse_json(file.read_bytes())
    except (OSError, ValueError):
        return None
