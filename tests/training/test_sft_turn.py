"""One client's turn through trl: what it trains, that it repeats, and that it leaves nothing."""

import copy
import dataclasses
import gc
import logging
import os
import random
import tempfile
import warnings

import datasets
import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from trl import SFTConfig, SFTTrainer
from trl.trainer import base_trainer

from fedcore.errors import FedcoreError
from fedcore.methods import create_method
from fedcore.training import sft_turn
from fedcore.training.binding import ModelBinding
from fedcore.training.local_training import LocalSettings
from fedcore.training.optimisers import OptimiserSettings
from fedcore.training.round_draws import row_order
from fedcore.training.schedules import Schedule
from fedcore.training.sft_options import OWNED, PASSED, SftSettings
from fedcore.training.sft_turn import check_packing, take_sft_turn
from fedcore.tuners.attach import attach_adapter

VOCABULARY = 60
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
KEPT = OptimiserSettings(rate=1e-2, state="keep", schedule=Schedule("cosine"))
FEW = LocalSettings(batch_size=4, steps=3)


def rows(count=40):
    """Rows of unequal length; the first token says which one it is."""
    ids = [
        [2 + i, *(2 + (7 * i + 3 * j) % 50 for j in range(3 + 5 * (i % 4)))] for i in range(count)
    ]
    return datasets.Dataset.from_dict(
        {"input_ids": ids, "labels": [[-100, -100, *row[2:]] for row in ids]}
    )


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>"
    )


def base(kind=transformers.LlamaConfig, **more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = kind(**{**SIZES, **more})
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.config.use_cache = False
    return model.eval()


def llama(**more):
    return base(intermediate_size=24, num_key_value_heads=1, **more)


def adapted(family="lora", model=None, **options):
    return attach_adapter(
        model or llama(),
        family,
        rank=3,
        alpha=6.0,
        target_modules=["q_proj", "v_proj"],
        layers=None,
        use_rslora=False,
        init_std=0.1 if family == "gram" else None,
        frame="structured",
        seed=1,
        task_type="CAUSAL_LM",
        **options,
    )


def dropping(dropout=0.1):
    """With dropout, which attach_adapter does not offer."""
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        lora_dropout=dropout,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(llama(), config)


def take(
    model, tokenizer, data=None, *, factors="AB", local=FEW, optimiser=KEPT, sft=None, **named
):
    return take_sft_turn(
        model,
        tokenizer,
        rows() if data is None else data,
        ModelBinding.of(model).trained(factors),
        frozenset(),
        local,
        optimiser,
        sft or SftSettings(),
        seed=named.pop("seed", 0),
        client=named.pop("client", "client-00"),
        **named,
    )


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# What trains.

PLANS = [
    ("florg", 0, {}),
    ("fedsb", 0, {}),
    ("fedit", 0, {}),
    ("ffa", 0, {}),
    ("rolora", 0, {}),
    ("rolora", 1, {}),
]


@pytest.mark.parametrize(("method", "round", "options"), PLANS)
def test_what_the_plan_trains_changes_and_what_it_freezes_keeps_its_bits(
    method, round, options, tokenizer
):
    made = create_method(method)
    model = adapted(made.family, **made.adapter_options)
    if made.family == "lora":
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    binding, before = ModelBinding.of(model), values(model)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    trains = made.plan(round).trains
    take(model, tokenizer, factors=trains, round=round, rounds=2)
    after = values(model)
    expected = {
        name
        for name, parameter in model.named_parameters()
        for slot in binding.layout
        if binding.parameters[slot.name] is parameter and slot.factor in trains
    }
    assert expected
    assert {name for name in after if not torch.equal(after[name], before[name])} == expected
    assert same(dict(model.named_buffers()), buffers)


def test_only_the_parameters_passed_are_stepped_or_clipped(tokenizer):
    """What else requires a gradient neither moves nor counts in the norm."""
    alone, beside = adapted(), adapted()
    local, optimiser = dataclasses.replace(FEW, clip_norm=1e-3), OptimiserSettings("sgd", 1.0)
    take(alone, tokenizer, local=local, optimiser=optimiser)
    binding = ModelBinding.of(beside)
    parameters = binding.trained("AB")
    head = beside.get_base_model().lm_head.weight
    head.requires_grad_(True)
    kept = head.detach().clone()
    take_sft_turn(
        beside,
        tokenizer,
        rows(),
        parameters,
        frozenset(),
        local,
        optimiser,
        SftSettings(),
        seed=0,
        client="client-00",
    )
    assert torch.equal(head, kept)
    assert head.requires_grad
    assert same(values(alone), values(beside))


def test_no_parameter_is_rounded_on_a_base_that_is_said_to_be_8_bit(tokenizer):
    """trl casts what trains to bf16 where the model says that it was loaded so."""
    plain, said = adapted(), adapted()
    take(plain, tokenizer)
    said.get_base_model().is_loaded_in_8bit = True
    assert said.is_loaded_in_8bit
    take(said, tokenizer)
    assert all(p.dtype == torch.float32 for p in said.parameters())
    assert same(values(plain), values(said))


# That it repeats.


def turns(model, tokenizer, first, last, state=None, total=3, **named):
    results = []
    for t in range(first, last):
        result = take(model, tokenizer, round=t, rounds=total, state=state, **named)
        state = result.state
        results.append(result)
    return results


def test_a_resumed_client_has_the_bits_of_one_that_went_through(tokenizer, tmp_path):
    """A fresh model, state from disk, another global seed; dropout and kept moments."""
    whole, half = dropping(), dropping()
    through = turns(whole, tokenizer, 0, 3)
    before = turns(half, tokenizer, 0, 1)[-1]
    save_file({k: v.contiguous() for k, v in before.state.items()}, tmp_path / "state")
    save_file(values(half), tmp_path / "model")
    resumed = dropping()
    resumed.load_state_dict(load_file(tmp_path / "model"), strict=False)
    torch.manual_seed(12345)
    random.seed(5)
    after = turns(resumed, tokenizer, 1, 3, state=load_file(tmp_path / "state"))
    assert same(values(whole), values(resumed))
    assert same(through[-1].state, after[-1].state)
    assert [r.loss for r in through[1:]] == [r.loss for r in after]
    # Dropout and moments take part: without either the bits are others.
    for other in ({"seed": 1}, {"optimiser": dataclasses.replace(KEPT, state="reset")}):
        model = dropping()
        model.load_state_dict(load_file(tmp_path / "model"), strict=False)
        turns(model, tokenizer, 1, 3, state=load_file(tmp_path / "state"), **other)
        assert not same(values(whole), values(model))


def test_dropout_differs_between_rounds_and_clients(tokenizer):
    """All rows are alike, so that only dropout can make a difference."""
    local, alike = LocalSettings(batch_size=8, steps=1), rows().select([7] * 8)
    losses = set()
    for named in ({}, {"round": 1}, {"client": "client-01"}, {"seed": 1}):
        optimiser = OptimiserSettings(rate=1e-3)
        place = {"rounds": 2, **named}
        model = dropping(0.5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.1)
        losses.add(take(model, tokenizer, alike, local=local, optimiser=optimiser, **place).loss)
    assert len(losses) == 4


def test_moments_of_what_does_not_train_stay(tokenizer):
    model = adapted()
    first = take(model, tokenizer, factors="AB")
    second = take(model, tokenizer, factors="B", state=first.state)
    assert second.state.keys() == first.state.keys()
    for key, tensor in second.state.items():
        assert torch.equal(tensor, first.state[key]) == (".A/" in key)
        if key.endswith("B/step"):
            assert tensor == 6
    reset = dataclasses.replace(KEPT, state="reset")
    assert take(adapted(), tokenizer, optimiser=reset, state=first.state).state == {}


def test_the_rates_of_all_rounds_are_one_curve(tokenizer, monkeypatch):
    seen = []
    genuine = torch.optim.AdamW.step

    def step(self, *args, **named):
        seen.append(self.param_groups[0]["lr"])
        return genuine(self, *args, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    turns(adapted(), tokenizer, 0, 3)
    expected = [1e-2 * 0.5 * (1 + np.cos(np.pi * i / 9)) for i in range(9)]
    assert seen == pytest.approx(expected, rel=1e-12)


# Which rows.


@pytest.fixture
def seen(monkeypatch):
    """The first tokens of every batch's rows, a list per batch."""
    batches = []
    genuine = sft_turn._Trainer.training_step

    def recorded(self, model, inputs, *args, **named):
        batches.append((inputs["input_ids"][:, 0] - 2).tolist())
        return genuine(self, model, inputs, *args, **named)

    monkeypatch.setattr(sft_turn._Trainer, "training_step", recorded)
    return batches


def test_rounds_see_new_rows_until_all_were_seen(tokenizer, seen):
    turns(adapted(), tokenizer, 0, 3)
    mine = list(seen)
    assert [len(batch) for batch in mine] == [4] * 9
    assert len({row for batch in mine for row in batch}) == 36
    seen.clear()
    turns(adapted(), tokenizer, 0, 3, client="client-01")
    assert seen != mine
    seen.clear()
    turns(adapted(), tokenizer, 0, 3, seed=1)
    assert seen != mine


def test_an_order_is_made_of_whole_passes_wherever_it_is_entered():
    whole = row_order(7, 40, 0, seed=3, client="a")
    for skipped in (0, 1, 6, 7, 8, 20):
        part = row_order(7, 9, skipped, seed=3, client="a")
        assert torch.equal(part, whole[skipped : skipped + 9])
    passes = whole[:35].view(5, 7)
    assert torch.equal(passes.sort(1).values, torch.arange(7).expand(5, 7))
    assert len({tuple(p) for p in passes.tolist()}) > 1


def test_epochs_are_passes_and_few_rows_make_small_batches(tokenizer, seen):
    local = LocalSettings(batch_size=4, epochs=2)
    result = take(adapted(), tokenizer, rows(8), local=local)
    assert result.steps == 4
    assert sorted(row for batch in seen for row in batch) == sorted([*range(8)] * 2)
    seen.clear()
    take(adapted(), tokenizer, rows(3), local=LocalSettings(batch_size=16, steps=2))
    assert [sorted(batch) for batch in seen] == [[0, 1, 2]] * 2


def test_a_client_without_rows_makes_no_step_and_keeps_its_moments(tokenizer):
    state = {"x/step": torch.tensor(3.0)}
    model = adapted()
    before = values(model)
    result = take(model, tokenizer, rows().select([]), state=state)
    assert (result.steps, result.state) == (0, state)
    assert np.isnan(result.loss)
    assert same(values(model), before)


# What a step computes.


def flat(model):
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora" in n])


def test_parts_of_a_batch_and_checkpointing_are_the_same_step(tokenizer):
    local = LocalSettings(batch_size=8, steps=1)
    optimiser = OptimiserSettings(name="sgd", rate=0.5)
    losses, found = [], []
    for sft in (
        SftSettings(),
        SftSettings(accumulation=4),
        SftSettings(checkpointing=True),
        SftSettings(checkpointing=True, options={"gradient_checkpointing_kwargs": {}}),
    ):
        model = dropping(0.0)
        start = flat(model)
        losses.append(take(model, tokenizer, local=local, optimiser=optimiser, sft=sft).loss)
        found.append(flat(model) - start)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[3])
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-5
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


def test_checkpointing_draws_the_same_dropout(tokenizer):
    plain, twice = dropping(0.3), dropping(0.3)
    take(plain, tokenizer)
    take(twice, tokenizer, sft=SftSettings(checkpointing=True))
    assert torch.equal(flat(plain), flat(twice))


def test_the_loss_is_the_mean_over_the_targets_of_a_batch(tokenizer, seen):
    model = adapted()
    local = LocalSettings(batch_size=8, steps=1)
    data, reported = rows(), []
    result = take(model, tokenizer, data, local=local, on_step=reported.append)
    assert reported == [result.loss]
    fresh, losses = adapted(), []
    for i in seen[0]:
        row = data[i]
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        logits = fresh(input_ids=ids).logits[0, :-1]
        losses.append(
            torch.nn.functional.cross_entropy(logits, labels, reduction="none")[labels != -100]
        )
    assert result.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_gradients_are_clipped_and_bf16_is_used(tokenizer):
    optimiser = OptimiserSettings(name="sgd", rate=1.0)
    model = adapted()
    start = flat(model)
    local = LocalSettings(batch_size=8, steps=1, clip_norm=1e-3)
    take(model, tokenizer, local=local, optimiser=optimiser)
    assert float((flat(model) - start).norm()) == pytest.approx(1e-3, rel=1e-3)
    free, half = adapted(), adapted()
    local = LocalSettings(batch_size=8, steps=1, clip_norm=None)
    take(free, tokenizer, local=local, optimiser=optimiser)
    take(half, tokenizer, local=dataclasses.replace(local, autocast=True), optimiser=optimiser)
    assert all(p.dtype == torch.float32 for p in half.parameters())
    moved, rounded = flat(free) - start, flat(half) - start
    assert 1e-4 < float((moved - rounded).norm() / moved.norm()) < 0.1


def test_routers_have_no_loss_of_their_own_unless_set(tokenizer):
    def mixtral():
        made = base(
            transformers.MixtralConfig,
            intermediate_size=24,
            num_key_value_heads=1,
            num_local_experts=2,
            output_router_logits=True,
            router_aux_loss_coef=1.0,
        )
        return adapted(model=made)

    without, given = mixtral(), mixtral()
    local = LocalSettings(batch_size=4, steps=1)
    plain = take(without, tokenizer, local=local).loss
    sft = SftSettings(options={"router_aux_loss_coef": 0.5})
    assert take(given, tokenizer, local=local, sft=sft).loss > plain + 0.1
    for model in (without, given):
        assert model.config.router_aux_loss_coef == 1.0
        assert model.config.output_router_logits


# Packing.


@pytest.mark.parametrize("config", ["FalconConfig", "OPTConfig"])
def test_packing_is_refused_where_a_model_mixes_up_packed_rows(config, tokenizer):
    more = {"ffn_dim": 24, "word_embed_proj_dim": 16} if config == "OPTConfig" else {}
    model = base(getattr(transformers, config), **more)
    before = copy.deepcopy(vars(model.config))
    with pytest.raises(FedcoreError, match=r"mixes up rows .* leave out sft\.packing"):
        check_packing(model)
    assert vars(model.config) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", ["LlamaConfig", "Qwen2Config", "GPT2Config"])
def test_models_that_keep_packed_rows_apart_pass(config, dtype):
    model = base(getattr(transformers, config), num_key_value_heads=2)
    check_packing(model.to(dtype))


def test_packed_rows_train_as_separate_ones(tokenizer):
    """One step on all rows of a data set, and on the same rows packed."""
    from trl import pack_dataset

    data, optimiser = rows(6), OptimiserSettings(name="sgd", rate=0.5)
    packed = pack_dataset(data, 40, "bfd")
    assert len(packed) < 6
    apart, together = dropping(0.0), dropping(0.0)
    start = flat(apart)
    local = LocalSettings(batch_size=6, steps=1, clip_norm=None)
    one = take(apart, tokenizer, data, local=local, optimiser=optimiser)
    sft = SftSettings(options={"packing": True})
    two = take(together, tokenizer, packed, local=local, optimiser=optimiser, sft=sft)
    assert one.loss == pytest.approx(two.loss, rel=1e-5)
    moved, packs = flat(apart) - start, flat(together) - start
    assert float((moved - packs).norm() / moved.norm()) < 1e-4
    with pytest.raises(FedcoreError, match="no column 'seq_lengths'"):
        take(together, tokenizer, data, sft=sft)


# Options.


def test_every_field_of_the_installed_trl_is_sorted_into_one_list():
    """A new release turns this red until each new field is sorted."""
    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    assert not set(OWNED) & PASSED
    assert fields - set(OWNED) - PASSED == set()
    assert (set(OWNED) | PASSED) - fields == set()


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("learning_rate", "use optimiser.rate"),
        ("max_length", "use model.max_length"),
        ("bf16", "use training.precision"),
        ("gradient_checkpointing", "use training.checkpointing"),
        ("seed", "use seed"),
        ("report_to", "leave it out"),
    ],
)
def test_fields_that_fedcore_sets_are_refused_with_what_to_use(name, advice):
    with pytest.raises(FedcoreError, match=rf"sft\.{name} is set by fedcore; {advice}"):
        SftSettings(options={name: 1})


def test_other_settings_are_refused_by_name(tokenizer):
    with pytest.raises(FedcoreError, match=r"unknown recipe key 'sft\.packin'; did you mean"):
        SftSettings(options={"packin": True})
    with pytest.raises(FedcoreError, match="accumulation is 0"):
        SftSettings(accumulation=0)
    with pytest.raises(FedcoreError, match=r"pass training\.checkpointing = true"):
        SftSettings(options={"gradient_checkpointing_kwargs": {"use_reentrant": True}})
    with pytest.raises(FedcoreError, match=r"batch_size is 4, and training\.accumulation is 3"):
        take(adapted(), tokenizer, sft=SftSettings(accumulation=3))
    for name in ("train_sampling_strategy", "packing_strategy"):
        with pytest.raises(FedcoreError, match=f"unknown sft.{name} 'sorted'"):
            SftSettings(options={name: "sorted"})
    for options in ({"loss_type": "made up"}, {"router_aux_loss_coef": 0.1}):
        with pytest.raises(FedcoreError, match=r"trl refuses the .*options of \[sft\]"):
            take(adapted(), tokenizer, sft=SftSettings(options=options))


def test_what_cannot_be_trained_is_refused_before_anything_changes(tokenizer):
    model = adapted()
    with pytest.raises(FedcoreError, match="no column 'labels', only input_ids"):
        take(model, tokenizer, rows().remove_columns("labels"))
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    with pytest.raises(FedcoreError, match="no padding token"):
        take(model, bare)
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(FedcoreError, match="leave lm_head out"):
        take(get_peft_model(llama(), config), tokenizer)


def test_options_reach_trl(tokenizer):
    losses = [
        take(adapted(), tokenizer, sft=SftSettings(options=options)).loss
        for options in ({}, {"label_smoothing_factor": 0.3}, {"loss_type": "dft"})
    ]
    assert len(set(losses)) == 3


# What it leaves.


def state_of(model):
    """Everything of a model but the values of its tensors."""
    modules = {
        name: {
            key: (dict(value) if isinstance(value, dict) else copy.copy(value))
            for key, value in vars(module).items()
            if key not in ("_parameters", "_buffers", "_modules", "config", "generation_config")
        }
        for name, module in model.named_modules()
    }
    inner = model.get_base_model()
    configs = [copy.deepcopy(vars(c)) for c in (inner.config, inner.generation_config)]
    flags = {n: (p.requires_grad, p.grad, p.dtype) for n, p in model.named_parameters()}
    return modules, configs, flags


def process_state():
    import matplotlib.pyplot  # noqa: F401  what a host may have imported

    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "torch": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "verbosity": transformers.utils.logging.get_verbosity(),
        "levels": {n: logging.getLogger(n).level for n in ("trl", "accelerate", "datasets")},
        "bars": datasets.are_progress_bars_disabled(),
        "filters": list(warnings.filters),
        "frozen": gc.get_freeze_count(),
        "accelerate": [
            dict(k._shared_state) for k in (PartialState, AcceleratorState, GradientState)
        ],
        "precision": torch.backends.fp32_precision,
        "grad": torch.is_grad_enabled(),
        "temporary": sorted(os.listdir(tempfile.gettempdir())),
        "here": sorted(os.listdir()),
    }


EVERYTHING = SftSettings(
    accumulation=2,
    checkpointing=True,
    options={"tf32": False, "padding_free": True, "label_smoothing_factor": 0.1},
)


@pytest.mark.parametrize("sft", [SftSettings(), EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_turn_leaves_nothing_behind(sft, fails, tokenizer, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # The machine's own folder has files of other processes.
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("CI", raising=False)
    sent, folders = [], []
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda *a, **n: sent.append(a))
    genuine = tempfile.TemporaryDirectory.__exit__
    monkeypatch.setattr(
        tempfile.TemporaryDirectory,
        "__exit__",
        lambda self, *a: (folders.append(os.listdir(self.name)), genuine(self, *a))[1],
    )
    model = dropping()
    handle = model.get_base_model().get_input_embeddings().register_forward_hook(lambda *a: None)
    special = dict(tokenizer.special_tokens_map)
    data = rows()
    capfd.readouterr()
    before, process = state_of(model), process_state()
    local = dataclasses.replace(FEW, autocast=sft is EVERYTHING)

    def stop(loss):
        raise RuntimeError("stopped")

    if fails:
        with pytest.raises(RuntimeError, match="stopped"):
            take(model, tokenizer, data, local=local, sft=sft, on_step=stop)
    else:
        take(model, tokenizer, data, local=local, sft=sft)
    now, after = state_of(model), process_state()
    for found, expected in zip(now, before, strict=True):
        assert found == expected
    assert {k: v for k, v in after.items() if v != process[k]} == {}
    assert capfd.readouterr() == ("", "")
    assert sent == []
    assert folders == [[]]
    assert dict(tokenizer.special_tokens_map) == special
    assert data.column_names == ["input_ids", "labels"]
    # Older hooks are where their handles look for them.
    handle.remove()
    assert not model.get_base_model().get_input_embeddings()._forward_hooks


def test_a_bare_trainer_leaves_what_the_turn_takes_back(tokenizer, tmp_path):
    """Without this, the test above could pass since trl no longer does it."""
    model, generator = adapted(), torch.get_rng_state()
    arguments = SFTConfig(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    trainer = SFTTrainer(model, arguments, train_dataset=rows(), processing_class=tokenizer)
    trainer.train()
    inner = model.get_base_model()
    assert "forward" in vars(inner)
    assert inner.get_input_embeddings()._forward_hooks
    assert inner.is_gradient_checkpointing
    assert model.training
    assert not torch.equal(torch.get_rng_state(), generator)


def test_what_a_host_froze_stays_frozen(tokenizer, monkeypatch):
    calls = []
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        monkeypatch.setattr(gc, "freeze", lambda: calls.append("freeze"))
        monkeypatch.setattr(gc, "unfreeze", lambda: calls.append("unfreeze"))
        take(adapted(), tokenizer)
        assert calls == []
        # Frozen objects may end their life.
        assert 0.99 * count < gc.get_freeze_count() <= count
    finally:
        monkeypatch.undo()
        gc.unfreeze()


def test_a_process_with_an_accelerator_of_its_own_keeps_it(tokenizer):
    from accelerate import Accelerator

    AcceleratorState._reset_state(reset_partial_state=True)
    host = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        take(adapted(), tokenizer)
        assert host.mixed_precision == "bf16"
        assert AcceleratorState().mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.mark.parametrize(
    "count", [30, pytest.param(1100, marks=[pytest.mark.exhaustive, pytest.mark.slow])]
)
def test_many_turns_in_one_model_are_like_one(count, tokenizer):
    """trl wraps `forward` at each construction: after 1000 a call exceeds the recursion limit."""
    model, data = adapted(), rows(4)
    local, sft = LocalSettings(batch_size=2, steps=1), SftSettings(checkpointing=True)
    for t in range(count):
        take(model, tokenizer, data, local=local, sft=sft, round=t, rounds=count)
    assert "forward" not in vars(model.get_base_model())
    assert not model.get_base_model().get_input_embeddings()._forward_hooks
    assert torch.isfinite(model(input_ids=torch.tensor([[2, 3]])).logits).all()
