"""Folders of Orbax: on a local disk, on Google Cloud Storage and on S3, and the arrays that they list.

Orbax does not know S3 by itself. TensorStore, which writes the arrays of Orbax, does. Orbax asks two
functions for the driver and the spec of TensorStore, and here these functions learn about the second store.
"""

from typing import Any

import orbax.checkpoint as ocp
import tensorstore as ts

# Orbax has no public way to give a spec.
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from lit_jax.buckets import AnyPath, BucketPath, bucket_path, key_value_store
from lit_jax.training.stack_names import UncutStacks, join_stacks

# Orbax normalises paths, which leaves one slash; it gives the second slash back to gs:// alone.
_S3 = "s3:/"


def teach_s3() -> None:
    """Let Orbax write to and read from s3:// in this process; call this function once."""
    is_google, google_spec = tensorstore_utils._use_gcs_driver, gcs_utils.get_kvstore_for_gcs

    def is_bucket(directory: str) -> bool:
        return directory.startswith(_S3) or is_google(directory)

    def spec(path: str) -> dict[str, Any]:
        if not path.startswith(_S3):
            return google_spec(path)
        found = key_value_store(
            bucket_path("--workdir", f"s3://{path.removeprefix(_S3).lstrip('/')}")
        )
        # Some paths are those of single objects.
        return found | {"path": found["path"].removesuffix("/")}

    tensorstore_utils._use_gcs_driver = is_bucket
    gcs_utils.get_kvstore_for_gcs = spec


def atomicity(folder: AnyPath) -> ocp.options.AtomicityOptions:
    """Return Orbax' options for a folder: a rename makes it complete, or in a bucket its last file."""
    modes = ocp.options.AtomicityMode
    # By itself Orbax would rename a folder on S3 object by object.
    mode = modes.COMMIT_FILE if isinstance(folder, BucketPath) else modes.AUTO
    return ocp.options.AtomicityOptions(mode=mode)


def checkpointer(folder: AnyPath) -> ocp.StandardCheckpointer:
    """Return Orbax' writer and reader of one folder of arrays, to be closed after use."""
    return ocp.StandardCheckpointer(atomicity_options=atomicity(folder))


def check_arrays(folder: AnyPath, leaves: int) -> None:
    """Raise OSError unless a folder of Orbax lists `leaves` arrays.

    Orbax itself only warns if it does not find the parts that the processes have written.
    """
    # OCDBT merges the parts of all processes into one store, whose listing shows what a reader will find.
    is_remote = isinstance(folder, BucketPath)
    base = key_value_store(folder) if is_remote else f"file://{folder.resolve()}/"
    listed = ts.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    arrays = {key.rpartition(b"/")[0] for key in listed if key.endswith(b"/.zarray")}
    if len(arrays) != leaves:
        raise OSError(f"of {leaves} arrays {len(arrays)} can be read back from {folder}")


def as_saved(folder: AnyPath, wanted: Any, uncut: UncutStacks, part: str | None = None) -> Any:
    """Return `wanted`, a tree of shapes, with the names under which `folder` has the stacks of blocks.

    Folders of earlier versions have the names of the cut stacks, which are those of `wanted`.

    Args:
        part: the topmost name in the folder below which `wanted` lies.
    """
    joined = join_stacks(wanted, uncut)
    if _flat(joined).keys() == _flat(wanted).keys():
        return wanted
    prefix = () if part is None else (part,)
    names = {(*prefix, *name) for name in _flat(wanted)}
    return wanted if names <= _saved(folder).keys() else joined


def check_shapes(folder: AnyPath, wanted: Any, part: str | None = None) -> None:
    """Raise ValueError at the first array of `folder` (of one `part`) that differs in name or shape.

    Orbax would find the difference, too. But it reads all arrays at once and then abandons the rest, and each
    abandoned coroutine prints a warning when it is collected.
    """
    there, here = (
        {key: leaf.shape for key, leaf in flat.items() if part in (None, key[0])}
        for flat in (_saved(folder), _flat(wanted))
    )
    for key in there | here:
        if there.get(key) != here.get(key):
            raise ValueError(
                f"{'/'.join(key)} is {there.get(key, 'absent')} there and {here.get(key, 'absent')} here"
            )


def _flat(tree: Any) -> dict[Any, Any]:
    return dict(ocp.tree.to_flat_dict(tree))


def _saved(folder: AnyPath) -> dict[Any, Any]:
    # The annotation asks for Orbax's own kind of path, but a pathlib.Path works.
    resolved: Any = folder.resolve()
    return _flat(ocp.PyTreeCheckpointHandler().metadata(resolved).tree)
