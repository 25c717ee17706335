"""gke.sh, which writes a JobSet for Kubernetes."""

import re

import pytest
import yaml

from lit_jax.errors import BAD_INPUT, FAILED
from tests.launch.scripts import dry, launch, of_script


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
