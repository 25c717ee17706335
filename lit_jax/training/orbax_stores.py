"""Orbax on a local disk, on Google Cloud Storage and on S3, which it does not know by itself.

TensorStore, which writes the arrays of Orbax, knows S3. Orbax asks two functions for the driver and the spec
of TensorStore, and here these functions learn about the second store.
"""

from typing import Any

import orbax.checkpoint as ocp
import tensorstore as ts

# Orbax has no public way to give a spec.
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from lit_jax.buckets import AnyPath, BucketPath, bucket_path, key_value_store

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
