"""The launcher of this process, and the place of this process among those of the run.

A launcher writes the number of processes and the index of this process into the environment. Without a
launcher, or with a count of 1, this process is the only one and needs nothing from JAX's distributed runtime.
"""

import os
import re
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

# JAX's detection of TPU slices and Kubernetes has no public name, and a copy of it would age.
from jax._src import clusters

from lit_jax.errors import UserError

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_PORT = "JAX_COORDINATOR_PORT"
# More processes than any cluster runs. The bound keeps a typing error away from JAX's 32-bit integers.
_MOST = 1_000_000
Environment = Mapping[str, str]


class Place(NamedTuple):
    """The place of this process among several.

    Attributes:
        address: HOST:PORT at which process 0 waits for the others.
        index: the index of this process, from 0.
        count: the number of processes.
        count_from: the variable that holds the count; messages name it.
        address_from: the variable that holds the address of process 0.
        devices: the local ids of the GPUs that this process uses; None for all visible GPUs.
    """

    index: int
    count: int
    address: str
    count_from: str
    address_from: str
    devices: tuple[int, ...] | None = None


class _Unsupported(NamedTuple):
    """A launcher whose variables do not say where process 0 is.

    Attributes:
        size: the variable that holds the number of processes.
        rank: the variable that holds the index of this process.
        needs: another variable that must be set, where `size` is too common a name to mean this launcher.
    """

    name: str
    size: str
    rank: str
    needs: str = ""


_UNSUPPORTED = (
    _Unsupported("mpiexec of MPICH or Intel MPI", "PMI_SIZE", "PMI_RANK"),
    _Unsupported("MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    _Unsupported("jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    _Unsupported("Flux", "FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
    _Unsupported("torchrun", "WORLD_SIZE", "RANK"),
    _Unsupported("Horovod", "HOROVOD_SIZE", "HOROVOD_RANK"),
    _Unsupported("AWS Batch", "AWS_BATCH_JOB_NUM_NODES", "AWS_BATCH_JOB_NODE_INDEX"),
    _Unsupported("Kubeflow", "NUM_PROCESSES", "PROCESS_ID", needs="COORDINATOR_ADDRESS"),
)
# These launchers give a process its index, but not the number of processes.
_RANK_ALONE = (
    ("a launcher of PMIx", "PMIX_RANK"),
    ("Cray PALS", "PALS_RANKID"),
    ("an indexed job of Kubernetes", "JOB_COMPLETION_INDEX"),
)
_INSTEAD = f"start them by launch/local.sh or srun, or by {_ADDRESS}, {_COUNT}, {_INDEX} (launch/README.md)"


def find_place() -> Place | None:
    """Return this process's place, None if it is the only one.

    Raises UserError for impossible values, and if an unsupported launcher has started several processes.
    """
    environment = os.environ
    # The user's own variables win over any launcher. Open MPI comes before Slurm, as in JAX: under mpirun
    # inside a Slurm job, Slurm's variables describe the task of mpirun or of its daemon, not this process.
    if any(environment.get(name) for name in (_ADDRESS, _COUNT, _INDEX)):
        place = _from_jax_variables(environment)
    else:
        place = _from_open_mpi(environment) or _from_slurm(environment) or _from_jax(environment)
        _refuse_others(environment, place)
    if place is None or place.count == 1:
        return None
    # JAX reads this variable itself, and fails on a bad value with a bare ValueError.
    devices = environment.get("JAX_LOCAL_DEVICE_IDS", "")
    if not re.fullmatch(r"([0-9]{1,4}(,[0-9]{1,4})*)?", devices):
        raise UserError(
            f"JAX_LOCAL_DEVICE_IDS={devices!r} is not a list of numbers joined by commas; write for example "
            "0,1,2,3."
        )
    return place


def idle_tasks(environment: Environment = os.environ) -> str:
    """Return a sentence if this process is alone in a Slurm allocation for several, else ''."""
    tasks = environment.get("SLURM_NTASKS", "")
    if not environment.get("SLURM_JOB_ID") or not tasks.isdecimal() or int(tasks) < 2:
        return ""
    return (
        f"SLURM_NTASKS={tasks}, but srun did not start this process as one of several tasks, so it runs "
        "alone; to start all tasks, put srun in front of the command."
    )


def split_address(name: str, text: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT. Raise UserError, which names the variable, for any other text."""
    host, _, port = text.rpartition(":")
    in_brackets = host.startswith("[") and host.endswith("]")
    reasons = {
        "it starts with a protocol": "://" in text,
        "it contains spaces": bool(re.search(r"\s", text)),
        "it has no port": not host,
        "an IPv6 address needs brackets": ":" in host and not in_brackets,
        "the host has a character that is not allowed": not re.fullmatch(
            r"\[[\w:.%]+\]|[\w.-]+", host
        ),
        "the port is not a number from 1 to 65535": not re.fullmatch(r"[0-9]{1,5}", port)
        or not 1 <= int(port) <= 65535,
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise UserError(
            f"{name}={text!r} is not HOST:PORT ({reason}); write for example 10.0.0.1:1234 or [fd00::1]:1234."
        )
    return host.strip("[]"), int(port)


def _from_jax_variables(environment: Environment) -> Place:
    """Return the place that the user gives by JAX's three variables. Raise UserError if one is missing."""
    given = {name: environment.get(name, "") for name in (_ADDRESS, _COUNT, _INDEX)}
    if missing := [name for name, text in given.items() if not text]:
        there = [name for name in given if name not in missing]
        raise UserError(
            f"{' and '.join(there)} set without {' and '.join(sorted(missing))}; set all three or none."
        )
    count = _number(environment, _COUNT, 1, _MOST)
    index = _number(environment, _INDEX, 0, count - 1, f" (below {_COUNT}={count})")
    split_address(_ADDRESS, given[_ADDRESS])
    devices = _slurm_devices(environment) if environment.get("SLURM_LOCALID") else None
    return Place(index, count, given[_ADDRESS], _COUNT, _ADDRESS, devices)


def _from_open_mpi(environment: Environment) -> Place | None:
    """Return the place that mpirun of Open MPI 4 or 5 gives, None without it."""
    size = "OMPI_COMM_WORLD_SIZE"
    if not environment.get(size):
        return None
    count = _number(environment, size, 1, _MOST)
    index = _number(environment, "OMPI_COMM_WORLD_RANK", 0, count - 1)
    if count == 1:
        return Place(index, count, "", size, size)
    local_count = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE", 1, count)
    local = _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK", 0, local_count - 1)
    host, address_from = _open_mpi_host(environment, alone=local_count == count)
    # The job name is the same for all processes of one mpirun and differs between jobs. A port derived from
    # it keeps two jobs on one machine apart.
    job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_orte_hnp_uri", "")
    address = f"{host}:{_port(environment, zlib.crc32(job.encode()))}"
    devices = _own_devices(environment, local, local_count)
    return Place(index, count, address, size, address_from, devices)


def _open_mpi_host(environment: Environment, *, alone: bool) -> tuple[str, str]:
    """Return the machine of process 0, where mpirun itself runs, and the variable that names this machine."""
    if alone:
        return "localhost", "OMPI_COMM_WORLD_LOCAL_SIZE"
    # Open MPI 4 sets this variable, Open MPI 5 sets PMIX_NAMESPACE.
    if uri := environment.get("OMPI_MCA_orte_hnp_uri"):
        address = clusters.OmpiCluster.get_coordinator_address(None, "1")
        return address.rpartition(":")[0], f"OMPI_MCA_orte_hnp_uri={uri}"
    job = re.fullmatch(r"prte(?:run)?-(.+)-\d+@\d+", environment.get("PMIX_NAMESPACE", ""))
    if job is None:
        raise UserError(
            "This version of Open MPI does not say where process 0 is (PMIX_NAMESPACE="
            f"{environment.get('PMIX_NAMESPACE', '')}); {_INSTEAD}."
        )
    return job[1], "PMIX_NAMESPACE"


def _from_slurm(environment: Environment) -> Place | None:
    """Return the place that srun gives, None outside of a job step.

    The step's number of tasks wins over the job's SLURM_NTASKS, which is also set where a shell of the
    allocation starts a single process.
    """
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    size = next(
        (name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in environment), ""
    )
    if not size or not all(name in environment for name in needed):
        return None
    count = _number(environment, size, 1, _MOST)
    index = _number(environment, "SLURM_PROCID", 0, count - 1, f" (below {size}={count})")
    # All tasks of a job derive the same port, and two jobs on one node most likely different ones.
    port = _port(environment, _number(environment, "SLURM_JOB_ID", 0, 2**63))
    # JAX expands Slurm's short lists of nodes, such as node[01-04]. Only the host of its answer is used.
    host = clusters.SlurmCluster.get_coordinator_address(None, "1").rpartition(":")[0]
    address = f"{host}:{port}"
    if count > 1:
        split_address("The first node of SLURM_STEP_NODELIST", address)
    return Place(index, count, address, size, "SLURM_STEP_NODELIST", _slurm_devices(environment))


def _slurm_devices(environment: Environment) -> tuple[int, ...] | None:
    """Return this task's share of the GPUs, if it sees those of all tasks on its node (launch/slurm.sh)."""
    # With --gpus-per-task, --gpu-bind or --tres-per-task=gres/gpu:2 a task sees only its own GPUs.
    asked = ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND")
    tres = ("SLURM_TRES_PER_TASK", "SLURM_TRES_BIND")
    if any(map(environment.get, asked)) or any("gpu" in environment.get(name, "") for name in tres):
        return None
    # The layout "2(x3),1" means two tasks on each of three nodes, then one task on a fourth.
    layout = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", layout)
    tasks_of_nodes = [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]
    node = environment.get("SLURM_NODEID", "0")
    if node.isdecimal() and int(node) < len(tasks_of_nodes):
        local_count = tasks_of_nodes[int(node)]
    else:
        count = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")
        local_count = 1 if count in ("1", environment.get("SLURM_STEP_NUM_NODES")) else None
    return _own_devices(environment, _number(environment, "SLURM_LOCALID", 0, _MOST), local_count)


def _own_devices(
    environment: Environment, local: int, local_count: int | None
) -> tuple[int, ...] | None:
    """Return the ids of the GPUs of the process with the local index `local`; None for all visible GPUs.

    A process that is alone on its machine gets all GPUs. Several processes share the GPUs evenly. If
    `local_count` or the number of GPUs is not known, each process gets one.
    """
    if local_count == 1 or environment.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    variables = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
    visible = next((environment[name] for name in variables if environment.get(name)), None)
    if visible is None or local_count is None:
        return (local,)
    each = len(visible.split(",")) // local_count
    # The launcher has already split the GPUs if a process sees fewer of them than there are processes.
    if each == 0:
        return None
    return tuple(range(local * each, (local + 1) * each))


# (cluster that JAX detects by itself, name of the source of the process count for messages)
_JAX_CLUSTERS = (
    (clusters.GkeTpuCluster, "TPU_WORKER_HOSTNAMES"),
    (clusters.GceTpuCluster, "the TPU's metadata"),
    (clusters.K8sCluster, "the parallelism of the Kubernetes job"),
)


def _from_jax(environment: Environment) -> Place | None:
    """Return the place that JAX detects for a TPU slice or a Kubernetes job, None elsewhere."""
    for cluster, source in _JAX_CLUSTERS:
        # A pod without an index does not belong to an indexed job, and JAX's look-up would raise an error.
        if cluster is clusters.K8sCluster and not environment.get("JOB_COMPLETION_INDEX"):
            continue
        try:
            if cluster.is_env_present():
                return _ask(cluster, source, environment)
        except UserError:
            raise
        # The metadata server, the Kubernetes client or a malformed value may raise any type of error.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"JAX cannot tell from {source} which of the processes this is ({reason[:300]}); {_INSTEAD}."
            ) from error
    return None


def _ask(cluster: Any, source: str, environment: Environment) -> Place:
    count, index = cluster.get_process_count(), cluster.get_process_id()
    if count == 1:
        return Place(index, count, "", source, source)
    port = environment.get(_PORT) and str(_port(environment, 0))
    address = cluster.get_coordinator_address(timeout_secs=60, override_coordinator_port=port)
    return Place(index, count, address, source, source)


def _refuse_others(environment: Environment, place: Place | None) -> None:
    """Raise UserError if an unsupported launcher started several processes: each would train by itself."""
    here = (place.count, place.index) if place else (1, 0)
    for launcher in _UNSUPPORTED:
        size, rank = environment.get(launcher.size, ""), environment.get(launcher.rank, "0")
        # Supported launchers may set these variables, too, as Slurm sets PMI_SIZE. Equal values are no
        # conflict.
        if not size.isdecimal() or int(size) < 2 or (size, rank) == tuple(map(str, here)):
            continue
        if not launcher.needs or environment.get(launcher.needs):
            raise UserError(
                f"{launcher.size}={size}: the processes of {launcher.name} cannot find each other here; "
                f"{_INSTEAD}, or unset {launcher.size} if it is left over."
            )
    for name, variable in _RANK_ALONE:
        rank = environment.get(variable, "")
        if here[0] == 1 and rank.isdecimal() and int(rank) > 0:
            raise UserError(
                f"{variable}={rank}: the processes of {name} cannot find each other here; {_INSTEAD}, or "
                f"unset {variable} if it is left over."
            )


def _port(environment: Environment, job: int) -> int:
    """Return the user's port, or one of the last 4096 ports by the job's number, as JAX itself chooses."""
    if environment.get(_PORT):
        return _number(environment, _PORT, 1, 65535)
    return job % 2**12 + 65536 - 2**12


def _number(environment: Environment, name: str, least: int, most: int, note: str = "") -> int:
    """Return the number that a variable holds. Raise UserError unless it lies from `least` to `most`."""
    text = environment.get(name, "")
    if re.fullmatch(r"[0-9]{1,19}", text) and least <= int(text) <= most:
        return int(text)
    raise UserError(f"{name}={text!r} is not a number from {least} to {most}{note}; correct it.")
