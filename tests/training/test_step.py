"""The training step: the same curve on every mesh and for every number of micro-batches, and that it learns."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.models.loss import Sums
from jaxlm.models.model import Model
from jaxlm.models.objectives import NextToken
from jaxlm.parallel.sharding import Axes
from jaxlm.settings import MeshSettings, OptimizerSettings, ScheduleSettings, Settings, TrainSettings
from jaxlm.training.step import TrainState, batch_sharding, make_trainer

STEPS = 3
LLAMA = {"positions": "rope", "normalization": "rmsnorm", "activation": "swiglu", "bias": False, "tied_embeddings": False,
         "num_kv_heads": 2, "head_dim": 6, "qk_norm": True, "logit_soft_cap": 10.0, "z_loss": 1e-3, "dropout": 0.02}


def settings_for(model, **train):
    return Settings(model=model, train=TrainSettings(steps=100, **train), schedule=ScheduleSettings(name="constant"),
                    optimizer=OptimizerSettings(learning_rate=1e-3, clip_norm=0.5))


def start(trainer, params, seed=0):
    """A state with these parameters, laid out on the trainer's mesh. Made without `trainer.init`, which takes long
    to compile."""
    zeros = jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), trainer.layout.shapes)
    key = np.asarray(jax.random.key_data(jax.random.key(seed)))
    own = jax.tree.map(np.array, params)  # a copy, because the step eats its state
    return jax.device_put(zeros._replace(key=key, params=own), trainer.layout.shardings)


def run(settings, mesh, params, batches):
    """The metrics of each step, and the last state."""
    with jax.set_mesh(mesh):
        trainer = make_trainer(Model(settings.model, settings.train), settings, mesh)
        state, rows = start(trainer, params), []
        for batch in batches:
            state, metrics = trainer.step(state, jax.device_put(batch, batch_sharding(mesh)))
            rows.append({name: float(value) for name, value in metrics.items()})
    return rows, state


def assert_same_curve(got, want):
    for one, other in zip(got, want, strict=True):
        assert one == pytest.approx(other, rel=1e-5), (got, want)


@pytest.fixture(scope="module")
def reference(models, make_batch, meshes, random_params):
    """family -> what STEPS steps with dropout on one device give; computed when asked for."""
    made = {}

    def get(family):
        if family not in made:
            settings = settings_for(replace(models[family], dropout=0.1))
            momentum = replace(settings.optimizer, name="sgd", learning_rate=0.1, weight_decay=0.0)  # keeps gradients
            settings = replace(settings, optimizer=momentum)
            params = random_params(Model(settings.model, settings.train))
            batches = [make_batch(family, seed) for seed in range(STEPS)]
            made[family] = settings, params, batches, *run(settings, meshes["one"], params, batches)
        return made[family]

    return get


MESHES_OF_MOE = [("2x2x2", 1), ("one", 4), ("expert4data2", 1), ("stage2expert2tensor2", 4), ("fsdp2context2tensor2", 1)]
FAMILIES = ["gpt", pytest.param("bert", marks=pytest.mark.slow)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("mesh", "micro_batches"), [("data8", 1), ("fsdp8", 2), ("tensor8", 1), ("2x2x2", 1), ("one", 4),
                                                     ("context8", 1), ("fsdp2context2tensor2", 2), ("stage2data4", 2),
                                                     ("stage2fsdp2tensor2", 4), ("stage2context2data2", 2)])
def test_every_mesh_and_cut_gives_the_curve_of_one_device(mesh, micro_batches, family, reference, meshes, capfd):
    """With dropout; with micro-batches of unequal numbers of predictions, where a mean of means would not do."""
    same_curve(mesh, micro_batches, family, reference, meshes, capfd)


@pytest.mark.parametrize(("mesh", "micro_batches"), MESHES_OF_MOE)
def test_experts_too(mesh, micro_batches, reference, meshes, capfd):
    same_curve(mesh, micro_batches, "moe", reference, meshes, capfd)


@pytest.mark.parametrize("family", FAMILIES[:1])
@pytest.mark.parametrize(("mesh", "micro_batches"), [("fsdp2context2tensor2", 2), ("stage2context2data2", 2)])
def test_what_goes_to_the_hosts_memory_comes_back_the_same(mesh, micro_batches, family, reference, meshes, capfd):
    state = same_curve(mesh, micro_batches, family, reference, meshes, capfd, offload=True,
                       remat={"residual": "host", "attention": "host", "query_key_value": "keep"})
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim}
    assert kinds == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}


def same_curve(mesh, micro_batches, family, reference, meshes, capfd, offload=False, remat="none"):
    settings, params, batches, want, want_state = reference(family)
    mask = batches[0]["masked_mask" if family == "bert" else "loss_mask"]
    assert micro_batches == 1 or len({int(mask[piece::micro_batches].sum()) for piece in range(micro_batches)}) > 1
    settings = replace(settings, train=replace(settings.train, gradient_accumulation=micro_batches, remat=remat),
                       optimizer=replace(settings.optimizer, offload=offload))
    got, state = run(settings, meshes[mesh], params, batches)
    assert_same_curve(got, want)
    gradients, want = (jax.device_get(jax.tree.leaves(one.optimizer)) for one in (state, want_state))
    whole = np.sqrt(sum(np.square(leaf).sum() for leaf in want))
    for one, other in zip(gradients, want, strict=True):  # where theory says zero, rounding is measured by the whole
        assert np.linalg.norm(one - other) <= max(1e-5 * np.linalg.norm(other), 1e-7 * whole)
    # What the compiler says when it can cut an array no better than by copying the whole of it to every device
    assert "rematerialization" not in capfd.readouterr().err
    if mesh == "fsdp8":
        moments = jax.tree.leaves(state.optimizer)
        on_one = sum(moment.addressable_shards[0].data.nbytes for moment in moments)
        assert 1 / 8 <= on_one / sum(moment.nbytes for moment in moments) < 0.16  # biases of heads and MLP stay whole
    return state


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_batch_is_learned_by_heart(family, models, make_batch, meshes, random_params):
    """gpt: with every option of a Llama and more, on a mesh, in bfloat16."""
    settings = settings_for(models[family])
    mesh, changes = meshes["one"], {}
    if family == "gpt":
        mesh, changes = meshes["2x2x2"], {"precision": "bfloat16", "remat": "dots", "gradient_accumulation": 2, "loss_chunk": 4}
        settings = replace(settings, model=replace(settings.model, **LLAMA))
    settings = replace(settings, train=replace(settings.train, **changes),
                       optimizer=replace(settings.optimizer, learning_rate=0.01))
    params = jax.tree.map_with_path(
        lambda path, leaf: leaf / 10 + (path[-1].key == "scale"), random_params(Model(settings.model, settings.train)))
    rows, state = run(settings, mesh, params, [make_batch(family, 0)] * 30)
    losses = [row["loss"] for row in rows]
    assert losses[0] == pytest.approx(np.log(300) + (np.log(2) if family == "bert" else 1e-3 * np.log(300) ** 2), rel=0.02)
    assert losses[-1] < 0.5 * losses[0] and np.isfinite(losses).all()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params)) and int(state.step) == 30


# ---- the step's own arithmetic, on a model of three numbers ----------------------------------------------------------

def line(settings):
    """loss = sum of |w - target|^2 / 2 over the rows that count; with dropout keys, of targets shifted by a draw
    from them."""
    def terms(params, batch, keys=None):
        shift = 0.0 if keys is None else jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        error = jnp.square(params["w"]["kernel"] - batch["tokens"] - shift).sum(1) / 2
        loss, count = jnp.where(batch["mask"], error, 0).sum(), batch["mask"].sum().astype(jnp.float32)
        return {"next_token": Sums(loss, loss, count, count)}

    model = SimpleNamespace(
        axes={"w": {"kernel": Axes((None,), "kernel")}}, shapes={"w": {"kernel": jax.ShapeDtypeStruct((3,), jnp.float32)}},
        init=lambda key: {"w": {"kernel": jnp.zeros(3)}}, traced=lambda function: function, objectives=(NextToken(),),
        terms=terms, evaluated=lambda params, batch: (terms(params, batch), {}),
        counts=lambda batch: {"next_token": batch["mask"].sum()})
    mesh = jax.make_mesh((1,) * 6, ("stage", "data", "fsdp", "expert", "context", "tensor"), devices=jax.devices()[:1],
                         axis_types=(jax.sharding.AxisType.Auto,) * 6)
    return make_trainer(model, settings, mesh), mesh


def line_settings(clip_norm=None, dropout=0.0, pieces=1):
    plain = Settings(mesh=MeshSettings())
    return replace(plain, model=replace(plain.model, dropout=dropout),
                   train=replace(plain.train, steps=10, gradient_accumulation=pieces),
                   schedule=ScheduleSettings(name="linear", warmup_steps=2),
                   optimizer=OptimizerSettings(name="sgd", learning_rate=0.1, b1=0.0, weight_decay=0.0, clip_norm=clip_norm))


TARGETS = {"tokens": np.array([[3, 0, 0], [0, 4, 0], [0, 0, 5], [9, 9, 9]], np.float32), "mask": np.array([1, 1, 1, 0], bool)}


def steps_of(settings, batch, count):
    trainer, mesh = line(settings)
    rows = []
    with jax.set_mesh(mesh):
        state = trainer.init(0)
        for _ in range(count):
            before = np.asarray(state.params["w"]["kernel"])
            state, metrics = trainer.step(state, batch)
            rows.append((before, np.asarray(state.params["w"]["kernel"]), jax.device_get(metrics)))
    return rows


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_gradients_that_travel_in_bfloat16_are_nearly_the_same(micro_batches, models, make_batch, meshes, random_params):
    rows = {}
    for kind in ("float32", "bfloat16"):
        settings = settings_for(models["gpt"], precision="bfloat16", gradient_precision=kind, gradient_accumulation=micro_batches)
        params = random_params(Model(settings.model, settings.train))
        rows[kind], state = run(settings, meshes["fsdp8"], params, [make_batch("gpt", seed) for seed in range(STEPS)])
        assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.optimizer))} <= {"float32", "int32"}
    for one, other in zip(*rows.values(), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert 0 < abs(one["grad_norm"] - other["grad_norm"]) < 1e-2 * one["grad_norm"]


@pytest.mark.parametrize("clip_norm", [None, 1.0, 100.0])
def test_the_gradient_is_clipped_to_the_global_norm(clip_norm):
    rate = optax.join_schedules([optax.linear_schedule(0.1 / 3, 0.1, 2), optax.linear_schedule(0.1, 0, 8)], [2])
    for step, (before, after, metrics) in enumerate(steps_of(line_settings(clip_norm), TARGETS, 4)):
        gradient = (before - TARGETS["tokens"][:3]).mean(0)
        norm = np.linalg.norm(gradient)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)  # as it was before the clipping
        assert metrics["learning_rate"] == pytest.approx(float(rate(step)))
        assert metrics["loss"] == pytest.approx(((before - TARGETS["tokens"][:3]) ** 2).sum() / 2 / 3, rel=1e-6)
        clipped = gradient * min(1, (clip_norm or np.inf) / norm)
        np.testing.assert_allclose(after, before - float(rate(step)) * clipped, rtol=1e-5, atol=1e-7)


def test_a_batch_in_which_nothing_counts_changes_nothing():
    for before, after, metrics in steps_of(line_settings(1.0), TARGETS | {"mask": np.zeros(4, bool)}, 3):
        assert np.array_equal(before, after) and metrics["loss"] == metrics["grad_norm"] == 0


def test_dropout_is_drawn_anew_at_each_step_and_alike_in_micro_batches():
    everything = TARGETS | {"mask": np.ones(4, bool)}
    whole = steps_of(line_settings(dropout=0.1), everything, 3)
    shifts = [after - before + 0.1 * rate * (before - everything["tokens"].mean(0))  # 0.1 * rate * the mean draw of the step
              for (before, after, _), rate in zip(whole, (1 / 3, 2 / 3, 1), strict=True)]
    assert not np.allclose(shifts[1], 2 * shifts[0], rtol=0.1) and not np.allclose(shifts[2], 3 * shifts[0], rtol=0.1)
    for (_, one, _), (_, other, _) in zip(whole, steps_of(line_settings(dropout=0.1, pieces=4), everything, 3), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_the_initial_state_depends_on_the_seed_alone(models):
    settings = line_settings()
    trainer, mesh = line(settings)
    with jax.set_mesh(mesh):
        states = [trainer.init(seed) for seed in (1, 1, 2)]
    assert isinstance(states[0], TrainState) and int(states[0].step) == 0
    assert np.array_equal(states[0].key, states[1].key) and not np.array_equal(states[0].key, states[2].key)
