"""tpu_vm.sh, against a gcloud that the tests write."""

import re
import shlex

import pytest

from lit_jax.errors import BAD_INPUT
from tests.launch.scripts import dry, launch, of_script, stand_in, with_tools


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
