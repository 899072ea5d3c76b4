"""Exports that came out wrong without a word: wrapped blocks, shared weights, new tokens, files with gaps."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import adapted
from helpers.calibration import record_norms
from helpers.exports import CAUSAL, IDS, UP_DOWN, llama, net, outputs
from helpers.oracle import relative_error
from helpers.tolerances import EPS
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import nn
from torch.ao.quantization import QuantWrapper
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from transformers import LlamaConfig, LlamaForCausalLM

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.export import export_lora, export_lora_from_files, save_as_lora
from peft_reslora.export.targets import matched_besides
from peft_reslora.reslora.linked_chain import Chain
from peft_reslora.reslora.linking import chains_of
from peft_reslora.shared.names import bare_name, unwrapped
from peft_reslora.shared.stamps import make_stamp
from peft_reslora.training.annealing import anneal_shortcuts

pytestmark = pytest.mark.filterwarnings(
    "ignore:The LoRA has r=", "ignore:The base model of the LoRA", "ignore::FutureWarning"
)
CONFIGS: dict[str, Callable[..., PeftConfig]] = {
    "lora": lambda **fields: LoraConfig(r=3, lora_alpha=5, **fields),
    "block": lambda **fields: ResLoRAConfig(r=2, shortcut="block", pre_num=-1, **fields),
    "mora": lambda **fields: MoRAConfig(r=2, mora_type="sharing", **fields),
}
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": lambda block: torch.compile(block, backend="eager"),
    "checkpoint": checkpoint_wrapper,
    "data-parallel": nn.DataParallel,
    "ao": QuantWrapper,
    "swa": AveragedModel,
    "twice": lambda block: torch.compile(checkpoint_wrapper(block), backend="eager"),
}
# Rounding of a float32 forward through a few layers; what went wrong was off by tenths.
CLOSE = 100 * EPS


@pytest.fixture
def eagerly() -> Iterator[None]:
    """Compiled blocks run without being compiled."""
    with torch.compiler.set_stance("force_eager"):
        yield


def wrap_blocks(model: nn.Module, kind: str) -> nn.Module:
    """Wrap every other block, so that wrapped and bare ones are in one chain."""
    model.blocks[0], model.blocks[2] = (WRAPPERS[kind](model.blocks[i]) for i in (0, 2))
    return model


# Names that wrappers changed


@pytest.mark.parametrize("tuner", CONFIGS)
@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrapped_blocks_export_under_the_bare_models_names(
    kind: str, tuner: str, tmp_path: Path, eagerly: None
) -> None:
    with warnings.catch_warnings(action="error", category=UserWarning):  # of chains that are cut
        model = adapted(wrap_blocks(net(), kind), CONFIGS[tuner](target_modules=UP_DOWN))
    expected, effect = outputs(model), outputs(model) - outputs(net())
    export = save_as_lora(tmp_path / "lora", model, base_model=net())
    assert all(key.startswith("base_model.model.blocks.") for key in export.state_dict)
    assert not any(part in key for key in export.state_dict for part in ("module", "_orig_mod", "_checkpoint"))
    bare = export_lora(adapted(net(), CONFIGS[tuner](target_modules=UP_DOWN)))  # the same factors, and the same chains
    assert all(torch.equal(export.state_dict[key], tensor) for key, tensor in bare.state_dict.items())
    loaded = PeftModel.from_pretrained(net(), tmp_path / "lora").eval()
    assert relative_error(outputs(loaded) - outputs(net()), effect) < CLOSE
    assert relative_error(outputs(loaded), expected) < CLOSE


@pytest.mark.parametrize("kind", WRAPPERS)
def test_blocks_and_models_wrapped_after_they_were_adapted_export_the_same(kind: str) -> None:
    model = adapted(net(), CONFIGS["block"](target_modules=UP_DOWN))
    expected = export_lora(model)
    if kind == "swa":  # copies what it wraps: a copied block is a part of a model, a copied model has all its chains
        export = export_lora(AveragedModel(model))
        assert all(torch.equal(export.state_dict[key], tensor) for key, tensor in expected.state_dict.items())
        return
    wrap_blocks(model.base_model.model, kind)
    model.base_model.model.blocks[1].up = WRAPPERS[kind](model.base_model.model.blocks[1].up)
    for wrapped in (model, WRAPPERS[kind](model)):
        export = export_lora(wrapped)
        assert export.config == expected.config
        assert export.state_dict.keys() == expected.state_dict.keys()
        assert all(torch.equal(export.state_dict[key], tensor) for key, tensor in expected.state_dict.items())


def test_names_lose_what_wrappers_put_in_and_nothing_else() -> None:
    model = nn.Module()
    model.module = nn.Module()  # a model's own name
    model.module.layers = nn.ModuleList([nn.DataParallel(checkpoint_wrapper(nn.Linear(2, 2))), nn.Linear(2, 2)])
    name = "module.layers.0.module._checkpoint_wrapped_module.weight"
    assert bare_name(name, model) == "module.layers.0.weight"
    assert bare_name(name) == "module.layers.0.module.weight"
    assert bare_name("_orig_mod._fsdp_wrapped_module._fpw_module.a.b") == "a.b"
    assert bare_name("layers.0.orig_mod.module.weight", model) == "layers.0.orig_mod.module.weight"
    assert unwrapped(model.module.layers[0]) is model.module.layers[0].module._checkpoint_wrapped_module
    assert unwrapped(model) is model


def test_files_saved_from_wrapped_blocks_are_exported_under_bare_names(tmp_path: Path, eagerly: None) -> None:
    model = adapted(net(), LoraConfig(r=3, target_modules=UP_DOWN))
    expected = export_lora(model)
    model.save_pretrained(tmp_path / "native")
    file = tmp_path / "native" / "adapter_model.safetensors"
    save_file({key.replace("blocks.1.", "blocks.1._orig_mod."): t for key, t in load_file(file).items()}, file)
    export = export_lora_from_files(tmp_path / "native")
    assert export.state_dict.keys() == expected.state_dict.keys()


class Outer(nn.Module):
    """A wrapper that nobody knows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("inner",) else getattr(self.inner, name)


def test_names_that_the_base_from_its_config_lacks_are_told_and_not_proved(tmp_path: Path) -> None:
    base = llama()
    base.model.layers[1] = Outer(base.model.layers[1])
    model = adapted(base, LoraConfig(r=3, **CAUSAL))
    with pytest.warns(UserWarning, match=r"in no model of the base's class.*layers\.1\.inner\."):
        export = export_lora(model)
    assert len(export.report.unknown) == 3
    with pytest.raises(ValueError, match=r"layers\.1"), pytest.warns(UserWarning, match="inner"):
        save_as_lora(tmp_path / "lora", model, base_model=llama())
    assert not list(tmp_path.iterdir())


def test_a_proof_on_a_base_without_weights_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = net()
    with pytest.raises(ValueError, match="without weights"):
        save_as_lora(tmp_path / "lora", adapted(net(), LoraConfig(r=3, target_modules=UP_DOWN)), base_model=empty)
    assert not list(tmp_path.iterdir())


def test_an_update_of_another_shape_than_its_layer_is_refused() -> None:
    model = adapted(net(), LoraConfig(r=3, target_modules=UP_DOWN))
    up = model.base_model.model.blocks[1].up
    up.lora_A["default"].weight.data = up.lora_A["default"].weight.data[:, :-1]
    with pytest.raises(ValueError, match=r"blocks\.1\.up.*19 inputs.*20 and 37"):
        export_lora(model)


# Exact or not, by layer


@pytest.mark.parametrize("shortcut", ["input", "middle"])
@pytest.mark.parametrize("share", [None, 0.5, 1.0])
def test_each_layer_says_whether_its_merge_is_exact(shortcut: str, share: float | None, tmp_path: Path) -> None:
    config = ResLoRAConfig(r=2, shortcut=shortcut, **CAUSAL)
    model = adapted(llama(), config)
    record_norms(model, [{"input_ids": IDS}])
    if share is not None:
        anneal_shortcuts(model, share)
    model.eval().save_pretrained(tmp_path / "native")
    for way, export in (("model", export_lora(model)), ("files", export_lora_from_files(tmp_path / "native"))):
        rows = {row.layer: row for row in export.report.layers}
        for name, row in rows.items():
            exact = share == 1.0 or ".layers.0." in name
            assert (row.exact, row.merge) == (exact, "exact" if exact else "estimated by input_norm"), (way, name)
        assert export.report.exact == (share == 1.0)
        assert ("exact up to rounding" in export.report.summary()) == (share == 1.0)
        export.save_pretrained(tmp_path / way)
        card = (tmp_path / way / "README.md").read_text(encoding="utf-8")
        assert ("estimated by" in card) == (share != 1.0)
    if share == 1.0:  # what it says is true
        loaded = PeftModel.from_pretrained(llama(), tmp_path / "model").eval()
        assert relative_error(outputs(loaded) - outputs(llama()), outputs(model) - outputs(llama())) < 10 * CLOSE


@pytest.mark.filterwarnings("ignore:Adapter 'default' has no shortcut at all")
@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_a_lone_layer_is_exact(shortcut: str, tmp_path: Path) -> None:
    model = adapted(net(), ResLoRAConfig(r=2, shortcut=shortcut, target_modules=["head"])).train()
    outputs(model)
    model.eval()
    export = save_as_lora(tmp_path / "lora", model, base_model=net())
    assert export.report.exact
    loaded = PeftModel.from_pretrained(net(), tmp_path / "lora").eval()
    assert relative_error(outputs(loaded) - outputs(net()), outputs(model) - outputs(net())) < CLOSE


# Weights that are shared or computed, new tokens


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`", "ignore:Adapter 'default' has no shortcut")
@pytest.mark.parametrize("tuner", CONFIGS)
def test_a_tied_head_is_exported_for_use_beside_its_weight(tuner: str, tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = adapted(base, CONFIGS[tuner](target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match=r"'lm_head' shares its weight with 'model\.embed_tokens'.*do not merge"):
        export = save_as_lora(tmp_path / "lora", model, base_model=llama(tie_word_embeddings=True))
    assert export.report.tied == {"lm_head": "model.embed_tokens"}
    assert "do not merge it in" in (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    loaded = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path / "lora").eval()
    assert (
        relative_error(
            outputs(loaded) - outputs(llama(tie_word_embeddings=True)),
            outputs(model) - outputs(llama(tie_word_embeddings=True)),
        )
        < CLOSE
    )


@pytest.mark.parametrize("tuner", CONFIGS)
def test_an_update_beside_a_computed_weight_is_exported(tuner: str, tmp_path: Path) -> None:
    def computed() -> nn.Module:
        model = net()
        for block in model.blocks:
            parametrizations.weight_norm(block.up)
        return model

    model = adapted(computed(), CONFIGS[tuner](target_modules=UP_DOWN))
    save_as_lora(tmp_path / "lora", model, base_model=computed())
    for base in (computed(), net()):  # the update goes beside the weight, however that is made
        loaded = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
        assert relative_error(outputs(loaded) - outputs(net()), outputs(model) - outputs(net())) < CLOSE


@pytest.mark.parametrize("tuner", ["lora", "block"])
def test_replicated_layers_are_refused(tuner: str) -> None:
    model = adapted(llama(), CONFIGS[tuner](layer_replication=[[0, 2], [1, 3]], **CAUSAL))
    with pytest.raises(ValueError, match="layer_replication"):
        export_lora(model)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("tuner", CONFIGS)
def test_new_tokens_are_refused_from_the_model_and_from_its_files(tuner: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(14)
    model = adapted(base, CONFIGS[tuner](**CAUSAL))
    with pytest.raises(ValueError, match=r"vocabulary of 14.*one of 11.*resize_token_embeddings"):
        save_as_lora(tmp_path / "lora", model)
    model.save_pretrained(tmp_path / "native")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight.*new tokens"):
        export_lora_from_files(tmp_path / "native")
    base.save_pretrained(tmp_path / "resized")  # the way that the message names
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "resized")
    save_as_lora(tmp_path / "lora", model, base_model=LlamaForCausalLM.from_pretrained(tmp_path / "resized"))


# Files that lack something


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


def saved(folder: Path, config: PeftConfig, base: nn.Module | None = None) -> Path:
    model = adapted(llama() if base is None else base, config)
    model.train()
    model(IDS)
    model.save_pretrained(folder)
    return folder


def rewrite(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **fields: object
) -> None:
    """Let the file and the config be others, as a program would that knows no seal."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file(change(load_file(file)), file)
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))


def without(part: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


SHORTCUTS = ["lora", "block", "input", "middle", "mora"]


def native(tuner: str, **fields: Any) -> PeftConfig:
    if tuner in ("input", "middle"):
        return ResLoRAConfig(r=2, shortcut=tuner, **fields)
    return CONFIGS[tuner](**fields)


@pytest.mark.parametrize("tuner", SHORTCUTS)
def test_files_without_layers_are_refused(tuner: str, tmp_path: Path) -> None:
    saved(tmp_path, native(tuner, **CAUSAL))
    rewrite(tmp_path, lambda tensors: {})
    with pytest.raises(ValueError, match="holds no tensors"):
        export_lora_from_files(tmp_path)


@pytest.mark.parametrize("layer", ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "layers.2."])
@pytest.mark.parametrize("known", [True, False], ids=["base-known", "base-unknown"])
@pytest.mark.parametrize("tuner", SHORTCUTS)
def test_files_that_lack_a_layer_are_refused(
    tuner: str, known: bool, layer: str, tmp_path: Path, base_folder: Path
) -> None:
    base = LlamaForCausalLM.from_pretrained(base_folder) if known else None
    saved(tmp_path, native(tuner, **CAUSAL), base)
    assert export_lora_from_files(tmp_path).report.layers if known or tuner != "mora" else True
    rewrite(tmp_path, without(f".{layer}"))
    if tuner == "lora" and not known and layer == "layers.2.":
        return  # a LoRA of the first two blocks: nothing tells it from one of a smaller base
    match = r"lacks \d layers.*model\.layers\.\d" if known or tuner == "lora" else r"has no seal|hold the shapes"
    with pytest.raises(ValueError, match=match):
        export_lora_from_files(tmp_path)


@pytest.mark.parametrize("tuner", SHORTCUTS)
def test_files_with_layers_that_are_not_targeted_are_refused(tuner: str, tmp_path: Path, base_folder: Path) -> None:
    saved(tmp_path, native(tuner, **CAUSAL), LlamaForCausalLM.from_pretrained(base_folder))
    rewrite(tmp_path, dict, target_modules=["q_proj", "down_proj"])
    with pytest.raises(ValueError, match=r"does not target.*v_proj"):
        export_lora_from_files(tmp_path)


@pytest.mark.parametrize("tuner", SHORTCUTS)
def test_files_of_another_rank_than_the_config_are_refused(tuner: str, tmp_path: Path, base_folder: Path) -> None:
    saved(tmp_path, native(tuner, **CAUSAL), LlamaForCausalLM.from_pretrained(base_folder))
    rewrite(tmp_path, dict, r=5)
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.0\..*(rank|matrix)"):
        export_lora_from_files(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without("lora_shortcut"), "it holds lora_annealed without lora_shortcut"),
        (without("lora_annealed"), "it holds lora_shortcut and nothing"),
        (lambda t: {k: v * 1.5 if "annealed" in k else v for k, v in t.items()}, "no share between 0 and 1"),
        (lambda t: {k: v * float("nan") if "annealed" in k else v for k, v in t.items()}, "no share between 0 and 1"),
        (lambda t: {k: v[:1].clone() if "lora_shortcut" in k else v for k, v in t.items()}, "has the shape"),
    ],
)
def test_annealed_files_without_their_estimate_are_refused(
    change: Callable, match: str, tmp_path: Path, base_folder: Path
) -> None:
    config = ResLoRAConfig(r=2, shortcut="middle", **CAUSAL)
    model = adapted(LlamaForCausalLM.from_pretrained(base_folder), config).train()
    model(IDS)
    anneal_shortcuts(model, 1.0)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=match):
        export_lora_from_files(tmp_path)


def stamped(folder: Path, computations: dict[str, str], parts: tuple[str, ...], stamp: str) -> None:
    """Give each layer of a saved adapter the stamp that its own layers would."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, computation in computations.items():
            held = {part: tensors.get(f"{name}.{part}", tensors.get(f"{name}.{part}.weight")) for part in parts}
            tensors[f"{name}.{stamp}"] = make_stamp(held, computation)
        return tensors

    rewrite(folder, change)


@pytest.mark.parametrize("tuner", ["block", "mora"])
def test_files_that_are_not_what_their_stamps_say_are_refused(tuner: str, tmp_path: Path, base_folder: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["up_proj"], "task_type": "CAUSAL_LM"}
    saved(tmp_path, native(tuner, **fields), LlamaForCausalLM.from_pretrained(base_folder))
    names = [f"base_model.model.model.layers.{n}.mlp.up_proj" for n in range(3)]
    if tuner == "mora":
        stamped(tmp_path, dict.fromkeys(names, "mora_type='sharing'"), ("mora_M",), "mora_stamp")
        others: dict[str, Any] = {"mora_type": "decoupling"}
    else:
        words = "shortcut='block', pre_num=-1, scaling=4.0, layer {} of its chain"
        buffers = ("lora_norm", "lora_shortcut", "lora_calibrated", "lora_annealed")
        computations = {name: words.format(n + 1) for n, name in enumerate(names)}
        stamped(tmp_path, computations, ("lora_A", "lora_B", *buffers), "lora_magnitude_vector")
        others = {"pre_num": 1}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(export_lora_from_files(tmp_path).report.layers) == 3
    rewrite(tmp_path, dict, **others)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj'.*another computation"):
        export_lora_from_files(tmp_path)
    rewrite(
        tmp_path,
        lambda t: {
            k: v + 1e-3 if "layers.1" in k and k.endswith(("lora_B.weight", "mora_M")) else v for k, v in t.items()
        },
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj'.*is not what was saved"):
        export_lora_from_files(tmp_path)


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, native("block", **CAUSAL))
    rewrite(tmp_path, lambda t: {**t, **{k.removeprefix("base_model.model."): v.clone() for k, v in t.items()}})
    with pytest.raises(ValueError, match="twice"):
        export_lora_from_files(tmp_path)


# MoRA from files


@pytest.mark.parametrize(("fields", "options"), [({"r": 32}, {"rank": 8}), ({"mora_type": "sharing"}, {})])
@pytest.mark.parametrize("rank_pattern", [{}, {"down_proj": 3}])
def test_mora_files_give_what_the_model_gives(
    fields: dict, options: dict, rank_pattern: dict, tmp_path: Path, base_folder: Path
) -> None:
    config = MoRAConfig(**{"r": 2, **fields}, rank_pattern=rank_pattern, **CAUSAL)
    model = adapted(LlamaForCausalLM.from_pretrained(base_folder), config)
    model.save_pretrained(tmp_path / "native")
    expected, actual = export_lora(model, **options), export_lora_from_files(tmp_path / "native", **options)
    assert actual.config == expected.config
    assert actual.state_dict.keys() == expected.state_dict.keys()
    for key in expected.state_dict:
        if not key.endswith("lora_A.weight"):
            continue
        B = key.replace("lora_A", "lora_B")
        assert (
            relative_error(
                actual.state_dict[B] @ actual.state_dict[key], expected.state_dict[B] @ expected.state_dict[key]
            )
            < CLOSE
        )
    actual.save_pretrained(tmp_path / "lora", llama())


def test_full_rank_mora_files_name_the_way(tmp_path: Path, base_folder: Path) -> None:
    saved(tmp_path, MoRAConfig(r=2, **CAUSAL), LlamaForCausalLM.from_pretrained(base_folder))
    with pytest.raises(ValueError, match=r"down_proj.*mora_type='rotation'.*rank= or energy="):
        export_lora_from_files(tmp_path)


def test_mora_files_of_another_base_are_refused(tmp_path: Path, base_folder: Path) -> None:
    saved(tmp_path / "native", CONFIGS["mora"](**CAUSAL), LlamaForCausalLM.from_pretrained(base_folder))
    config = LlamaConfig.from_pretrained(base_folder, intermediate_size=80)
    config.save_pretrained(tmp_path / "wider")
    rewrite(tmp_path / "native", dict, base_model_name_or_path=str(tmp_path / "wider"))
    with pytest.raises(ValueError, match=r"down_proj.*80 inputs.*do not match"):
        export_lora_from_files(tmp_path / "native")


# Costs


def test_targets_are_matched_as_peft_matches_them() -> None:
    """`matched_besides` looks endings up in a set, where PEFT tries each target on each name."""
    generator = random.Random(0)
    parts = ["a", "b", "ab", "0", "1", "a_b"]
    names = {".".join(generator.choices(parts, k=generator.randint(1, 4))) for _ in range(300)}
    for _ in range(30):
        targets = generator.sample(sorted(names), 7) + generator.sample(parts, 1)
        config = LoraConfig(target_modules=targets)
        expected = [name for name in names if check_target_module_exists(config, name)]
        exported = expected[::3]
        assert matched_besides(exported, targets, names) == [name for name in expected if name not in exported]


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_an_export_reads_each_chain_a_fixed_number_of_times(shortcut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def counted(model: nn.Module) -> int:
        before = len(reads)
        export_lora(model)
        return len(reads) - before

    read = Chain.blocks
    monkeypatch.setattr(Chain, "blocks", lambda chain: reads.append(chain) or read(chain))
    model = adapted(llama(), ResLoRAConfig(r=2, shortcut=shortcut, merge_estimator="drop", **CAUSAL))
    assert counted(model) == len(chains_of(model, "default"))
