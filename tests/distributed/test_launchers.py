"""What each launcher leaves in the environment, and what is made of it."""

import os

import pytest

from lit_jax.distributed.launchers import find_place, idle_tasks, split_address
from lit_jax.errors import UserError

# As srun sets them in the second of two tasks of a node; each sees all four GPUs.
SRUN = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}
TRES_GPU, TRES_CPU = ({"SLURM_TRES_PER_TASK": text} for text in ("gres/gpu=2", "cpu=8"))
# As a batch script has them, whose python is not started by srun: no step, but places of a task.
SBATCH = {
    "SLURM_JOB_ID": "4100",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
ONE_A_NODE = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"} | {
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
# As mpirun of Open MPI 5.0.11 sets them.
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "PMIX_NAMESPACE": "prterun-node-07-16034@1",
    "PMIX_RANK": "1",
}
ON_TWO = MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
OPEN_MPI_4 = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
JAX = {
    "JAX_COORDINATOR_ADDRESS": "localhost:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}


@pytest.fixture
def place(monkeypatch):
    def find(variables):
        for name in (*os.environ,):
            if name.startswith(("SLURM", "OMPI", "PMI", "JAX_COORD", "CUDA")):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return find_place()

    return find


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (JAX, (1, 2, "localhost:1234", "JAX_NUM_PROCESSES", None)),
        (SRUN, (3, 4, "node07:61444", "SLURM_STEP_NUM_TASKS", (2, 3))),
        (SRUN | ONE_A_NODE, (1, 2, "node07:61444", "SLURM_STEP_NUM_TASKS", None)),
        (SRUN | {"SLURM_GPUS_PER_TASK": "2"}, (3, 4, "node07:61444", "SLURM_STEP_NUM_TASKS", None)),
        (SRUN | TRES_GPU, (3, 4, "node07:61444", "SLURM_STEP_NUM_TASKS", None)),
        (SRUN | TRES_CPU, (3, 4, "node07:61444", "SLURM_STEP_NUM_TASKS", (2, 3))),
        (
            SRUN | {"CUDA_VISIBLE_DEVICES": "0"},
            (3, 4, "node07:61444", "SLURM_STEP_NUM_TASKS", None),
        ),
        (SRUN | {"CUDA_VISIBLE_DEVICES": ""}, (3, 4, "node07:61444", "SLURM_STEP_NUM_TASKS", (1,))),
        (
            SRUN | {"JAX_COORDINATOR_PORT": "99"},
            (3, 4, "node07:99", "SLURM_STEP_NUM_TASKS", (2, 3)),
        ),
        # The same launcher, told once more by a plugin of srun or by the user's own script.
        (
            SRUN | {"PMI_SIZE": "4", "PMI_RANK": "3", "WORLD_SIZE": "4", "RANK": "3"},
            (3, 4, "node07:61444", "SLURM_STEP_NUM_TASKS", (2, 3)),
        ),
        (MPIRUN, (1, 2, "localhost:65484", "OMPI_COMM_WORLD_SIZE", (1,))),
        (ON_TWO, (1, 2, "node-07:65484", "OMPI_COMM_WORLD_SIZE", None)),
        (ON_TWO | OPEN_MPI_4, (1, 2, "10.96.0.1:65484", "OMPI_COMM_WORLD_SIZE", None)),
        # What names the processes by JAX's own variables wins over what is left over.
        (MPIRUN | JAX, (1, 2, "localhost:1234", "JAX_NUM_PROCESSES", None)),
    ],
)
def test_a_launcher_of_several_is_understood(place, variables, expected):
    found = place(variables)
    index, count, address, count_from, devices = expected
    assert found[:4] == (index, count, address, count_from)
    assert found.devices == devices


@pytest.mark.parametrize(
    "variables",
    [
        {},
        dict.fromkeys(JAX, ""),
        JAX | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        # One task has all GPUs of its node.
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        # The shell of an allocation: the job is for four, this step is one.
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
        SBATCH,
        MPIRUN | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"NUM_PROCESSES": "8"},
        {"JOB_COMPLETION_INDEX": "0"},
    ],
)
def test_a_single_process_needs_no_other(place, variables):
    assert place(variables) is None


def test_an_allocation_for_several_that_one_process_uses_is_mentioned():
    assert "SLURM_NTASKS=4" in idle_tasks({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"})
    assert "SLURM_NTASKS=4" in idle_tasks(SBATCH)
    assert not idle_tasks({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"})
    assert not idle_tasks({"SLURM_NTASKS": "4"})


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE=2"),
        ({"WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE=8"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK=1"),
        ({"JOB_COMPLETION_INDEX": "3"}, "JOB_COMPLETION_INDEX=3"),
        (
            {"NUM_PROCESSES": "2", "PROCESS_ID": "0", "COORDINATOR_ADDRESS": "a"},
            "NUM_PROCESSES=2",
        ),
        # torchrun in each task of srun: not the same processes.
        (SRUN | {"WORLD_SIZE": "32", "RANK": "9"}, "WORLD_SIZE=32"),
        (ON_TWO | {"PMIX_NAMESPACE": "slurm.pmix.7"}, "PMIX_NAMESPACE=slurm.pmix.7"),
        (SRUN | {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID=''"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "4(x2)"}, "SLURM_STEP_NUM_TASKS='4(x2)'"),
        (SRUN | {"SLURM_PROCID": "4"}, "SLURM_PROCID='4'"),
        (SRUN | {"SLURM_LOCALID": "-1"}, "SLURM_LOCALID='-1'"),
        (MPIRUN | {"OMPI_COMM_WORLD_RANK": ""}, "OMPI_COMM_WORLD_RANK=''"),
        (SRUN | {"JAX_COORDINATOR_PORT": "http"}, "JAX_COORDINATOR_PORT='http'"),
        (JAX | {"JAX_LOCAL_DEVICE_IDS": "0;1"}, "JAX_LOCAL_DEVICE_IDS='0;1'"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_variable(place, variables, named):
    with pytest.raises(UserError) as error:
        place(variables)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1:1234", ("10.0.0.1", 1234)),
        ("node-1.example:65535", ("node-1.example", 65535)),
        ("[::1]:80", ("::1", 80)),
        ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
    ],
)
def test_an_address_is_host_and_port(text, expected):
    assert split_address("NAME", text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        ":1",
        "a:",
        "a:0",
        "a:65536",
        "a:x",
        "http://a:1",
        "a b:1",
        " a:1",
        "a:1 ",
        "::1:80",
        "::1",
        "[::1]",
        "a:1,b:2",
        "a/b:1",
        "a:1/b",
        "a:\u0661",
    ],
)
def test_any_other_address_is_refused(text):
    with pytest.raises(UserError, match=r"NAME=.*10\.0\.0\.1:1234"):
        split_address("NAME", text)
