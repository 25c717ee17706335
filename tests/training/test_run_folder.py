"""A run folder: its format, its name, what is stored in it and compared, and whose it is."""

import collections
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import lit_jax
from lit_jax.config import MeshConfig
from lit_jax.distributed import checksums
from lit_jax.distributed.mesh import BATCH, make_mesh, replicated
from lit_jax.errors import UserError
from lit_jax.training import checkpoints, trainer, workdir
from lit_jax.training.checkpoints import Checkpoints, restore_frozen, restore_params, save_frozen
from lit_jax.training.integrity import DamagedError, check_sums, start_sums
from lit_jax.training.model_factory import build_model
from lit_jax.training.train_step import State
from lit_jax.training.workdir import FORMAT, load_run
from lit_jax.training.workdir_errors import complete_steps, quiet_orbax


@pytest.fixture(scope="module", autouse=True)
def no_news_of_what_orbax_gives_up():
    """Outlast the tests that damage a checkpoint: the errors of other arrays come after the test's own."""
    with quiet_orbax():
        yield


@pytest.mark.parametrize(
    ("header", "named"),
    [({}, r"lit_jax 0\.1\.0"), ({"format": 9, "version": "7.8.9"}, r"lit_jax 7\.8\.9")],
)
def test_a_run_of_another_format_is_read_but_not_continued(
    finished, train, tiny, tmp_path, header, named
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    file = workdir / "config.json"
    content = json.loads(file.read_text())
    assert content.pop("format") == FORMAT
    assert content.pop("version") == lit_jax.__version__
    file.write_text(json.dumps(header | content))
    with pytest.raises(UserError, match=named):
        train(tiny(duration="7 steps"), workdir, allowed_changes=["duration"])
    assert load_run(workdir).step == 6
    assert json.loads(file.read_text()) == header | content


def test_a_config_that_has_lost_its_keys_is_not_one_of_defaults(finished, train, tiny, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    file = workdir / "config.json"
    content = json.loads(file.read_text())
    del content["model"]
    header = {key: content[key] for key in ("format", "version")}
    for damaged, named in (
        (content, "lacks model"),
        (header, "lacks batch_size, .*model"),
        ({}, ""),
    ):
        file.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=rf"config\.json .*{named}"):
            load_run(workdir)
        with pytest.raises(UserError, match=rf"config\.json .*{named}"):
            train(tiny(), workdir)


def save_once(workdir, state):
    with Checkpoints(workdir, keep_last=1) as checkpoints:
        checkpoints.save(1, state, {"next_batch": 1}, {})


def test_a_save_is_not_disturbed_by_what_a_process_without_the_folder_still_writes(
    tmp_path, monkeypatch
):
    """It was paused in its save of step 3, and its threads go on after another process has taken over."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    leaf = jax.device_put(np.arange(4, dtype=np.int32), replicated(mesh))
    left = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp" / "state"
    # Called in the thread of the save, when its arrays are written.
    monkeypatch.setattr(
        checkpoints, "check_lease", lambda _: left.mkdir(parents=True, exist_ok=True)
    )
    with Checkpoints(tmp_path, keep_last=1) as saved:
        saved.save(4, State(leaf, {"kernel": leaf}, ()), {"next_batch": 4}, {})
    assert complete_steps(tmp_path) == [4]


def test_a_folder_that_orbax_takes_for_a_pattern_gets_no_checkpoint(tiny, tmp_path):
    """Its name is refused where it is given; here it is not, and the save itself finds out."""
    workdir = tmp_path / "run[1]"
    workdir.mkdir()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    leaf = jax.device_put(np.arange(4, dtype=np.int32), replicated(mesh))
    with pytest.raises(UserError, match=r"2 arrays 0 .*run\[1\]"):
        save_once(workdir, State(leaf, {"kernel": leaf}, ()))
    assert complete_steps(workdir) == []
    with pytest.raises(UserError, match=r"run\[1\] .*character \["):
        trainer.train(tiny(), workdir)


DTYPES = ("bool", "int8", "uint8", "int32", "uint32", "float16", "bfloat16", "float32")


def state_of(mesh, rng, dtypes=DTYPES):
    """Arrays of every dtype that a state may have, split over the mesh, and scalars."""
    split, whole = jax.sharding.NamedSharding(mesh, BATCH), replicated(mesh)
    params = {}
    for name in dtypes:
        values = rng.integers(0, 2, 16) if name == "bool" else rng.normal(size=16) * 100
        with np.errstate(invalid="ignore"):
            values = values.astype(jnp.dtype(name))
        params[name] = jax.device_put(values, split)
        params[f"{name}_scalar"] = jax.device_put(values[0], whole)
    key = jax.device_put(np.array([1, 2], np.uint32), whole)
    return State(jax.device_put(np.int32(1), whole), params, (key, {"mu": params["float32"]}))


def test_checksums_of_every_dtype_hold_on_any_mesh_and_see_every_bit(monkeypatch):
    """No library has a part in it: bits of the arrays themselves."""
    one, four = (make_mesh(MeshConfig(), jax.devices()[:n]) for n in (1, 4))

    def sums(mesh):
        state = state_of(mesh, np.random.default_rng(0))
        return start_sums(state, with_rounded=True).fetch()

    first = sums(one)
    assert sums(four) == first
    # The devices compute what NumPy computes, of arrays that it would not take.
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "_HOST_SIZE", 0)
        assert sums(one) == sums(four) == first
    state = state_of(four, np.random.default_rng(0))
    check_sums(state, first)
    for path, leaf in state.params.items():
        changed = np.array(leaf)
        bits = changed.reshape(-1).view(np.uint8)
        bits[-1] ^= 1
        params = state.params | {path: jax.device_put(changed, leaf.sharding)}
        with pytest.raises(DamagedError, match=rf"params/{path}"):
            check_sums(state._replace(params=params), first)


@pytest.mark.parametrize("host_size", [1 << 20, 0])
def test_float32_that_is_read_as_bfloat16_has_the_same_checksum(tmp_path, monkeypatch, host_size):
    """Also the smallest numbers, ties, infinities and every NaN, as the library that reads makes them."""
    monkeypatch.setattr(checksums, "_HOST_SIZE", host_size)
    rng = np.random.default_rng(0)
    # More than NumPy hashes at once.
    bits = rng.integers(0, 2**32, 40_000, dtype=np.uint32)
    bits[:2000] &= 0x007FFFFF  # subnormal
    bits[2000:4000] |= 0x7F800000  # NaN
    bits[4000:6000] &= 0xFFFF8000  # ties, many of them
    bits[6000:6002] = 0x7F800000, 0xFF800000
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    frozen = {"kernel": jax.device_put(bits.view(np.float32), replicated(mesh))}
    save_frozen(tmp_path / "frozen", frozen)
    for dtype in ("float32", "bfloat16"):
        wanted = jax.ShapeDtypeStruct(bits.shape, dtype, sharding=replicated(mesh))
        assert restore_frozen(tmp_path / "frozen", {"kernel": wanted})["kernel"].dtype == dtype


@pytest.mark.long
def test_a_flipped_bit_in_any_file_is_found_or_changes_nothing(tmp_path):
    """Both in what a run restores and in what evaluation reads of it, with one sentence."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    rng = np.random.default_rng(0)
    state = state_of(mesh, rng, ("float32", "bfloat16", "uint32"))
    frozen = {"kernel": jax.device_put(rng.normal(size=64).astype(np.float32), replicated(mesh))}
    save_frozen(tmp_path / "run" / "frozen", frozen)
    save_once(tmp_path / "run", state)
    expected = read_all(tmp_path / "run", state, frozen)
    found = collections.Counter()
    for file in sorted(p for p in (tmp_path / "run").rglob("*") if p.is_file()):
        content = file.read_bytes()
        for position in rng.integers(0, 8 * len(content), 4 if content else 0):
            changed = bytearray(content)
            changed[position // 8] ^= 1 << (position % 8)
            file.write_bytes(changed)
            message = damage_found(tmp_path / "run", state, frozen, expected)
            found[file.parent.name] += bool(message)
            assert not message or (" is damaged" in message and "\n" not in message)
        file.write_bytes(content)
    assert min(found[name] for name in ("d", "1", "data", "state")) > 0


def damage_found(workdir, state, frozen, expected):
    """Return the sentence of a read that fails; one that does not has read the same."""
    try:
        restored = read_all(workdir, state, frozen)
    except UserError as error:
        return str(error)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    return ""


def read_all(workdir, state, frozen):
    abstract, abstract_frozen = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        (state, frozen),
    )
    with Checkpoints(workdir, keep_last=1) as checkpoints:
        restored = checkpoints.restore(abstract)
    restored_params = restore_params(workdir, abstract.params)
    restored_frozen = restore_frozen(workdir / "frozen", abstract_frozen)
    return jax.device_get((restored, restored_params, restored_frozen))


def test_a_checkpoint_under_another_step_is_refused_and_one_without_checksums_is_read(
    finished, train, tiny, tmp_path, caplog
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "checkpoints" / "4" / "sums.json").unlink()
    (workdir / "frozen" / "sums.json").unlink()
    with caplog.at_level("WARNING", logger="lit_jax"):
        assert load_run(workdir, step=4).step == 4
    assert caplog.text.count("sums.json") == 2
    (workdir / "checkpoints" / "6").rename(workdir / "checkpoints" / "5")
    with pytest.raises(UserError, match=r"checkpoints/5 .*\b6\b.*\b4\b"):
        train(tiny(), workdir)


@pytest.fixture
def pairs(tmp_path):
    """Writes a data set of as many pairs as there are numbers, in their order."""

    def write(numbers):
        folder = tmp_path / "data"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for n in numbers:
            Image.new("RGB", (32, 32), (n, n, n)).save(folder / f"{n}.png")
        rows = [{"image": f"{n}.png", "caption": f"the number {n}"} for n in numbers]
        (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


def test_other_data_under_the_same_config_are_refused_and_can_be_permitted(
    train, tiny, pairs, tmp_path, caplog
):
    """The run is as long as its data: grown, a finished one would train on."""
    workdir = tmp_path / "run"
    data = {"data.train.path": str(pairs(range(32))), "data.train.split": None}
    config = tiny(**data, duration="1 epochs")
    train(config, workdir)
    for numbers, counts in (
        (range(48), r"32 examples .*48 now"),
        (range(16), r"32 examples .*16 now"),
        (range(31, -1, -1), r"32 examples .*32 now"),
    ):
        pairs(numbers)
        with pytest.raises(UserError, match=rf"{counts}.*--allow_changes=data\.$"):
            train(config, workdir)
        assert complete_steps(workdir) == [2]
    shutil.rmtree(tmp_path / "data")  # of a finished run
    assert train(config, workdir).step == 2
    assert str(tmp_path / "data") in caplog.text
    with pytest.raises(UserError, match=r"'.*/data'"):
        train(tiny(**data, duration="3 steps"), workdir, allowed_changes=["duration"])
    pairs(range(48))
    assert train(config, workdir, allowed_changes=["data"]).step == 3
    assert json.loads((workdir / "data.json").read_text())["examples"] == 48


@pytest.mark.parametrize("removed", [".", "state"], ids=["whole", "in part"])
def test_a_checkpoint_that_a_running_training_removes_gives_way_to_a_newer_one(
    finished, tmp_path, monkeypatch, removed
):
    run = shutil.copytree(finished, tmp_path / "run")
    saved = run / "checkpoints"
    newest = shutil.move(saved / "6", tmp_path / "6")

    def build_while_training_goes_on(*args):
        if not (saved / "6").exists():
            shutil.copytree(newest, saved / "6")
            shutil.rmtree(saved / "4" / removed)
        return build_model(*args)

    monkeypatch.setattr(workdir, "build_model", build_while_training_goes_on)
    assert load_run(run).step == 6


def test_a_checkpoint_that_is_removed_while_it_is_read_is_not_called_damaged(
    finished, tmp_path, monkeypatch
):
    run = shutil.copytree(finished, tmp_path / "run")

    def build_while_it_is_removed(*args):
        shutil.rmtree(run / "checkpoints" / "4", ignore_errors=True)
        return build_model(*args)

    monkeypatch.setattr(workdir, "build_model", build_while_it_is_removed)
    with pytest.raises(UserError, match=r"step 4 .*removed.* \[6\]"):
        load_run(run, step=4)


def test_a_checkpoint_without_its_arrays_names_the_missing_file_alone(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "6" / "state" / "d")
    with pytest.raises(UserError, match="checkpoints/6 is damaged") as raised:
        load_run(run)
    assert f"{run}/checkpoints/6/state/d/" in str(raised.value)
    assert "tensorstore" not in str(raised.value)


@pytest.mark.parametrize("name", ["²", "old_4", "007"])
def test_odd_names_among_the_checkpoints_are_none(finished, train, tiny, tmp_path, name):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "checkpoints" / name).mkdir()
    (workdir / "checkpoints" / "notes").mkdir()
    assert load_run(workdir).step == 6
    with pytest.raises(UserError, match=rf"checkpoints/{name}"):
        train(tiny(), workdir)
