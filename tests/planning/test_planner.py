import math

import jax
import pytest

from lit_jax.distributed.chips import CHIPS
from lit_jax.errors import UserError
from lit_jax.planning import planner
from lit_jax.planning.collectives import KINDS, Traffic
from lit_jax.planning.planner import Compiled, abstract_step, compile_step, make_plan, next_batch
from lit_jax.planning.table import table
from lit_jax.planning.topologies import open_topology
from lit_jax.trees import flatten
from tests.planning.conftest import BASE, GIANT, LARGE

pytestmark = pytest.mark.oracle  # of the TPU compiler

# A program that computes for 3000 cycles.
ADD = """ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} add(%x, %x), backend_config={"estimated_cycles":"3000"}
}
"""

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
GIB = 2**30


@pytest.mark.parametrize("name", ["v5e", "v5e:", "v5e:3x3", "v5e:32x8", "v4:4x4", "v9:4x4", "x"])
def test_an_unknown_topology_lists_the_known_ones(name):
    with pytest.raises(UserError, match=r"TPU .*v4: 2x2x1.*v5e: 1x1.*v6e: 1x1"):
        open_topology(name)


def test_the_topologies_that_are_listed_exist():
    for generation, chip in CHIPS.items():
        for shape in chip.shapes:
            topology = open_topology(f"{generation}:{shape}")
            assert len(topology.devices) == chip.cores * math.prod(map(int, shape.split("x")))
    assert len(open_topology("v5e:4x4", slices=2).devices) == 32


def test_without_the_tpu_compiler_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"requirements-tpu\.txt"):
        open_topology("v5e:4x4")


def test_what_a_chip_holds_is_counted_by_kind(config_of):
    """The matrices of a tower are split over fsdp, the batch over both axes."""
    config = config_of(TINY, TINY, 64, **{"mesh.fsdp": 2})
    step = abstract_step(config, open_topology("v5e:2x2").devices)
    held = planner.resident_bytes(step, step.abstract_batch(64))
    assert held["batch"] == 64 // 4 * (224 * 224 * 3 + 3 * 16 * 4)  # pixels are bytes
    embedding = 30522 * 32 // 2 * 4
    blocks = 2 * (4 * 32 * 32 + 2 * 32 * 64) // 2 * 4
    assert embedding + blocks < held["parameters"] < 1.2 * (embedding + blocks)
    # Locked parameters are bfloat16, a part of its position embeddings is all that is not split.
    patches = 16 * 16 * 3 * 32
    assert held["frozen"] >= (patches + 2 * (4 * 32 * 32 + 2 * 32 * 64)) // 2 * 2
    assert set(held) == {"parameters", "optimizer", "frozen", "batch"}


def test_flops_of_a_step_are_those_of_its_products(config_of):
    """By hand: the locked tower forward; the other forward, again for the gradient, and twice backward."""
    length, width, wide, batch = 16, 32, 64, 64
    config = config_of(TINY, TINY, batch)
    step = abstract_step(config, open_topology("v5e:2x2").devices)

    def block(tokens, queries):
        """Keys and values of all tokens; the rest for as many as are wanted."""
        of_query = 2 * width * width + 2 * width * wide
        products = 2 * (tokens * 2 * width * width + queries * of_query)
        return products + 4 * queries * tokens * width

    def tower(tokens):
        return block(tokens, tokens) + block(tokens, 1)

    image = tower(197) + 2 * 196 * (16 * 16 * 3) * width
    heads = 2 * width * width  # pooler, and the projection of the text
    # The loss's products are float32 and take three passes.
    loss = 3 * 2 * batch * width
    forward = image + tower(length) + 2 * heads + loss
    # A block's last product is computed again, too: BERT normalises what comes out. The images, without
    # projection, are a constant to the loss.
    again = tower(length)
    backward = 2 * (tower(length) + 2 * heads) + loss
    counted = planner.step_flops(step, step.abstract_batch(batch)) * 4
    assert counted == batch * (forward + again + backward)


class TestSearch:
    FIXED, CHIPS = 2 * GIB, 16

    def compiled(self, batch, limit=16 * GIB):
        """As if each example took a MiB, and a little more than in proportion."""
        total = self.FIXED + int(batch**1.02 * 2**20)
        return Compiled(fits=total <= limit, total=total, limit=None)

    @pytest.mark.parametrize("start", [16, 1024, 12000, 100_000, 10**7])
    def test_the_largest_batch_is_found_in_few_steps(self, start):
        tried = {start - start % 16: self.compiled(start - start % 16)}
        while len(tried) < 12:
            batch = next_batch(tried, self.FIXED, 16 * GIB, self.CHIPS)
            if batch is None:
                break
            assert batch % 16 == 0
            assert batch not in tried
            tried[batch] = self.compiled(batch)
        fits = max(batch for batch, compiled in tried.items() if compiled.fits)
        largest = max(b for b in range(16, 20_000, 16) if self.compiled(b).fits)
        assert 0.95 * largest <= fits <= largest

    def test_a_model_too_large_for_any_batch_ends_the_search(self):
        tried = {16: Compiled(fits=False, total=20 * GIB, limit=16 * GIB)}
        assert next_batch(tried, 19 * GIB, 16 * GIB, 16) is None


def test_what_does_not_fit_is_an_answer_with_advice(config_of):
    """A table of words as large as three chips."""
    huge = {"vocab_size": 12_000_000, "hidden_size": 1024, "num_attention_heads": 16}
    config = config_of(TINY, TINY | huge, 64, **{"remat": "none", "model.dtype": "float32"})
    plan = make_plan(config, open_topology("v5e:2x2"), compilations=1)
    assert not plan.fits
    assert plan.total > plan.hbm
    assert plan.bound is None
    text = table(plan)
    assert "NOT fit" in text
    knobs = (
        "model.dtype=bfloat16",
        "remat=block",
        "embed --side=image, and then --config.data.image_embeddings=",
        "accumulate=2",
        "mesh.fsdp=4",
    )
    for knob in (*knobs, "more chips"):
        assert knob in text, knob


@pytest.mark.parametrize(("topology", "slices"), [("v5e:2x2", 2), ("v4:2x2x1", 2), ("v5e:2x2", 1)])
def test_the_network_between_slices_bounds_a_step_where_its_speed_is_published(
    config_of, monkeypatch, topology, slices
):
    def by_kind(**sent):
        return dict.fromkeys(KINDS, 0) | {kind.replace("_", "-"): n for kind, n in sent.items()}

    inside = Traffic(by_kind(all_gather=4 * GIB), by_kind(all_gather=GIB))
    network = Traffic(by_kind(all_reduce=3 * GIB, all_gather=GIB), by_kind(all_reduce=2 * GIB))
    compiled = Compiled(
        fits=True,
        total=GIB,
        limit=None,
        temporaries=0,
        traffic=inside,
        network=network if slices > 1 else None,
        hlo=ADD,
    )
    monkeypatch.setattr(planner, "compile_step", lambda step, batch: compiled)
    opened = open_topology(topology, slices=slices)
    plan = make_plan(config_of(TINY, TINY, 64), opened, slices=slices, compilations=1)
    ici, dcn = opened.chip.ici_bandwidth, opened.chip.dcn_bandwidth
    waiting = GIB / ici
    if slices > 1 and dcn:
        assert plan.bound["network"] == 4 * GIB / dcn
        waiting += 2 * GIB / dcn
    else:
        assert "network" not in plan.bound
    assert plan.bound["exposed"] == waiting
    computing = 3000 / opened.chip.clock
    assert plan.forecast.seconds == pytest.approx(computing + waiting)
    assert plan.forecast.shares["communication"] == pytest.approx(waiting / (computing + waiting))
    assert plan.bound["step"] == max(
        plan.bound["compute"] + waiting, plan.bound.get("network", 0), plan.bound["interconnect"]
    )
    text = table(plan)
    assert ("to other slices" in text) == (plan.network_communicated is not None) == (slices > 1)
    assert ("not published" in text) == (topology.startswith("v4"))


@pytest.fixture
def little_effort(request):
    """The compiler of the commands, told to be quick: at O1 it takes a quarter of its minutes.

    At O0 it takes an eighth, and the same memory to a few MiB of code: enough where only that is asked.
    """
    jax.config.update("jax_optimization_level", getattr(request, "param", "O1"))
    yield
    jax.config.update("jax_optimization_level", "UNKNOWN")


@pytest.mark.usefixtures("little_effort")
@pytest.mark.long
def test_a_gradient_crosses_between_slices_once(config_of):
    """Each of the four chips of a slice sends a part; parameters stay inside, split over fsdp."""
    step = abstract_step(
        config_of(TINY, TINY, 64, **{"mesh.fsdp": 2}), open_topology("v5e:2x2", slices=2).devices
    )
    network = compile_step(step, step.abstract_batch(64)).network.communicated
    # In bfloat16 where it comes out of a product, else in float32; between two slices each is sent once.
    gradients = sum(
        leaf.size * (2 if path.endswith("kernel") else 4)
        for path, leaf in flatten(step.model.abstract_trainable).items()
    )
    assert gradients < 4 * network["all-reduce"] < 1.3 * gradients
    assert sum(network.values()) - network["all-reduce"] < 0.1 * gradients


# GiB of a chip.
@pytest.mark.parametrize("little_effort", ["O0"], indirect=True)
@pytest.mark.usefixtures("little_effort")
@pytest.mark.long
@pytest.mark.parametrize(
    ("topology", "image", "text", "batch_size", "most"),
    [
        ("v5e:4x4", BASE, BASE, 16_384, 8),
        ("v5e:8x8", LARGE, LARGE, 16_384, 15.75),
        ("v4:8x8x4", GIANT, LARGE, 32_768, 32),
    ],
    ids=["base", "large", "giant"],
)
def test_recipes_of_the_paper_fit(config_of, topology, image, text, batch_size, most):
    plan = make_plan(config_of(image, text, batch_size), open_topology(topology), compilations=1)
    assert plan.fits, table(plan)
    assert plan.total < most * GIB, table(plan)


@pytest.mark.usefixtures("little_effort")
@pytest.mark.long
def test_split_matrices_are_gathered_and_their_gradients_scattered(config_of):
    """Each matrix of a block is gathered once for the forward and once for the backward pass, its gradient is
    summed where its part lies. Of activations, only embeddings and looked-up words are sent.
    """
    fsdp, batch_size = 8, 4096
    changes = {"data.image_embeddings": "anywhere", "mesh.fsdp": fsdp, "optimizer.name": "adamw"}
    config = config_of(LARGE, LARGE, batch_size, **changes)
    step = abstract_step(config, open_topology("v5e:4x4").devices)
    batch = step.abstract_batch(batch_size)
    leaves = flatten(step.model.abstract_trainable).values()
    matrices = sum(leaf.size for leaf in leaves if not leaf.sharding.is_fully_replicated)
    vectors = sum(leaf.size for leaf in leaves) - matrices
    assert vectors < 0.01 * matrices
    held = planner.resident_bytes(step, batch)
    assert held["parameters"] == 4 * (matrices // fsdp + vectors)
    compiled = compile_step(step, batch)
    sent = compiled.traffic.communicated
    once = 2 * matrices * (fsdp - 1) / fsdp  # bytes that a chip sends of all matrices in bfloat16
    # The table of words, a tenth of them, need not be gathered, as what is looked up is smaller; its gradient
    # is summed whole, in float32. Of all others the parts are summed over the rest of the mesh.
    assert 1.7 * once < sent["all-gather"] < 2.1 * once
    assert 0.85 * once < sent["reduce-scatter"] < 1.1 * once
    assert sent["all-reduce"] < 0.25 * once + 2 * 4 * 30522 * 1024
    looked_up = 4 * batch_size // 16 * step.model.processors.tokenizer.model_max_length * 1024
    assert sent["all-to-all"] < looked_up
    assert sent["collective-permute"] < 4 * batch_size * 1024 * 4
    assert compiled.total < 2 * GIB


@pytest.mark.parametrize("little_effort", ["O0"], indirect=True)
@pytest.mark.usefixtures("little_effort")
@pytest.mark.long
@pytest.mark.parametrize(("image", "text"), [(BASE, BASE), (GIANT, LARGE)], ids=["B", "L"])
def test_siglit_from_cached_embeddings_fits_on_four_chips(config_of, image, text):
    """SigLIP (2303.15343), section 4.1: batches of 32,768 on four v4 chips, without the locked tower."""
    sigmoid = {"loss": "sigmoid", "model.logit_bias_init": -10.0, "optimizer.name": "lion"}
    # The folder need not be there: what it would hold follows from the tower.
    config = config_of(image, text, 32_768, **{"data.image_embeddings": "anywhere", **sigmoid})
    step = abstract_step(config, open_topology("v4:2x2x1").devices)
    batch = step.abstract_batch(config.batch_size)
    assert batch["image_features"].shape == (32_768, image["hidden_size"])
    assert "vision_model" not in step.abstract_frozen(batch)
    assert compile_step(step, batch).fits
