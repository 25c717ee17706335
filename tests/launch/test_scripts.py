"""The launch scripts: what they say they will run, exit codes and signals; no traps of the shell."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from lit_jax import train
from lit_jax.errors import BAD_INPUT, DONE, FAILED, GONE, INTERRUPTED, PREEMPTED

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
README = (LAUNCH / "README.md").read_text()


def launch(*words, **options):
    return subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300, **options
    )


def test_shellcheck_finds_nothing():
    result = launch("shellcheck", "-x", *map(str, SCRIPTS), env=with_tools())
    assert result.returncode == 0, result.stdout


def with_tools(folder=Path(sys.executable).parent):
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


def examples():
    """The commands of the README, as they would be typed."""
    blocks = re.sub(r"\\\n\s*", "", README)
    return re.findall(r"^    ((?:python|\w+=\S+ |launch/\S+\.sh)\b.*?)(?:\s+#.*)?$", blocks, re.M)


def of_script(name):
    return [shlex.split(line) for line in examples() if line.startswith(f"launch/{name}")]


def dry(words):
    """What an example says it would run, a list of words a line."""
    at = words.index("--") if "--" in words else len(words)
    result = launch(*words[:at], "--dry-run", *words[at:])
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_readme_walks_through_every_script_that_is_run():
    for script in SCRIPTS:
        assert (script.name in ("shared.sh", "process.sh")) == (not of_script(script.name)), script


def test_the_commands_of_the_readme_are_ones_that_train_takes():
    commands = [
        words[words.index("lit_jax.train") + 1 :]
        for words in map(shlex.split, examples())
        if "lit_jax.train" in words
    ]
    assert len(commands) > 5
    for flags in commands:
        names = {flag.partition("=")[0] for flag in flags}
        assert names == {"--config", "--workdir"}
        config = next(flag for flag in flags if flag.startswith("--config="))
        raw = train.load_config(config.removeprefix("--config="), {})
        assert raw.data.train.path


def test_local_says_what_each_process_gets():
    (words,) = of_script("local.sh")
    lines = [shlex.split(line) for line in dry(words).splitlines()]
    assert len(lines) == int(words[1])
    command = words[words.index("--") + 1 :]
    for index, line in enumerate(lines):
        assert line[0] == "env"
        assert line[-len(command) :] == command
        assert f"JAX_PROCESS_ID={index}" in line


def test_tpu_vm_says_each_step_of_keep():
    words = next(words for words in of_script("tpu_vm.sh") if words[1] == "keep")
    lines = [shlex.split(line) for line in dry(words).splitlines()]
    gcloud = [line[3:5] for line in lines if line[0] == "gcloud"]
    assert gcloud == [
        ["queued-resources", "create"],
        *(["tpu-vm", step] for step in ("scp", "ssh", "ssh")),
    ]
    assert all("--worker=all" in line for line in lines if "tpu-vm" in line)
    remote = lines[-1][next(i for i, word in enumerate(lines[-1]) if "--command=" in word)]
    assert launch("bash", "-n", "-c", remote.removeprefix("--command=")).returncode == 0
    assert shlex.join(words[words.index("--") + 1 :]) in remote.replace("\\", "")


@pytest.mark.parametrize("action", ["create", "install", "run", "logs", "stop", "delete"])
def test_tpu_vm_says_each_action(action):
    keep = next(words for words in of_script("tpu_vm.sh") if words[1] == "keep")
    assert "gcloud compute tpus" in dry([keep[0], action, *keep[2:]])


def test_tpu_vm_reaches_the_machines_of_all_slices():
    keep = next(words for words in of_script("tpu_vm.sh") if words[1] == "keep")
    create, _, *lines = (
        shlex.split(line) for line in dry([*keep[:2], "--slices=2", *keep[2:]]).splitlines()
    )
    assert {"--node-count=2", "--node-prefix=lit"} < set(create)
    assert not any("--node-id" in word for word in create)
    reached = [
        word.partition(":")[0]
        for line in lines
        for word in line
        if re.fullmatch(r"lit-\d(:.*)?", word)
    ]
    assert reached == ["lit-0", "lit-1"] * 3  # copied to, installed on, started on
    assert all("--worker=all" in line for line in lines)
    (follow,) = dry([keep[0], "logs", "--slices=2", *keep[2:]]).splitlines()
    assert {"lit-0", "--worker=0"} < set(shlex.split(follow))


def stand_in(folder, gcloud):
    """Programs for the path: this gcloud, and a sleep that is short."""
    for name, body in (("gcloud", gcloud), ("sleep", "exec /bin/sleep 0.2")):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["ACTIVE"], ["start"]),
        (["ACTIVE", "ACTIVE", "UNAVAILABLE", "UNAVAILABLE", "ACTIVE"], ["start"]),
        (["NOT_FOUND", "NOT_FOUND", "WAITING_FOR_RESOURCES", "ACTIVE"], ["create", "start"]),
        (
            ["ACTIVE", "ACTIVE", "SUSPENDED", "NOT_FOUND", "CREATING", "ACTIVE"],
            ["start", "delete", "create", "start"],
        ),
    ],
)
def test_tpu_vm_asks_and_gives_back_by_what_gcloud_says(tmp_path, answers, expected):
    """gcloud is a stand-in that answers `describe` by one line of a file after another, the last for ever."""
    gcloud = """
        cd "$STATES"
        case $4 in
            describe)
                answer=$(head -n 1 answers)
                if [[ $answer =~ UNAVAILABLE|NOT_FOUND && ! -e asked ]]; then
                    touch asked # it is asked once more for its error alone
                else
                    rm -f asked
                    [ "$(wc -l < answers)" = 1 ] || sed -i 1d answers
                fi
                [[ $answer =~ UNAVAILABLE|NOT_FOUND ]] || exec echo "$answer"
                echo "$answer: queued resource" >&2
                exit 1 ;;
            create) echo create >> calls; touch empty ;;
            delete) echo delete >> calls ;;
            ssh)
                case "$*" in
                    *restart.sh*) echo start >> calls; rm -f empty ;;
                    *"cat run.exit"*) [ -e empty ] || [ "$(wc -l < answers)" != 1 ] || echo 0 ;;
                    *missing*) [ ! -e empty ] || echo missing ;;
                esac ;;
        esac"""
    stand_in(tmp_path, gcloud)
    (tmp_path / "answers").write_text("".join(f"{answer}\n" for answer in answers))
    keep = next(words for words in of_script("tpu_vm.sh") if words[1] == "keep")
    environment = with_tools(tmp_path) | {"STATES": str(tmp_path), "TMPDIR": str(tmp_path)}
    result = launch(*keep, env=environment)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "calls").read_text().split() == expected
    assert ("UNAVAILABLE: queued resource" in result.stderr) == ("UNAVAILABLE" in answers)


@pytest.mark.parametrize("action", ["create", "keep"])
def test_tpu_vm_says_at_once_that_gcloud_does_not_answer(tmp_path, action):
    stand_in(tmp_path, '[ $4 = describe ] || echo "$4"; echo "no such project" >&2; exit 1')
    keep = next(words for words in of_script("tpu_vm.sh") if words[1] == "keep")
    result = launch(keep[0], action, *keep[2:], env=with_tools(tmp_path))
    assert (result.returncode, result.stdout) == (BAD_INPUT, "")
    said, error = result.stderr.splitlines()
    assert said == "no such project"
    assert re.match(r"error: gcloud .*\blit\b", error)


def test_tpu_vm_starts_again_in_a_slice_that_came_back_empty(tmp_path):
    """gcloud is a stand-in: a slice is a folder. The second one is lost while the first waits for it."""
    gcloud = """
        for word; do case $word in
            --command=*) command=${word#--command=} ;;
            lit-?*) folder=$SLICES/${word%%:*} ;;
        esac; done
        case $4 in
            describe) echo ACTIVE ;;
            scp) mkdir -p "$folder/lit_jax"; cp -r launch "$folder/lit_jax"; echo >> "$folder/copied" ;;
            ssh)
                cd "$folder"
                case "$command $folder" in
                    *requirements.lock*) exit ;;
                    *restart.sh*lit-1) [ -e lost ] || exec touch lost ;;
                esac
                exec bash -c "$command" ;;
        esac"""
    stand_in(tmp_path, gcloud)
    keep = next(words for words in of_script("tpu_vm.sh") if words[1] == "keep")
    together = (
        "echo >> ../../started; until [ $(wc -l < ../../started) = 2 ]; do sleep 1; done; exit 2"
    )
    result = launch(
        *keep[: keep.index("--")],
        "--slices=2",
        *("--", "timeout", "200", "bash", "-c", together),
        env=with_tools(tmp_path) | {"SLICES": str(tmp_path), "TMPDIR": str(tmp_path)},
    )
    assert result.returncode == BAD_INPUT, result.stderr
    assert (tmp_path / "started").read_text() == "\n" * 2
    for node in ("lit-0", "lit-1"):
        assert (tmp_path / node / "copied").read_text() == "\n" * 2


def test_slurm_submits_itself_with_time_to_save():
    (words,) = of_script("slurm.sh")
    submit, start = (shlex.split(line) for line in dry(words).splitlines())
    assert submit[0] == "sbatch"
    assert {"--requeue", "--signal=TERM@300"} < set(submit)
    command = words[words.index("--") + 1 :]
    assert start[0] == "srun"
    assert submit[-len(command) :] == start[-len(command) :] == command


def test_slurm_says_the_same_inside_an_allocation(tmp_path):
    (words,) = of_script("slurm.sh")
    at = words.index("--")
    inside = os.environ | {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    result = launch(*words[:at], "--dry-run", *words[at:], env=inside)
    assert (result.returncode, result.stdout) == (0, dry(words))


def for_gke(kind):
    return next(
        w for w in of_script("gke.sh") if any("--topology" in x for x in w) == (kind == "tpu")
    )


@pytest.mark.parametrize(("kind", "slices"), [("tpu", 1), ("tpu", 2), ("gpu", 1)])
def test_gke_writes_a_jobset(kind, slices):
    words = for_gke(kind)
    words.insert(1, f"--slices={slices}")
    manifest = yaml.safe_load(dry(words))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    placement = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert manifest["metadata"].get("annotations") == (placement if kind == "tpu" else None)
    (replicated,) = manifest["spec"]["replicatedJobs"]
    assert replicated["replicas"] == slices
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["launch/process.sh", *words[words.index("--") :]]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in job["template"]["spec"]["volumes"]}
    assert volumes[mounts["/dev/shm"]] == {"emptyDir": {"medium": "Memory"}}  # for data workers
    given = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
    assert job["parallelism"] == job["completions"] == int(given["nodes"])
    resource = {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}[kind]
    assert container["resources"]["limits"] == {resource: int(given["chips"])}
    variables = {variable["name"] for variable in container.get("env", [])}
    assert len(variables) == {"tpu": 0, "gpu": 3}[kind]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [FAILED, BAD_INPUT]


def test_gke_passes_words_as_they_are():
    """Kubernetes makes $ of $$, and takes $(NAME) for a variable."""
    words = [*for_gke("tpu"), "a b", "'$x'", "$(HOME)", "$$"]
    words[words.index("--name=lit")] = "--name=on"
    manifest = yaml.safe_load(dry(words))
    assert manifest["metadata"]["name"] == "on"
    (replicated,) = manifest["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][-4:] == ["a b", "'$$x'", "$$(HOME)", "$$$$"]


@pytest.mark.parametrize("nodes", [1, 2])
def test_gke_keeps_a_slice_of_several_nodes_together(nodes):
    words = [f"--nodes={nodes}" if "--nodes" in word else word for word in for_gke("tpu")]
    assert ("annotations" in yaml.safe_load(dry(words))["metadata"]) == (nodes > 1)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("tpu", ["--slices=0"], "--slices='0'"),
        ("tpu", ["--nodes=two"], "--nodes='two'"),
        ("tpu", ["--name=Lit_X"], "--name='Lit_X'"),
        ("tpu", ["--topology=banana"], "--topology='banana'"),
        ("tpu", ["--topology="], "tpu-v5-lite-podslice .*--topology"),
        ("gpu", ["--slices=2"], "--slices=2 .*--topology"),
        ("tpu", ["--slices=2", "--nodes=1"], "--nodes=1.*--topology"),
    ],
)
def test_gke_refuses_what_cannot_be(kind, changes, message):
    words = for_gke(kind)
    at = words.index("--")
    result = launch(*words[:at], *changes, *words[at:])
    assert result.returncode == BAD_INPUT
    assert re.fullmatch(f"error: .*{message}.*\n", result.stderr)


@pytest.mark.parametrize(
    "words",
    [
        ("local.sh", "two", "--", "true"),
        ("local.sh", "2"),
        ("local.sh", "2", "--devices=x", "--", "true"),
        ("local.sh", "2", "3", "--", "true"),
        ("restart.sh", "true"),
        ("tpu_vm.sh", "make", "--name=a"),
        ("tpu_vm.sh", "run", "--name=a", "--zone=b"),
        ("tpu_vm.sh", "logs", "--name=a", "--zone=b", "--slices=two"),
        ("slurm.sh", "--gpus=", "--", "true"),
        ("slurm.sh", "--gpus=8", "--nodes=two", "--", "true"),
        ("gke.sh", "--name=a", "--", "true"),
    ],
)
def test_a_mistyped_command_says_so(words):
    result = launch(LAUNCH / words[0], *words[1:])
    assert result.returncode == BAD_INPUT
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("codes", "worst"),
    [
        ((0, 0), 0),
        ((0, PREEMPTED), PREEMPTED),
        ((GONE, PREEMPTED), GONE),
        ((GONE, BAD_INPUT), BAD_INPUT),
        ((137, GONE), GONE),
        ((134, 137), GONE),
        ((GONE, 143), GONE),
    ],
)
def test_local_returns_the_worst_exit_code(codes, worst):
    of_process = f"exit $(echo {' '.join(map(str, codes))} | cut -d' ' -f$((JAX_PROCESS_ID + 1)))"
    result = launch(LAUNCH / "local.sh", "2", "--", "bash", "-c", of_process)
    assert result.returncode == worst


@pytest.mark.parametrize("script", [("local.sh", "1"), ("process.sh",), ("restart.sh",)])
def test_what_jax_aborts_ends_with_one_sentence_and_76(script):
    name, *arguments = script
    # The second time, which only restart.sh comes to, an error ends it.
    aborts = 'echo C++ >&2; [ -e "$1" ] && exit 2; touch "$1"; kill -ABRT $$'
    with tempfile.TemporaryDirectory() as folder:
        words = (*arguments, "--", "bash", "-c", aborts, "-", f"{folder}/second")
        result = launch(LAUNCH / name, *words, env=os.environ | {"PAUSE": "0"})
    sentence = next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "exit code 134" in sentence
    if name == "restart.sh":
        assert result.returncode == BAD_INPUT
    else:
        assert result.returncode == GONE
        assert result.stderr.splitlines()[-1] == sentence


def test_a_process_gets_the_signals_of_its_script():
    """Kubernetes tells the first process of a pod alone to stop."""
    program = "trap 'echo saved; exit 75' TERM; echo ready; while :; do sleep 0.1; done"
    script = subprocess.Popen(
        [LAUNCH / "process.sh", "--", "bash", "-c", program], stdout=subprocess.PIPE, text=True
    )
    assert script.stdout.readline() == "ready\n"
    script.terminate()
    assert script.communicate(timeout=200)[0] == "saved\n"
    assert script.returncode == PREEMPTED


@pytest.mark.parametrize("failing", [0, 1])
def test_local_ends_the_others_where_one_fails(failing):
    of_process = f"[ $JAX_PROCESS_ID = {failing} ] && exit {FAILED}; exec sleep 600"
    result = launch(LAUNCH / "local.sh", "2", "--", "bash", "-c", of_process)
    assert result.returncode == FAILED
    assert result.stderr == ""


@pytest.mark.parametrize("code", [DONE, PREEMPTED])
def test_local_waits_for_the_others_where_one_ends_in_order(code):
    of_process = f"[ $JAX_PROCESS_ID = 1 ] && exit {code}; sleep 1; echo saved; exit {code}"
    result = launch(LAUNCH / "local.sh", "2", "--", "bash", "-c", of_process)
    assert result.returncode == code
    assert result.stdout == "[0] saved\n"


@pytest.fixture
def interruptible():
    """Where a shell runs the tests in the background, they and what they start ignore SIGINT."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_local_says_who_speaks_and_passes_signals_on():
    program = (
        "import signal, sys, time\n"
        "for name in ('SIGTERM', 'SIGINT'):\n"
        "    signal.signal(getattr(signal, name), lambda number, _: (print(number), sys.exit(75)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        launcher = subprocess.Popen(
            [LAUNCH / "local.sh", "2", "--", sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
        )
        ready = {launcher.stdout.readline() for _ in range(2)}
        assert ready == {"[0] ready\n", "[1] ready\n"}
        launcher.send_signal(number)
        said, _ = launcher.communicate(timeout=200)
        assert sorted(said.splitlines()) == [f"[0] {number:d}", f"[1] {number:d}"]
        assert launcher.returncode == PREEMPTED


@pytest.mark.usefixtures("interruptible")
def test_local_passes_on_a_signal_that_came_before_there_were_processes(tmp_path):
    """Its search for a free port takes two seconds here."""
    python = f'touch {tmp_path}/searching; /bin/sleep 2; exec {sys.executable} "$@"'
    (tmp_path / "python3").write_text(f"#!/usr/bin/env bash\n{python}\n")
    (tmp_path / "python3").chmod(0o755)
    launcher = subprocess.Popen(
        [LAUNCH / "local.sh", "2", "--", "/bin/sleep", "600"],
        env=with_tools(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until((tmp_path / "searching").exists)
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.communicate(timeout=60)[1] == ""
    assert launcher.returncode == INTERRUPTED


@pytest.mark.usefixtures("interruptible")
def test_local_interrupted_is_interrupted_however_its_processes_end():
    program = "trap 'exit $((JAX_PROCESS_ID + 1))' INT; echo ready; while true; do sleep 0.1; done"
    launcher = subprocess.Popen(
        [LAUNCH / "local.sh", "2", "--", "bash", "-c", program], stdout=subprocess.PIPE, text=True
    )
    for _ in range(2):
        launcher.stdout.readline()
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=60)
    assert launcher.returncode == INTERRUPTED


@pytest.mark.parametrize("whole_group", [False, True])
def test_local_killed_leaves_nothing_behind(tmp_path, whole_group):
    """Neither its processes nor what they have started."""
    of_process = f"sleep 600 & echo $$ $! >> {tmp_path}/started; wait"
    launcher = subprocess.Popen(
        [LAUNCH / "local.sh", "2", "--", "bash", "-c", of_process],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    started = tmp_path / "started"
    until(lambda: started.exists() and len(started.read_text().split()) == 4)
    if whole_group:
        os.killpg(launcher.pid, signal.SIGKILL)
    else:
        launcher.kill()
    launcher.wait()
    until(lambda: not any(map(is_running, started.read_text().split())))


def until(condition):
    latest = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < latest
        time.sleep(0.1)


def is_running(number):
    """Not of one that has ended and that nobody has asked for its exit code."""
    status = Path(f"/proc/{number}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("codes", "runs"),
    [
        ((PREEMPTED, GONE, 137, 143, 0), 5),
        ((0,), 1),
        ((BAD_INPUT, 0), 1),
        ((FAILED, 0), 1),
        ((INTERRUPTED, 0), 1),
    ],
)
def test_restart_runs_again_what_asks_for_it(tmp_path, codes, runs):
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    take = "code=$(head -n 1 codes); sed -i 1d codes; echo run >> runs; exit $code"
    result = subprocess.run(
        [LAUNCH / "restart.sh", "--", "bash", "-c", take],
        cwd=tmp_path,
        env=os.environ | {"PAUSE": "0"},
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == codes[runs - 1]
    assert (tmp_path / "runs").read_text().count("run") == runs


def test_a_slurm_job_goes_back_into_the_queue(tmp_path):
    """Slurm's own commands are stand-ins: what is tested is what the job does with an exit code."""
    for code, requeued in (
        (PREEMPTED, True),
        (GONE, True),
        (137, True),
        (BAD_INPUT, False),
        (0, False),
    ):
        asked = tmp_path / f"asked{code}"
        for name, body in (("srun", f"exit {code}"), ("scontrol", f'echo "$@" > {asked}')):
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        job = with_tools(tmp_path) | {"SLURM_JOB_ID": "7"}
        # Slurm runs a copy of it, in the folder that it was submitted from.
        copy = shutil.copy(LAUNCH / "slurm.sh", tmp_path / "slurm_script")
        result = launch(copy, "--submitted", "--gpus=8", "--", "true", env=job)
        assert result.returncode == (GONE if code == 137 else code)
        assert asked.exists() == requeued
        assert not requeued or asked.read_text() == "requeue 7\n"
