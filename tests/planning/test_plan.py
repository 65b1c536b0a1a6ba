"""The planner against closed forms, against a whole run, and against what a real run's allocator reports."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

from configs.load import load_run
from configs.schema import RunConfig
from model.attention.sparse import SparseConfig
from model.attention.vsa.counting import kernels_counted_by
from model.attention.vsa.tiles import Tiling, tile_maps
from model.wan.config import PRESETS, WanConfig
from model.wan.transformer import WanTransformer
from planning.hardware import GPU, GPUS, bound, needed_gb
from planning.launch import Recipe, cluster_of, fitted
from planning.meter import FLOPS, Meter, Owner, Traffic, sent_bytes
from planning.plan import Cluster, Plan, kinds_of, make_plan, update_cost
from planning.pretend_run import ALLOCATION, SHARDED, Iteration, pretended_world, run, stripped
from planning.report import changes, plan_text, remedies, report
from tests import ROOT, forked, small
from tests.distributed import measured_peak
from trainer.command import PlanArgs, train_args
from utils.errors import UserError

YAML = ROOT / "configs" / "toy" / "self_forcing_dmd.yaml"
H200 = GPUS["h200"]
NETWORK = {
    "preset": "toy",
    "overrides": {"num_layers": 2, "num_heads": 4},
    "attention": "sdpa",
    "checkpointing": "full",
}
HYBRID = {"replicate": 2, "shard": 2, "sequence": 2}


def config(layers: int = 2, **changes: Any) -> RunConfig:
    network = small.merged(NETWORK, {"overrides": {"num_layers": layers}})
    base: dict[str, Any] = {
        "student": network,
        "teacher": network,
        "critic": network,
        "data": {"synthetic": {"frames": 6}},
        "rollout": {"last_step_only": False},
        "training": {"precision": "bf16", "global_batch_size": 16},
    }
    return measured_peak.config(**small.merged(base, changes))


@pytest.fixture(scope="module")
def hybrid() -> Plan:
    """Eight GPUs on two nodes; four micro-batches a rank."""
    return make_plan(config(parallel=HYBRID), Cluster(2, 4, "h200", H200))


def shapes(geometry: WanConfig) -> list[torch.Size]:
    with torch.device("meta"):
        return [p.shape for p in WanTransformer(geometry).parameters()]


def share(shape: torch.Size, ways: int) -> int:
    """Elements of the first rank's rows."""
    return math.ceil(shape[0] / ways) * math.prod(shape[1:])


def allocated(size: int) -> int:
    return -(-size // ALLOCATION) * ALLOCATION


def test_state_is_count_times_bytes_over_shards(hybrid: Plan) -> None:
    """fp32 weights, second moments (betas 0, 0.999) and average, bf16 teacher; each parameter cut into shard x sequence."""
    parts = [share(shape, 4) for shape in shapes(config().student.geometry())]
    fp32, bf16 = (sum(allocated(n * size) for n in parts) for size in (4, 2))
    assert hybrid.rest[Owner("student", "parameters")] == hybrid.rest[Owner("critic", "parameters")] == fp32
    assert hybrid.rest[Owner("teacher", "parameters")] == bf16
    assert hybrid.rest[Owner("student", "EMA")] == fp32
    counts = ALLOCATION * len(parts)  # one step counter each
    assert hybrid.rest[Owner("student", "optimizer")] == hybrid.rest[Owner("critic", "optimizer")] == fp32 + counts
    assert not any(owner.network == "teacher" and owner.category in ("optimizer", "EMA") for owner in hybrid.rest)


def test_cache_is_layers_keys_and_values_of_the_context_over_the_heads(hybrid: Plan) -> None:
    """6 frames in blocks of 3: 3 of context and 3 of the block, of 8 x 8 tokens, for half of the heads, in bf16; and the
    text's keys and values of all heads, as each rank has them."""
    geometry = config().student.geometry()
    cache = 2 * 2 * (3 + 3) * 64 * (geometry.dim // 2) * 2
    assert hybrid.parts[Owner("student", "KV cache")] >= cache
    text = 2 * 2 * geometry.text_len * geometry.dim * 2
    assert hybrid.parts[Owner("student", "KV cache")] <= cache + allocated(text)


def test_gradients_are_reduced_once_an_update(hybrid: Plan) -> None:
    """In fp32 over the four shards, then over the two copies, whatever the number of micro-batches."""
    parts = [share(shape, 4) for shape in shapes(config().student.geometry())]
    cost = hybrid.iterations[0].cost
    scattered = sum(cost[Traffic("reduce-scatter", far)] for far in (False, True))
    assert scattered == 2 * 4 * 4 * sum(parts) * 3 / 4  # two networks, fp32, four parts, three of them sent
    reduced = sum(cost[Traffic("all-reduce", far)] for far in (False, True))
    assert reduced == pytest.approx(2 * 4 * sum(parts), rel=0.01)  # 2 (n - 1) / n of a part, and a few numbers
    assert cost[Traffic("reduce-scatter", True)] == 0  # a copy of the weights is one node's
    assert cost[Traffic("all-reduce", True)] > 0.99 * reduced


def test_bytes_of_a_gather_and_who_sends_them() -> None:
    meter = Meter(gpus_per_node=4)
    with pretended_world(8), meter.running():
        meter.enter("gather")
        dist.all_gather_into_tensor(torch.empty(8 * 1000), torch.empty(1000))
    cost = meter.phases["gather"].cost
    assert sum(cost.values()) == 7 * 4000
    assert cost[Traffic("all-gather", True)] == 7 * 4000 / 4  # one hop of four leaves the node


@pytest.mark.parametrize(
    ("kind", "sent"), [("all-gather", 700), ("reduce-scatter", 700), ("all-reduce", 1400), ("all-to-all", 700)]
)
def test_bytes_sent(kind: str, sent: float) -> None:
    assert sent_bytes(kind, 800, 8, 8) == (sent, 0)
    assert sum(sent_bytes(kind, 800, 8, 2)) == sent
    assert sent_bytes(kind, 800, 8, 1)[0] == 0
    far = 800 * 6 / 8 if kind == "all-to-all" else sent / 2
    assert sent_bytes(kind, 800, 8, 2)[1] == far


def forward_flops(c: WanConfig, tokens: int) -> int:
    """Two a multiplication: matrices of tokens, text and time, and attention."""
    block = 4 * c.dim**2 + 2 * c.dim**2 + 2 * c.dim * c.ffn_dim
    per_text = 2 * c.dim**2
    attention = 2 * c.dim * (tokens + c.text_len)
    layers = tokens * (block + attention) + c.text_len * per_text
    patch = 4 * c.in_dim * c.dim + 4 * c.out_dim * c.dim
    text = c.text_len * (c.text_dim * c.dim + c.dim**2)
    time = c.freq_dim * c.dim + c.dim**2 + 6 * c.dim**2
    return 2 * (c.num_layers * layers + tokens * patch + text + time)


def test_flops_of_a_forward_pass() -> None:
    c = PRESETS["tiny"]
    meter = Meter(cuda=True)
    with meter.running(), torch.no_grad():
        net = WanTransformer(c)
        meter.enter("forward")
        net(torch.empty(1, 3, c.in_dim, 8, 8), torch.empty(1), torch.empty(1, c.text_len, c.text_dim))
    assert meter.phases["forward"].cost[FLOPS] == forward_flops(c, 3 * 16)


def test_attention_costs_two_and_a_half_times_as_much_backward() -> None:
    meter = Meter()
    with meter.running():
        q, k = torch.empty(1, 2, 64, 16, requires_grad=True), torch.empty(1, 2, 32, 16, requires_grad=True)
        meter.enter("forward")
        out = torch.nn.functional.scaled_dot_product_attention(q, k, k)
        meter.enter("backward")
        out.sum().backward()
    assert meter.phases["forward"].cost[FLOPS] == 4 * 2 * 64 * 32 * 16
    assert meter.phases["backward"].cost[FLOPS] == 2.5 * meter.phases["forward"].cost[FLOPS]


def test_sparse_attention_is_planned_as_its_kernels() -> None:
    """FLOPs beside the dense network's: gates, attention between tiles, kept pairs of tiles in place of all tokens.
    Made without Triton; what the cache of index maps holds afterwards are true tensors."""
    c, tokens, tiles, kept = PRESETS["tiny"], 48, 3, 2
    cost = {}
    for sparse in (None, SparseConfig(0.5, [1, 4, 4], "reference")):
        meter = Meter(cuda=True)
        with kernels_counted_by(meter), meter.running():
            if sparse is not None:
                sparse.backend = "triton"
            net = WanTransformer(c, sparse=sparse)
            meter.enter("forward")
            out = net(torch.empty(1, 3, c.in_dim, 8, 8), torch.empty(1), torch.empty(1, c.text_len, c.text_dim))
            meter.enter("backward")
            out.sum().backward()
        cost[sparse is not None] = [meter.phases[stage].cost[FLOPS] for stage in ("forward", "backward")]
    gates, between = 2 * tokens * c.dim**2, 4 * tiles**2 * c.dim
    fine, dense = 4 * tiles * kept * 16**2 * c.dim, 4 * tokens**2 * c.dim
    forward, backward = (new - old for new, old in zip(cost[True], cost[False], strict=True))
    assert forward == c.num_layers * (gates + between + fine - dense)
    assert backward == c.num_layers * (2 * gates + 2 * between + 3.5 * fine - 2.5 * dense)
    assert not isinstance(tile_maps(Tiling((3, 4, 4), (1, 4, 4)), torch.device("cpu")).counts, FakeTensor)


def test_few_layers_of_a_sparse_student_tell_of_many() -> None:
    sparse = {"sparsity": 0.5, "cube": [1, 2, 2], "backend": "reference"}
    deep = config(5, student={"sparse": sparse}, training={"max_steps": 1})
    guessed, whole = (make_plan(deep, Cluster(1, 1, "h200", H200), whole=whole) for whole in (False, True))
    # within a sparse layer two moments are nearly as high, and with the depth another one is the highest
    assert guessed.peak == pytest.approx(whole.peak, rel=1e-3)
    assert guessed.iterations[0].cost == pytest.approx(whole.iterations[0].cost, rel=1e-12)
    with torch.device("meta"):
        sizes = [p.numel() for p in WanTransformer(deep.student.geometry(), sparse=deep.student.sparse).parameters()]
    # the gates among them, a twentieth; allocations are rounded up
    assert whole.rest[Owner("student", "parameters")] == pytest.approx(4 * sum(sizes), rel=1e-3)


CLUSTERS = [
    ({}, Cluster(1, 1, "h200", H200)),
    pytest.param(HYBRID, Cluster(2, 4, "h200", H200), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("parallel", "cluster"), CLUSTERS)
def test_few_layers_tell_of_many(parallel: dict[str, int], cluster: Cluster) -> None:
    """Memory and cost of five layers (the teacher: six) from runs of three and four: exactly those of the whole."""
    deep = config(5, parallel=parallel, teacher={"overrides": {"num_layers": 6}}, training={"max_steps": 1})
    guessed, whole = make_plan(deep, cluster), make_plan(deep, cluster, whole=True)
    assert guessed.peak == whole.peak
    assert {owner: size for owner, size in guessed.parts.items() if size} == {
        owner: size for owner, size in whole.parts.items() if size
    }
    assert guessed.iterations[0].cost == pytest.approx(whole.iterations[0].cost, rel=1e-12)


def test_a_discriminator_is_planned() -> None:
    """Of LADD, without a critic: its heads' own update, and as many tapped blocks in runs of few layers as in the
    whole. Its teacher is not run beyond the last of them."""
    changes: dict[str, Any] = {
        "critic": None,
        "objective": {"kind": "ladd", "gan": {"depths": [0.5, 0.7]}},  # the one block 2 of 4 layers, two of 3 and of 5
        "data": {"real": True, "synthetic": {"frames": 3}},
        "rollout": {"kind": "noised_data"},
        "training": {"critic_warmup_steps": 1, "max_steps": 3},
    }
    plain = config(5, **changes)
    cluster = Cluster(1, 1, "h200", H200)
    guessed, whole = make_plan(plain, cluster), make_plan(plain, cluster, whole=True)
    assert guessed.peak == whole.peak
    assert guessed.rest == whole.rest
    assert guessed.rest[Owner("discriminator", "optimizer")] > guessed.rest[Owner("discriminator", "parameters")] > 0
    for guess, exact in zip(guessed.iterations, whole.iterations, strict=True):
        assert guess.cost == pytest.approx(exact.cost, rel=1e-12)
        assert guess.cost[FLOPS] > 0
    assert [(item.kind.name, item.kind.count) for item in guessed.iterations] == [
        ("student and discriminator", 2), ("discriminator", 1)
    ]  # fmt: skip
    assert "\ndiscriminator " in report(guessed)
    assert "critic" not in report(guessed)


def test_what_no_plan_can_know_stops_none() -> None:
    """Made-up numbers lie within an expert's interval; synthetic samples have no reward."""
    objective = {"kind": "phased_dmd", "reward": {"name": "prompt_adherence"}}
    schedule = {"denoising_step_list": [1000], "min_score_timestep": 500}
    plain = stripped(config(objective=objective, schedule=schedule, training={"global_batch_size": 1}))
    assert run(plain, Meter(), [Iteration(0, [0])]).phases


def test_a_run_on_noised_real_videos_is_planned() -> None:
    """Its levels are drawn by block; a pretended tensor of block sizes has no numbers to count frames by."""
    changes: dict[str, Any] = {"rollout": {"kind": "diffusion_forcing"}, "data": {"real": True}}
    plain = stripped(config(**changes, training={"global_batch_size": 1}))
    assert run(plain, Meter(), [Iteration(0, [0])]).phases


def test_cost_is_affine_in_the_exit_step() -> None:
    plain = stripped(config(schedule={"denoising_step_list": [1000, 750, 500]}))
    record = run(plain, Meter(), [Iteration(0, [1, 0]), Iteration(0, [2, 2])])
    for update in ("student", "critic"):
        assert update_cost(record, 0, update, 2.0) == update_cost(record, 1, update, 2.0)
        assert update_cost(record, 0, update, 1.0) != update_cost(record, 0, update, 2.0)


def test_shapes_are_those_of_fake_tensor_mode() -> None:
    """The shortcut past FakeTensorMode changes no byte and no FLOP, nor does what it remembers of an earlier run."""
    plain = stripped(config(schedule={"denoising_step_list": [1000]}, training={"global_batch_size": 1}))
    first, again, slow = (run(plain, Meter(slow=slow), [Iteration(0, [0])]) for slow in (False, False, True))
    assert first.phases == again.phases == slow.phases


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "checkpointed"])
def test_peak_is_that_of_a_real_run(case: str, tmp_path: Path) -> None:
    asked = measured_peak.config(**measured_peak.CASES[case])
    real = measured_peak.measured(asked, tmp_path)
    assert measured_peak.planned(asked, 1) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("schedule", ["joint", "alternating"])
def test_iterations_are_counted_as_the_loop_makes_them(schedule: str) -> None:
    """In closed form, so that any number of iterations is planned."""
    for warmup, interval, steps in itertools.product((0, 1, 4), (1, 2, 5), (6, 7, 11)):
        if schedule == "alternating" and interval == 1:
            continue
        changes: dict[str, Any] = {
            "update_schedule": schedule, "critic_warmup_steps": warmup, "generator_update_interval": interval,
            "max_steps": steps,
        }  # fmt: skip
        asked = config(training=changes)
        students = [step for step in range(steps) if asked.training.trains_generator(step)]
        others = [step for step in range(steps) if step not in students]
        found = [(kind.step, kind.count) for kind in kinds_of(asked)]
        assert found == [(which[0], len(which)) for which in (students, others) if which]
        assert asked.training.critic_updates(steps) == sum(map(asked.training.trains_critic, range(steps)))
    assert sum(kind.count for kind in kinds_of(config(training={"max_steps": 10**12}))) == 10**12


def test_what_would_make_it_fit(hybrid: Plan) -> None:
    """Settings that the report names are legal ones, and the plan with them fits."""
    tight = dataclasses.replace(H200, memory=needed_gb(0.8 * hybrid.peak))
    plan = dataclasses.replace(hybrid, cluster=Cluster(2, 4, "tight", tight))
    assert hybrid.fits
    assert not plan.fits
    assert "does not fit" in report(plan)
    assert "does not fit" not in report(hybrid)
    names = [name for change in changes(plan) for name in change.settings]
    assert "parallel.sync_each_micro_batch" in names
    assert "parallel.offload_teacher" in names
    assert "student.checkpointing" not in names  # it is full already
    lines = remedies(plan, most=1)
    assert len(lines) == 2
    assert lines[1].startswith("  parallel.")


def test_of_several_sizes_the_largest_is_planned(hybrid: Plan) -> None:
    several = config(training={"sizes": [{"frames": 3}, {"height": 20, "width": 32}, {"frames": 9, "height": 8}]})
    plain = stripped(several)
    assert plain.data.size == (6, 20, 32)
    assert plain.training.sizes is None
    assert "largest of training.sizes, 6x20x32" in report(dataclasses.replace(hybrid, config=several))
    assert "training.sizes" not in report(hybrid)


@pytest.mark.slow
def test_offloaded_state_is_not_the_gpus(hybrid: Plan) -> None:
    state = ("parameters", "optimizer", "EMA", SHARDED)
    plan = make_plan(config(parallel={**HYBRID, "offload_optimizer": True}), Cluster(2, 4, "h200", H200))
    saved = sum(hybrid.rest.get(Owner(name, what), 0) for name in ("student", "critic") for what in state)
    assert plan.peak <= hybrid.peak - 0.9 * saved
    assert "in the CPU's memory" in report(plan)


def test_time_is_the_slower_of_arithmetic_and_transfers() -> None:
    gpu = GPU(memory=80, tflops=1, links=10, network=1, host=1)
    cost = {FLOPS: 2e12, Traffic("all-gather", False): 5e9, Traffic("all-gather", True): 3e9}
    assert bound(cost, gpu).total == 3.0  # the network takes 3 s, the arithmetic 2
    cost[Traffic("all-to-all", False)] = 10e9
    assert bound(cost, gpu).total == 4.0  # attention waits


@pytest.mark.parametrize(
    ("recipe", "asked", "world"),
    [
        ("toy/self_forcing_dmd", PlanArgs(), (1, 1)),  # its head names CPU cores
        ("wan2.1_1.3b/self_forcing_dmd", PlanArgs(), (1, 8)),
        ("wan2.1_14b/self_forcing_dmd", PlanArgs(), (8, 8)),
        ("wan2.1_14b/self_forcing_dmd", PlanArgs(nodes=2), (2, 8)),
        ("wan2.1_14b/self_forcing_dmd", PlanArgs(gpus_per_node=4), (1, 4)),
    ],
)
def test_a_plan_is_for_what_the_recipe_is_meant_for(recipe: str, asked: PlanArgs, world: tuple[int, int]) -> None:
    path = ROOT / f"configs/{recipe}.yaml"
    cluster = cluster_of(Recipe(path), load_run(path), asked)
    assert (cluster.nodes, cluster.gpus_per_node) == world


def test_a_split_that_nobody_chose_fits_the_batch() -> None:
    """8 GPUs and a batch of 2: 2 copies of which each is 4 GPUs with a part of the video."""
    run = load_run(ROOT / "configs/wan2.1_1.3b/self_forcing_dmd.yaml", ["training.global_batch_size=2"])
    cluster = Cluster(1, 8, "h200", GPUS["h200"])
    assert fitted(run, cluster).parallel.sequence == 4
    chosen = dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, shard=8))
    assert fitted(chosen, cluster) == chosen  # what a user says stays, and is refused if it cannot be


MISTAKES = [
    (["--plan", "--gpu", "h300"], ["h300", "h200"]),
    (["--nodes", "2"], ["--plan"]),
    (["--plan", "--gpus_per_node", "6", "parallel.replicate=4"], ["world of 6 processes", "1x6x1"]),
    (["--plan", "--gpus_per_node", "5"], ["global_batch_size", "5 ranks"]),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES)
def test_mistakes_say_what_is_legal(arguments: list[str], said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        args = train_args(["--config_path", str(YAML), *arguments])
        assert args.plan is not None
        config = load_run(args.config_path, args.overrides)
        plan_text(config, cluster_of(Recipe(args.config_path), config, args.plan))
    assert all(words in str(caught.value) for words in said), caught.value


def test_a_plan_needs_no_weights_and_leaves_no_files(tmp_path: Path) -> None:
    """The toy recipe, whose weights are not there; one block of all frames makes it short."""
    done = forked.run(
        1, str(ROOT / "train.py"), "--config_path", str(YAML), "--plan", "--gpus_per_node", "1",
        "causal.num_frame_per_block=6", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "peak" in done.stdout
    assert "GPU-hours" in done.stdout
    assert ": fits" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_not_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="not torchrun"), pretended_world(8):
        pass
