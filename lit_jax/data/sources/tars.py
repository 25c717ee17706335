"""Tar files of img2dataset and WebDataset: a sample is the members that differ only in the ending."""

import logging
from collections.abc import Collection, Sequence

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError, Example
from lit_jax.data.files import File, read
from lit_jax.data.sources.rows import bad_sample
from lit_jax.data.sources.samples import FLAWS, Parts, example_of_parts, json_fields
from lit_jax.data.sources.tar_index import Entry, open_index
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

# The most unneeded bytes between a sample's members that are read along: one request is faster than three.
MAX_GAP_BYTES = 1 << 18


class TarSource:
    """The samples of uncompressed tar files: an image (jpg, png, webp ...), and optionally txt, json and cls.

    `samples` describes the names and the meaning of these files. The samples' places are found once and
    cached, see `tar_index`; a compressed tar has no random access.

    Raises UserError if a file cannot be read, or if there are no samples.
    """

    def __init__(self, files: Sequence[File], config: SourceConfig, *, text_only: bool = False):
        self._files = list(files)
        self._config = config
        self._text_only = text_only
        self._index = open_index(self._files)
        # The remarks count over all files, so they are told of their folder.
        place = files[0] if len(files) == 1 else files[0].parent
        # The remarks are cached with the index, so that every start shows them and not only the first.
        for problem, remark in self._index.remarks.items():
            if not (text_only and problem == "no image"):
                log.warning("%s: %s.", place, remark)
        if not len(self):
            raise UserError(f"{files[0]} has no samples; give tar files that have samples.")

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Example:
        key, folder, parts = self._read(index)
        with bad_sample(key):
            return example_of_parts(parts, self._config, folder, key=key, text_only=self._text_only)

    def json_fields(self, index: int) -> Collection[str]:
        """Return the names of the fields in a sample's json. Raise BadSampleError if it cannot be read."""
        key, _, parts = self._read(index)
        with bad_sample(key):
            return json_fields(parts)

    def _read(self, index: int) -> tuple[str, File, Parts]:
        """Return a sample's key, the folder of its tar, and the contents of its files."""
        entry = self._index[index]
        file = self._files[entry.shard]
        key = f"{file.name}/{entry.key}"
        # Known since the index was made, so nothing is read.
        if entry.flaw:
            kind, reason = FLAWS[entry.flaw]
            raise BadSampleError(f"{key} {reason}", kind)
        with bad_sample(key):
            parts: dict[str, list[bytes]] = {}
            for (field, start, stop), content in zip(
                entry.members, _contents(file, entry), strict=True
            ):
                # The file may have been truncated after it was indexed.
                if len(content) < stop - start:
                    raise BadSampleError(
                        f"{file} is cut off within this sample; download the file again"
                    )
                parts.setdefault(field, []).append(content)
        one = {field: found[0] for field, found in parts.items()}
        found = Parts(one.get("image"), parts.get("text", []), one.get("json"), one.get("cls"))
        return key, file.parent, found


def _contents(file: File, entry: Entry) -> list[bytes]:
    """Return the bytes of each member, by one request if the gaps between the members are small."""
    gaps = entry.stop - entry.start - sum(stop - start for _, start, stop in entry.members)
    if gaps > MAX_GAP_BYTES:
        return [read(file, start, stop) for _, start, stop in entry.members]
    content = read(file, entry.start, entry.stop)
    return [content[start - entry.start : stop - entry.start] for _, start, stop in entry.members]
