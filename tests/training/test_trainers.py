"""Trainers, devices and precision: the ways in which people run a model give the gradients of a plain loop."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from helpers.adapters import TUNERS, VARIANTS, adapted, config_of
from helpers.gradients import assert_gradients_close, gradients
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import LLAMA_INPUTS, TINY_MODELS, llama, output_of, unet
from helpers.tolerances import MODEL64, half_rounding, rounding
from helpers.training import losses_of
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import AlbertConfig, AlbertModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

from peft_reslora import ResLoRAConfig

TARGETS = TINY_MODELS["llama"].targets
float64 = pytest.mark.usefixtures("float64")


def llama_config(tuner: str, **fields: Any) -> PeftConfig:
    return config_of(tuner, **{"r": 4, "target_modules": TARGETS, **fields})


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(49))]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sentences(count: int, length: int) -> list[str]:
    source = random.Random(0)
    return [" ".join(f"w{source.randrange(49)}" for _ in range(length)) for _ in range(count)]


def options(output_dir: Any, **fields: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **fields,
    }


def norms_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "lora_norm" in name}


@pytest.mark.support("transformers Trainer, saved and resumed")
@float64
@pytest.mark.quick(tuner=["middle"], checkpointing=[True])
@pytest.mark.quick(tuner=["mora"], checkpointing=[False])
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_resumed_trainer_run_is_the_uninterrupted_one(tuner, checkpointing, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(4, 53, (16, 6))]

    def trainer(folder: str) -> Trainer:
        model = get_peft_model(
            TINY_MODELS["llama"].make(), llama_config(tuner, **({} if tuner == "mora" else {"lora_dropout": 0.1}))
        )
        arguments = options(tmp_path / folder, max_steps=6, save_strategy="steps", save_steps=3)
        return Trainer(model, TrainingArguments(**arguments, gradient_checkpointing=checkpointing), train_dataset=rows)

    torch.manual_seed(0)
    whole = trainer("whole")
    whole.train()
    torch.manual_seed(1)
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses_of(resumed)[-3:] == pytest.approx(losses_of(whole)[-3:], rel=MODEL64)
    assert len(losses_of(whole)) == 6
    for name, parameter in whole.model.named_parameters():
        if parameter.requires_grad:
            assert relative_error(resumed.model.get_parameter(name), parameter) < MODEL64
    for name, window in norms_of(whole.model).items():
        assert (window >= 0).sum() == 6
        assert torch.allclose(norms_of(resumed.model)[name], window, rtol=rounding(40))


@pytest.mark.support("TRL SFT")
@pytest.mark.quick(tuner=["input"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_trl_sft_trains(tuner, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    trainer = trl.SFTTrainer(
        model=llama(),
        args=trl.SFTConfig(**options(tmp_path, max_steps=8, num_train_epochs=8), max_length=16),
        train_dataset=Dataset.from_dict({"text": sentences(2, 8)}),
        processing_class=tokenizer(),
        peft_config=llama_config(tuner, task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < 0.8 * losses[0]
    assert type(trainer.model.base_model).__name__ == ("MoRAModel" if tuner == "mora" else "ResLoRAModel")
    assert all((window >= 0).sum() == 8 for window in norms_of(trainer.model).values())


@pytest.mark.support(
    lambda trained_before, **_: (
        "TRL DPO" + (" from a trained adapter (MoRA: copied by hand)" if trained_before else "")
    )
)
@pytest.mark.quick(tuner=["block", "mora"], trained_before=[True])
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("trained_before", [False, True])
def test_trl_dpo_trains_against_its_reference(tuner, trained_before, tmp_path, recwarn):
    """From a base model, or from an adapter, of which TRL keeps a copy as the adapter "ref". MoRA's the user has to
    copy, as a warning says."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    prompts, answers = sentences(4, 4), sentences(8, 5)
    columns = {"prompt": prompts, "chosen": [f" {a}" for a in answers[:4]], "rejected": [f" {a}" for a in answers[4:]]}
    config = llama_config(tuner, task_type="CAUSAL_LM")
    model = randomize_adapters(get_peft_model(llama(), config)) if trained_before else llama()
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**options(tmp_path)),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer(),
        peft_config=None if trained_before else config,
    )
    if trained_before and tuner == "mora":
        assert [str(w.message) for w in recwarn if "set_peft_model_state_dict" in str(w.message)]
        trained = get_peft_model_state_dict(trainer.model, adapter_name="default")
        set_peft_model_state_dict(trainer.model, trained, adapter_name="ref")
    trainer.train()
    losses = losses_of(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=rounding(3_000)), (
        "policy and reference differ before the first step"
    )
    assert abs(losses[-1] - losses[0]) > 1e-3


@pytest.mark.support("TRL GRPO")
@pytest.mark.quick(tuner=["mora"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_trl_grpo_trains(tuner, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    source = random.Random(0)
    trainer = trl.GRPOTrainer(
        model=llama(),
        reward_funcs=lambda completions, **kwargs: [source.random() for _ in completions],
        args=trl.GRPOConfig(**options(tmp_path), num_generations=2, max_completion_length=4),
        train_dataset=Dataset.from_dict({"prompt": sentences(4, 4)}),
        processing_class=tokenizer(),
        peft_config=llama_config(tuner, task_type="CAUSAL_LM"),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any(not torch.equal(trainer.model.get_parameter(name), p) for name, p in before.items())
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@float64
@pytest.mark.support("add_adapter of transformers")
@pytest.mark.parametrize("tuner", TUNERS)
def test_transformers_add_adapter_trains_like_get_peft_model(tuner):
    torch.manual_seed(0)
    native, wrapped = llama(), llama()
    wrapped.load_state_dict(native.state_dict())
    native.add_adapter(llama_config(tuner))
    wrapped = randomize_adapters(get_peft_model(wrapped, llama_config(tuner)))
    randomize_adapters(native)
    inputs = TINY_MODELS["llama"].inputs()
    for model in (native.train(), wrapped.train()):
        output_of(model, inputs).square().mean().backward()
    expected = {name.removeprefix("base_model.model."): grad for name, grad in gradients(wrapped).items()}
    assert_gradients_close(gradients(native), expected)


@float64
@pytest.mark.support("add_adapter of diffusers, with and without checkpointing")
@pytest.mark.quick(checkpointing=[True])
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_diffusers_add_adapter_trains(tuner, checkpointing):
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    models = [unet(), unet()]
    models[1].load_state_dict(models[0].state_dict())
    tiny = TINY_MODELS["unet"]
    inputs = tiny.inputs()
    for model in models:
        model.add_adapter(llama_config(tuner, target_modules=tiny.targets))
        randomize_adapters(model).train()
    if checkpointing:
        models[0].enable_gradient_checkpointing()
        inputs["sample"].requires_grad_()
    for model in models:
        output_of(model, inputs).square().mean().backward()
    assert_gradients_close(gradients(models[0]), gradients(models[1]))


@float64
@pytest.mark.support("AutoPeftModel and from_pretrained, is_trainable=True")
@pytest.mark.parametrize("tuner", TUNERS)
def test_auto_classes_and_is_trainable_continue_training(tuner, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    model = adapted(base, llama_config(tuner, task_type="CAUSAL_LM")).train()
    inputs = TINY_MODELS["llama"].inputs()
    output_of(model, inputs).square().mean().backward()
    expected = gradients(model)
    model.save_pretrained(tmp_path / "adapter")
    for loaded in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True),
        PeftModel.from_pretrained(model.unload(), tmp_path / "adapter", is_trainable=True),
    ):
        output_of(loaded.train(), inputs).square().mean().backward()
        assert_gradients_close(gradients(loaded), expected)


def randomized(tuner: str, pre_num: int = 1) -> nn.Module:
    fields = {} if tuner == "mora" else {"pre_num": pre_num}
    return adapted(TINY_MODELS["llama"].make(), llama_config(tuner, **fields))


@float64
@pytest.mark.support("saved-tensor offloading")
@pytest.mark.quick(checkpointing=[True])
@pytest.mark.parametrize(("tuner", "pre_num"), [*VARIANTS, ("mora", 1)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_saved_tensor_offloading_keeps_the_gradient(checkpointing, tuner, pre_num):
    model = randomized(tuner, pre_num)
    plain = copy.deepcopy(model).train()
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for _ in range(2):
        output_of(plain, LLAMA_INPUTS).square().mean().backward()
        with torch.autograd.graph.save_on_cpu():
            loss = output_of(model, LLAMA_INPUTS).square().mean()
        loss.backward()
    assert_gradients_close(gradients(model), gradients(plain))


def offloaded(model: nn.Module, how: str, folder: str) -> nn.Module:
    if how == "cpu":
        return cpu_offload(model, execution_device="cpu")
    if how == "disk":
        return disk_offload(model, folder, execution_device="cpu")
    inner = "base_model.model"
    parts = [f"{inner}.model.embed_tokens", f"{inner}.model.norm", f"{inner}.model.rotary_emb", f"{inner}.lm_head"]
    places = dict.fromkeys(parts, "cpu")
    places |= {f"{inner}.model.layers.{i}": "disk" if i in (1, 2) else "cpu" for i in range(4)}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@float64
@pytest.mark.support("accelerate CPU and disk offload: inference")
@pytest.mark.support("accelerate CPU and disk offload: training", verdict="refused")
@pytest.mark.quick(tuner=["input", "mora"])
@pytest.mark.quick(pre_num=[-1], how=["some blocks"])
@pytest.mark.parametrize(("tuner", "pre_num"), [*VARIANTS, ("mora", 1)])
@pytest.mark.parametrize("how", ["cpu", "disk", "some blocks"])
def test_offloaded_models_infer_right_and_refuse_to_train(how, tuner, pre_num, tmp_path):
    model = randomized(tuner, pre_num)
    with torch.no_grad():
        expected = output_of(model, LLAMA_INPUTS)
        model = offloaded(model, how, str(tmp_path))
        for _ in range(2):
            assert relative_error(output_of(model, LLAMA_INPUTS), expected) < MODEL64
    with pytest.raises(
        RuntimeError, match=r"layer '?model\.layers\.\d\..*offloaded while gradients are enabled.*no_grad"
    ):
        output_of(model, LLAMA_INPUTS)


@float64
@pytest.mark.support(
    "layers that run several times (ALBERT, several groups)",
    verdict=lambda tuner, **_: "right" if tuner in ("block", "mora") else "refused",
)
@pytest.mark.parametrize(("tuner", "pre_num"), [*VARIANTS, ("mora", 1)])
def test_layers_that_run_several_times_are_right_or_refused(tuner, pre_num):
    """ALBERT with two groups of layers, each run twice: an input shortcut has no predecessor in the second round."""
    config = AlbertConfig(
        hidden_size=24,
        embedding_size=24,
        intermediate_size=36,
        num_hidden_layers=4,
        num_hidden_groups=2,
        num_attention_heads=2,
        vocab_size=53,
        max_position_embeddings=32,
    )
    fields = {} if tuner == "mora" else {"pre_num": pre_num}
    adapter = llama_config(tuner, target_modules=["query", "ffn"], **fields)
    torch.manual_seed(0)
    model = adapted(AlbertModel(config), adapter)
    if tuner in ("input", "middle"):
        with pytest.raises(RuntimeError, match=r"ran again in one call of the model.*shortcut='block'"):
            model(**LLAMA_INPUTS)
        return
    unmerged = model(**LLAMA_INPUTS).last_hidden_state
    assert relative_error(model.merge_and_unload()(**LLAMA_INPUTS).last_hidden_state, unmerged) < MODEL64


@pytest.mark.support("bf16 and fp16 autocast")
@pytest.mark.quick(checkpointing=[True], dtype=[torch.bfloat16])
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_gradients_are_those_of_float32_up_to_rounding(checkpointing, dtype, tuner):
    plain = adapted(TINY_MODELS["llama"].make(), llama_config(tuner)).train()
    model = copy.deepcopy(plain)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    output_of(plain, LLAMA_INPUTS).square().mean().backward()
    with torch.autocast("cpu", dtype=dtype):
        loss = output_of(model, LLAMA_INPUTS).float().square().mean()
    loss.backward()
    assert_close_gradients(model, plain, dtype)


@pytest.mark.support("bf16 base, float32 or bf16 adapter")
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_bf16_base_models_train(autocast_adapter_dtype, tuner):
    plain = adapted(TINY_MODELS["llama"].make(), llama_config(tuner)).train()
    base = TINY_MODELS["llama"].make().to(torch.bfloat16)
    model = get_peft_model(base, llama_config(tuner), autocast_adapter_dtype=autocast_adapter_dtype)
    randomize_adapters(model).train()
    wanted = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {wanted}
    for candidate in (plain, model):
        output_of(candidate, LLAMA_INPUTS).float().square().mean().backward()
    assert_close_gradients(model, plain, torch.bfloat16)
    assert all(window.dtype == torch.float32 for window in norms_of(model).values())


def assert_close_gradients(model: nn.Module, plain: nn.Module, dtype: torch.dtype) -> None:
    actual, expected = gradients(model), gradients(plain)
    assert actual.keys() == expected.keys()
    flat = [torch.cat([grads[name].float().flatten() for name in expected]) for grads in (actual, expected)]
    assert relative_error(*flat) < half_rounding(2 * 120, dtype)  # forward and backward of four layers


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_norms_do_not_overflow_in_fp16(shortcut):
    """The sum of squares would; the root mean square is kept in float32."""

    class SideBySide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(layer(x) for layer in self.layers)

    model = get_peft_model(SideBySide().half(), ResLoRAConfig(r=2, target_modules=r"layers\.\d", shortcut=shortcut))
    model.train()(torch.full((4, 8), 3e4, dtype=torch.float16))
    for window in norms_of(model).values():
        assert window.dtype == torch.float32
        assert torch.isfinite(window).all()
        assert (window[-1] > 0).all()
