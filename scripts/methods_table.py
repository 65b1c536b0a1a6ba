"""The rows of docs/methods.md: each method as overrides of one of a few recipes, and what it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

TEACHER, DIGITS = "teacher", "digits_teacher"


@dataclass(frozen=True)
class Group:
    """A table. naive: the row that its students must beat; intro: what is compared; measures: in which of a judge's
    metrics students must be clearly better."""

    key: str
    title: str
    naive: str | None
    intro: str
    measures: tuple[str, ...] = ("prompt_right", "appearance_fd")


@dataclass(frozen=True)
class Method:
    """A row of the table.

    key: names the row.
    label: in words.
    group: key of its group, '' for what is trained for other rows and not shown.
    recipe: of the run that is trained, None where nothing is.
    overrides: of the recipe.
    start: networks, and the rows whose runs they start from, of the same seed (a teacher has one seed).
    run: of a row that trains nothing: the row whose weights are sampled.
    steps: of the sampler, see scripts/report_samples.py.
    causal_from: the row by whose blocks and steps the weights are sampled, see scripts/report_samples.py.
    low: of two experts, the row of the low-noise one.
    published: FID of one step on CIFAR-10, in the method's paper and in FastGen.
    why: the reason, where the row does not beat the naive row.
    """

    key: str
    label: str
    group: str
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    start: dict[str, str] = field(default_factory=dict, hash=False)
    run: str | None = None
    steps: int | None = None
    causal_from: str | None = None
    low: str | None = None
    published: str = ""
    why: str = ""

    @property
    def once(self) -> bool:
        """Whether there is one run of it, and not one a seed."""
        return self.recipe is None or self.key in (TEACHER, DIGITS)

    @property
    def is_student(self) -> bool:
        """Whether it is trained from a teacher, and should beat the naive row."""
        return bool(self.start)

    def needs(self) -> set[str]:
        """The rows whose runs come first."""
        return {*self.start.values(), *filter(None, (self.run, self.causal_from, self.low))}


GROUPS = (
    Group("baselines", "The teacher, and what it gives without distillation", None,
          "Real videos are held out from all training. Steps are Euler's, guided: two network evaluations each."),
    Group("one_step", "One step", "teacher_1",
          "A bidirectional student of one evaluation a video, from the teacher's weights."),
    Group("two_steps", "Two steps", "teacher_2",
          "The same at noise levels 1 and 0.75: where the student's inputs come from, and two experts."),
    Group("init", "Causal initialisations", "causal_2",
          "The teacher's weights made causal (three blocks of two frames), sampled in two steps over the cache."),
    Group("causal", "Causal students", "causal_2",
          "Two steps a block over the student's own cache, from diffusion forcing's weights unless the row says more."),
    Group("image", "Causal students of image-to-video", "image_2",
          "One frame of a held-out video is given, the student makes the other four, two at a time. The digit is there "
          "to be seen, so the naive row draws it right more often than above; where it goes only the prompt says."),
    Group("digits", "Images", "digits_1",
          "scikit-learn's handwritten digits, 8 x 8 pixels, one step, from a teacher of images. The distance is "
          "computed like FID but on another network's features: it ranks these rows, and stands beside no published "
          "number. One step of the teacher draws the mean of a class: the right digit, and always the same.", ("fid",)),
)  # fmt: skip

_SCORES = {"teacher": TEACHER, "critic": TEACHER}
_MEANS = (
    "Two Euler steps blur towards a class's mean (see its diversity), which is right more often than the teacher's own "
    "videos at 50 steps; a student that matches the teacher is right as often as the teacher."
)
_UNGUIDED = (
    "Its samples are about as diverse as real ones and nearer to them than the naive row's, but no guided score holds "
    "them to the prompt, and its discriminator hardly does: noised to sigma 0.2, it tells real from generated videos "
    "in 95 to 99 % of pairs, but a real video's own caption from another one in 50 to 62 % (LOG.md)."
)
_GAN = ("data.real=true", "objective.gan.weight=0.03", "objective.gan.training.optimizer.lr=1.0e-3")
_LONGER = ("training.max_steps=620", "checkpoint.every=620")  # a discriminator alone says less of each sample
_GAN_ALONE = (
    *_GAN, "objective.kind=gan", "teacher=null", "objective.gan.features=critic", "objective.gan.loss=relativistic",
    "objective.gan.r1=1.0", "objective.gan.r2=1.0", "objective.gan.penalty_step=0.01",
    "objective.gan.penalty_per_step=true", *_LONGER,
)  # fmt: skip
_LADD = (
    *_GAN, "objective.kind=ladd", "critic=null", "objective.gan.r1=0.1", "objective.ladd_mean=-0.5", *_LONGER,
)  # fmt: skip
_FROM_DATA = ("rollout.last_step_only=false", "data.real=true")
_DATA = ("rollout.kind=noised_data", "data.real=true")


def _row(key: str, label: str, *overrides: str, why: str = "") -> Method:
    scores = {name: row for name, row in _SCORES.items() if f"{name}=null" not in overrides}
    return Method(key, label, "one_step", "one_step", overrides, {"student": TEACHER, **scores}, why=why)


def _two(key: str, label: str, *overrides: str, low: str | None = None, group: str = "two_steps") -> Method:
    start = {"student": TEACHER, **_SCORES}
    return Method(key, label, group, "one_step", overrides, start, low=low, why=_MEANS)


def _init(key: str, label: str, recipe: str, *overrides: str, teacher: str | None = None) -> Method:
    start = {"student": TEACHER} | ({"teacher": teacher} if teacher else {})
    return Method(key, label, "init", recipe, overrides, start)


def _causal(key: str, label: str, *overrides: str, init: str = "init_df") -> Method:
    return replace(
        _row(key, label, *overrides),
        group="causal",
        recipe="causal",
        start=_row("", "", *overrides).start | {"student": init},
    )


def _digits(key: str, label: str, recipe: str, *overrides: str, published: str = "") -> Method:
    scores = {"teacher": DIGITS} | ({} if recipe == "ladd" else {"critic": DIGITS})
    return Method(key, label, "digits", recipe, overrides, {"student": DIGITS, **scores}, published=published)


_STEPS = "schedule.denoising_step_list=[1000, 750]"
_HIGH = ("objective.kind=phased_dmd", "schedule.min_score_timestep=875")
_LOW = ("schedule.denoising_step_list=[750]", "schedule.max_score_timestep=875")

METHODS: tuple[Method, ...] = (
    Method(TEACHER, "Teacher, 50 steps", "baselines", "teacher", steps=50),
    Method("real", "Real, held out", "baselines", run=TEACHER),
    *(
        Method(f"teacher_{n}", f"Teacher, {n} step{'s'[: n > 1]}", "baselines", run=TEACHER, steps=n)
        for n in (4, 2, 1)
    ),
    Method("causal_2", "Teacher, block by block, 2 steps", "baselines", run=TEACHER, causal_from="init_df"),
    Method("image_2", "Teacher, block by block from a frame, 2 steps", "image", run=TEACHER, causal_from="sf_image"),
    Method("image_df", "Diffusion forcing, 2 steps", "image", run="init_df", causal_from="sf_image"),
    _row("dmd", "DMD"),
    _row("dmd2", "DMD2: with a discriminator on the teacher's features", *_GAN),
    _row("dmd2_critic", "DMD2: on the critic's features, register tokens", *_GAN,
         "objective.gan.features=critic", "objective.gan.heads=register"),
    _row("f_kl", "f-distill, forward KL", *_GAN, "objective.kind=f_distill", "objective.f_distill.divergence=kl"),
    _row("f_js", "f-distill, Jensen-Shannon", *_GAN, "objective.kind=f_distill", "objective.f_distill.divergence=js"),
    _row("sid", "SiD", "objective.kind=sid"),
    _row("ladd", "LADD", *_LADD, why=_UNGUIDED),
    _row("gan", "GAN on the critic's features", *_GAN_ALONE, why=_UNGUIDED),
    _row("decoupled", "Decoupled DMD", "objective.kind=decoupled_dmd"),
    _row("ida", "DMD, critic aligned with the student", "objective.critic_keep=0.97"),
    _row("reward", "DMD, weighted by reward", "objective.reward={name: prompt_adherence, beta: 0.5}"),
    _row("rescale", "DMD, guidance rescaled", "objective.guidance_rescale=0.7"),
    _row("shift", "DMD, scores at shift 3", "schedule.score_timestep_shift=3.0"),
    _two("simulated", "DMD, backward simulation", _STEPS),
    _two("noised_data", "DMD, noised data", _STEPS, *_DATA),
    _two("phased", "Phased DMD, two experts", *_HIGH, low="phased_low"),
    _two("phased_low", "Phased DMD, the low-noise expert", *_LOW, *_DATA, group=""),
    _init("init_df", "Diffusion forcing", "causal_init"),
    _init("init_tf", "Teacher forcing", "causal_init", "diffusion.mode=teacher_forcing",
          "diffusion.caption_dropout=0.1", "diffusion.clean_block_share=0"),
    _init("init_ode", "ODE regression, bidirectional teacher", "ode", teacher=TEACHER),
    _init("init_ode_causal", "ODE regression, causal teacher", "ode", "ode.causal_teacher=true", teacher="init_tf"),
    _init("init_consistency", "Causal consistency distillation", "consistency", teacher="init_tf"),
    _causal("sf_dmd", "Self-Forcing, DMD"),
    _causal("sf_random", "Self-Forcing, DMD, exit at a random step", "rollout.last_step_only=false"),
    _causal("sf_self_gradient", "Self-gradient forcing, DMD", "rollout.self_gradient=true"),
    _causal("sf_ode", "Self-Forcing, DMD, from the ODE initialisation", init="init_ode"),
    _causal("sf_long", "Self-Forcing, DMD, rollouts of up to 10 frames", "rollout.num_training_frames=10"),
    _causal("sf_dmd2", "Self-Forcing, DMD2", *_GAN),
    _causal("sf_sid", "Self-Forcing, SiD", "objective.kind=sid"),
    _causal("sf_gan", "Self-Forcing, GAN", *_GAN_ALONE),
    _causal("sf_sizes", "Self-Forcing, DMD, videos of 4 and 6 frames", "training.sizes=[{frames: 4}, {}]"),
    _causal("causvid", "CausVid", "rollout.kind=diffusion_forcing", *_FROM_DATA),
    _causal("causvid_tf", "CausVid, teacher forcing", "rollout.kind=teacher_forcing", *_FROM_DATA),
    replace(_causal("sf_image", "Self-Forcing, DMD", "data.first_frame=true", "data.toy.frames=5",
                    "causal.independent_first_frame=true"), group="image"),
    Method(DIGITS, "Teacher, 50 steps", "digits", "teacher", steps=50),
    Method("digits_real", "Real, held out", "digits", run=DIGITS),
    Method("digits_1", "Teacher, 1 step", "digits", run=DIGITS, steps=1),
    _digits("digits_dmd", "DMD", "dmd2", "objective.gan=null"),
    _digits("digits_dmd2", "DMD2", "dmd2", published="2.13, 1.99"),
    _digits("digits_f_kl", "f-distill, forward KL", "f_distill", published="1.92, 1.85"),
    _digits("digits_f_js", "f-distill, Jensen-Shannon", "f_distill", "objective.f_distill.divergence=js"),
    _digits("digits_ladd", "LADD", "ladd"),
)  # fmt: skip

BY_KEY = {method.key: method for method in METHODS}


def chosen(only: Sequence[str] | None) -> list[Method]:
    """The named rows with all that they need, in the table's order; all of them for None."""
    wanted = list(BY_KEY if only is None else only)
    for key in wanted:
        wanted += sorted(BY_KEY[key].needs() - set(wanted))
    return [method for method in METHODS if method.key in wanted]
