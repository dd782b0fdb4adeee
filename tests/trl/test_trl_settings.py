"""attach(): which settings are refused or warned about by name, and what the words of its arguments mean."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from gradnorm_kernels import StepStats, TaskGradient
from gradnorm_kernels.integrations.trl import attach
from gradnorm_kernels.integrations.trl.validation import check_version, grpo_plan
from tests.trl import trl_tiny as tiny

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")


def stream(rows):
    return rows.to_iterable_dataset()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"task_column": "topic"}, "task_column='topic' is not a column"),
        ({}, {"every": 0}, "every must be an int of at least 1"),
        ({}, {"max_cosines": -1}, "max_cosines must be an int of at least 0, got -1"),
        ({}, {"gain_window": 0}, "gain_window must be an int of at least 1, got 0"),
        ({}, {"keep_groups_together": "no"}, "keep_groups_together must be True or False, got 'no'"),
        ({}, {"allow_undefined": 1}, "allow_undefined must be True or False, got 1"),
        ({}, {"floor": 0.5}, "floor=0.5 goes with drawn tasks, got task_sampling='off'"),
        ({}, {"task_sampling": "loudest"}, "task_sampling must be one of"),
        ({}, {"task_sampling": "proportional", "exponent": 2.0}, "exponent goes with strategy='power'"),
        ({}, {"exponent": 2.0}, "exponent goes with task_sampling='power'"),
        ({}, {"correction": "shout"}, "strategy must be one of"),
        ({}, {"correction": "nash_mtl", "errors": "steps"}, "needs the tasks' inner products, which errors='steps'"),
        ({"per_device_train_batch_size": 6}, {"keep_groups_together": True}, "multiple of num_generations=4"),
        ({"remove_unused_columns": True}, {}, "remove_unused_columns=True drops"),
        ({"torch_compile": True}, {}, "torch_compile=True"),
        ({}, {"layers": "lm_head"}, "picks only the output head"),
    ],
)
def test_settings_that_are_refused(tmp_path, changes, options, message):
    trainer = tiny.grpo(tmp_path, **changes)
    before = dict(trainer.__dict__)
    with pytest.raises(ValueError, match=message):
        attach(trainer, **options)
    assert trainer.__dict__ == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused": True}, "fused=True needs a layer's weight in backward"),
        ({"layers": "all"}, r"only nn\.Linear layers .* also picks .*(norm|embed_tokens)"),
        ({}, None),
    ],
)
def test_zero3_measures_linear_layers_only(tmp_path, options, message, monkeypatch):
    """The trainer is not DeepSpeed's: this is refused before training begins."""
    trainer = tiny.grpo(tmp_path)
    monkeypatch.setattr(type(trainer.accelerator), "deepspeed_plugin", SimpleNamespace(zero_stage=3))
    before = dict(trainer.__dict__)
    if message is None:
        attach(trainer, **options).detach()
    else:
        with pytest.raises(ValueError, match=message):
            attach(trainer, **options)
    assert trainer.__dict__ == before


@pytest.mark.parametrize("version", ["0.29.1", "1.0.0", "1.8.0", "1.17.0", "1.17.0.dev0", "2.9.0", "main"])
def test_other_versions_of_trl_are_refused(tmp_path, version, monkeypatch):
    trainer = tiny.grpo(tmp_path)
    before = dict(trainer.__dict__)
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ValueError, match=rf"TRL {version} is installed; .* TRL 1\.9 to 1\.16 .*trl>=1\.9,<1\.17"):
        attach(trainer)
    assert trainer.__dict__ == before
    for known in ("1.9.0", "1.16.3", "1.16.0.dev0"):
        check_version(known)


@pytest.mark.parametrize(
    ("accelerator", "message"),
    [
        ({"parallelism_config": SimpleNamespace(cp_enabled=True, sp_enabled=False)}, "cp_size or sp_size above 1"),
        ({"parallelism_config": SimpleNamespace(cp_enabled=False, sp_enabled=True)}, "cp_size or sp_size above 1"),
        ({"distributed_type": "DistributedType.DEEPSPEED", "mixed_precision": "fp16"}, "use bf16"),
    ],
)
def test_settings_of_accelerate_that_are_refused(tmp_path, accelerator, message):
    trainer = tiny.grpo(tmp_path)
    trainer.accelerator = SimpleNamespace(**{"distributed_type": "DistributedType.NO", **accelerator})
    with pytest.raises(ValueError, match=message):
        attach(trainer)


def test_a_task_column_with_holes_is_refused(tmp_path):
    data = tiny.prompts().map(lambda row, at: {"task": None if at == 3 else row["task"]}, with_indices=True)
    with pytest.raises(ValueError, match="must hold a string or an int in every row, got None"):
        attach(tiny.grpo(tmp_path, data=data))


def test_streams_losses_and_trainers_that_are_refused(tmp_path):
    with pytest.raises(TypeError, match="must be a GRPOTrainer"):
        attach(object())
    streamed = tiny.grpo(tmp_path, data=stream(tiny.prompts()))
    with pytest.raises(ValueError, match="this one is a stream"):
        attach(streamed, task_sampling="uniform")
    attached = attach(streamed)
    streamed.train()
    assert attached.last
    unknown = tiny.grpo(tmp_path)
    unknown.loss_type = "novel"
    with pytest.raises(ValueError, match="loss_type='novel' is not one"):
        attach(unknown)
    old = tiny.grpo(tmp_path)
    old.__class__ = type("Old", (trl.GRPOTrainer,), {"_calculate_rewards": property(lambda self: self.gone)})
    with pytest.raises(ValueError, match="lacks _calculate_rewards"):
        attach(old)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"scale_rewards": "batch"}, {}, "scale_rewards='batch'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, {}, "normalize_then_sum"),
        ({"entropy_coef": 0.1}, {}, "entropy_coef"),
        ({"top_entropy_quantile": 0.5}, {}, "top_entropy_quantile"),
        ({"num_iterations": 3}, {}, "make 3 optimizer steps from one generation: only the first"),
        ({"steps_per_generation": 8}, {}, "make 4 optimizer steps from one generation"),
        ({"loss_type": "cispo"}, {}, "0.2 times, and U 0.04 times"),
        (
            {"per_device_train_batch_size": 4},
            {"keep_groups_together": True, "accumulate": "pairs"},
            "U stays undefined",
        ),
        (
            {"gradient_accumulation_steps": 1, "num_generations": 8},
            {},
            "U stays undefined: an optimizer step holds one",
        ),
        ({}, {"layers": "all"}, "lm_head"),
    ],
)
def test_biased_settings_are_warned_about_by_name(tmp_path, changes, options, message):
    trainer = tiny.grpo(tmp_path, **changes)
    with pytest.warns(UserWarning, match=message):
        attach(trainer, **options)


@pytest.mark.parametrize(
    ("changes", "samples"),
    [
        ({"num_generations": 8, "gradient_accumulation_steps": 4, "steps_per_generation": 1}, 4),
        ({"num_generations": 8, "gradient_accumulation_steps": 4, "steps_per_generation": 1, "num_iterations": 2}, 2),
        ({"num_generations": 8, "gradient_accumulation_steps": 1, "steps_per_generation": 1}, 1),
        ({"num_generations": 8, "gradient_accumulation_steps": 4}, 4),
        ({"num_generations": 8, "gradient_accumulation_steps": 1, "steps_per_generation": 4}, 4),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}, 4),
    ],
)
def test_the_plan_counts_the_prompts_of_every_generation_in_a_step(tmp_path, changes, samples):
    trainer = tiny.grpo(tmp_path, **changes)
    assert grpo_plan(trainer, False, 3).samples == samples
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        attached = attach(trainer, task_sampling="proportional")
    undefined = [str(one.message) for one in said if "U stays undefined" in str(one.message)]
    assert bool(undefined) == (samples == 1)
    assert attached._hooks.sampler is (None if undefined else attached.sampler)


def test_rows_that_a_step_repeats_are_measured_once(tmp_path):
    """A step longer than a generation's iterations trains on the same rows again before the weights change."""
    settings = {"num_generations": 8, "gradient_accumulation_steps": 4, "steps_per_generation": 1, "max_steps": 1}
    trainer = tiny.grpo(tmp_path, num_iterations=2, **settings)
    attached = attach(trainer)
    trainer.train()
    assert sum(gradient.n for gradient in attached.last.values()) == 2


def test_a_correction_that_goes_by_no_estimate_starts_where_u_is_undefined(tmp_path):
    settings = {"num_generations": 8, "gradient_accumulation_steps": 1}
    with pytest.warns(UserWarning, match="U stays undefined") as said:
        by_rewards = attach(tiny.grpo(tmp_path, **settings), correction="famo")
        by_estimates = attach(tiny.grpo(tmp_path, **settings), correction="gradnorm", task_sampling="inverse")
    assert by_rewards._hooks.balancer is by_rewards.balancer is not None
    assert by_estimates._hooks.balancer is None and by_estimates._hooks.sampler is None
    texts = [str(one.message) for one in said if "U stays undefined" in str(one.message)]
    assert "not start" not in texts[0] and "task_sampling='inverse' and correction would go by no estimate" in texts[1]


def test_default_settings_warn_about_nothing(tmp_path):
    trainer = tiny.grpo(tmp_path, beta=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(trainer, correction="equal_pull")


def test_a_tied_head_takes_its_embedding_along(tmp_path):
    tied = tiny.model(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="lm_head, model.embed_tokens"):
        attached = attach(tiny.grpo(tmp_path, trained=tied), layers="all")
    assert "model.embed_tokens" not in attached.tracker.layers
    assert "model.norm" in attached.tracker.layers


# The words of task_sampling


@pytest.mark.parametrize("options", [{}, {"task_sampling": "off"}])
def test_off_leaves_the_trainers_sampler_alone(tmp_path, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached = attach(tiny.grpo(tmp_path, beta=0.0), **options)
    assert attached.sampler is None


def test_equal_is_the_old_word_for_uniform(tmp_path):
    """Both draw every task alike and warn: "equal" because it is old, "uniform" because it used to mean "off"."""
    with pytest.warns(FutureWarning, match="'equal' is now called 'uniform'"):
        old = attach(tiny.grpo(tmp_path), task_sampling="equal")
    with pytest.warns(FutureWarning, match=r"every task with the same probability. It used to .* pass 'off'"):
        new = attach(tiny.grpo(tmp_path), task_sampling="uniform")
    for attached in (old, new):
        assert attached.sampler.strategy == "uniform"
        assert attached.sampler.probabilities == pytest.approx(dict.fromkeys(tiny.TASKS, 1 / 3))
    assert old.sampler.draw(50) == new.sampler.draw(50)


def test_a_run_under_the_old_uniform_is_not_resumed_with_draws(tmp_path):
    """A checkpoint of the old "uniform" holds no draws: the new "uniform" refuses it, and "off" continues from it."""
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    old = tiny.grpo(tmp_path, **options)
    attach(old)
    old.train()
    for word in ("uniform", "off"):
        again = tiny.grpo(tmp_path, **{**options, "max_steps": 2})
        attach(again, task_sampling=word)
        if word == "uniform":
            with pytest.raises(ValueError, match="saved without draws: call attach"):
                again.train(resume_from_checkpoint=True)
        else:
            again.train(resume_from_checkpoint=True)
            assert again.state.global_step == 2


# An environment that owns the data


class Environment:
    """Supplies a prompt and a reward, and remembers what its reset was given."""

    given: list[dict[str, object]] = []

    def reset(self, **row: object) -> str:
        self.given.append(row)
        return f"w{len(self.given) % 20} w2"

    def get_reward(self) -> float:
        return float(len(self.given) % 3)


def environment_trainer(tmp_path, monkeypatch, data):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' ' }}{{ m['content'] or '' }} "
        "{% for call in m['tool_calls'] or [] %}{{ call | tojson }} {% endfor %}{% endfor %}"
    )
    args = trl.GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=4,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )
    return trl.GRPOTrainer(
        model=tiny.model(),
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        environment_factory=Environment,
    )


def test_an_environment_that_owns_the_data_names_no_tasks(tmp_path, monkeypatch):
    """The refusal says what to do, and doing it works."""
    owns_all = environment_trainer(tmp_path, monkeypatch, None)
    with pytest.raises(
        ValueError, match=r"environment owns the data .* pass train_dataset= with a task column"
    ) as said:
        attach(owns_all)
    assert "pack" not in str(said.value)
    data = tiny.prompts(8).map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    trainer = environment_trainer(tmp_path, monkeypatch, data)
    attached = attach(trainer)
    trainer.train()
    assert sum(gradient.n for gradient in attached.last.values()) == 4
    assert {row["task"] for row in Environment.given[-16:]} == set(attached.last)


# How many cosines a line holds


def test_cosines_are_capped(tmp_path):
    """Of 20 tasks' 190 pairs the log holds the 100 measured on the most samples, whatever the cosine."""
    names = [f"t{k:02}" for k in range(20)]
    gram = torch.eye(20, dtype=torch.float64) + 0.01 * torch.arange(400, dtype=torch.float64).view(20, 20)
    stats = StepStats()
    stats.tasks, stats.inner_products = names, (gram + gram.T) / 2
    for k, name in enumerate(names):
        n = 40 - k  # the first tasks have the most samples
        stats[name] = TaskGradient(float(stats.inner_products[k, k]), 0.0, 0.0, 0.0, n, 0.0, float(n * (n - 1)), "none")
    weight = {
        f"tasks/cosine/{a}/{b}": stats[a].pair_weight * stats[b].pair_weight for a in names for b in names if a < b
    }
    for most, count in ((None, 190), (190, 190), (5, 5), (0, 0)):
        attached = attach(tiny.grpo(tmp_path), max_cosines=most)
        attached._take_in(stats)
        logged = {key: value for key, value in attached.metrics().items() if key.startswith("tasks/cosine/")}
        assert len(logged) == count
        heaviest = sorted(weight, key=lambda key: -weight[key])[:count]
        assert set(logged) == set(heaviest)
        for key, value in logged.items():
            a, b = (names.index(name) for name in key.split("/")[2:])
            product = stats.inner_products
            assert value == pytest.approx(float(product[a, b] / (product[a, a] * product[b, b]).sqrt()))
    attached = attach(tiny.grpo(tmp_path))
    attached._take_in(stats)
    with pytest.warns(UserWarning, match="190 pairs of tasks have a cosine: each log line gets the 100"):
        assert sum(key.startswith("tasks/cosine/") for key in attached.metrics()) == 100
