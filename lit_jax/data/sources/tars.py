"""Tar files of img2dataset and WebDataset: a sample is a run of members that differ in their ending alone."""

import logging
from collections.abc import Sequence

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError, Example
from lit_jax.data.files import File, read
from lit_jax.data.sources.rows import bad_sample
from lit_jax.data.sources.samples import FLAWS, Parts, example_of_parts
from lit_jax.data.sources.tar_index import open_index
from lit_jax.errors import UserError

log = logging.getLogger(__name__)


class TarSource:
    """Samples of an image (jpg, png, webp ...), and of txt, json and cls as far as there are any.

    See `samples` for how they are named and what they say. Where the samples are is found once and kept, see
    `tar_index`. In a compressed tar nothing can be found.
    """

    def __init__(self, files: Sequence[File], config: SourceConfig, *, text_only: bool = False):
        self._files = list(files)
        self._config = config
        self._text_only = text_only
        self._index = open_index(self._files)
        place = files[0] if len(files) == 1 else files[0].parent
        for remark in self._index.remarks:
            log.warning("%s: %s.", place, remark)
        if not len(self):
            raise UserError(f"{files[0]} has no samples; use tar files that have some.")

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Example:
        entry = self._index[index]
        file = self._files[entry.shard]
        key = f"{file.name}/{entry.key}"
        if entry.flaw:
            kind, reason = FLAWS[entry.flaw]
            raise BadSampleError(f"{key} {reason}", kind)
        with bad_sample(key):
            content = read(file, entry.start, entry.stop)  # its members are neighbours
        if len(content) < entry.stop - entry.start:
            raise BadSampleError(f"{file} ends within {key}; get it again")
        with bad_sample(key):
            parts: dict[str, list[bytes]] = {}
            for field, start, stop in entry.members:
                parts.setdefault(field, []).append(
                    content[start - entry.start : stop - entry.start]
                )
            one = {field: found[0] for field, found in parts.items()}
            return example_of_parts(
                Parts(one.get("image"), parts.get("text", []), one.get("json"), one.get("cls")),
                self._config,
                file.parent,
                key=key,
                text_only=self._text_only,
            )
