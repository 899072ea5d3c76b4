"""A sweep over the model types of the installed transformers: what ResLoRA makes of each, shrunken and untrained.

    PYTHONPATH=tests python -m helpers.sweep --write docs/models.md      (an hour on two cores; nothing is downloaded)
    PYTHONPATH=tests python -m helpers.sweep qwen3_next swin             (these only, printed)

Each model is built from its default config with small sizes, adapted with "all-linear", and compared with hooks on the
plain model in float64, output and gradients. `tests/slow/test_sweep.py` runs a few of them.
"""

from __future__ import annotations

import argparse
import copy
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from helpers import oracle
from helpers.oracle import factors_of, randomize_adapters, relative_error, run_oracle
from peft import get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig, __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from peft_reslora import ResLoRAConfig
from peft_reslora.reslora.linking import chains_of

MODES = [("input", 1), ("block", 1), ("middle", 1)]
TOLERANCE = 1000 * torch.finfo(torch.float32).eps  # models compute norms, softmax and rotations in float32
PARAMETERS = 5_000_000  # of one model
SECONDS = 60  # of the processor, for one model
_PER_LAYER = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attention_types")

# The first pattern that is found in a field's name gives its size; sizes that are smaller already stay.
_SIZES: list[tuple[str, int]] = [
    (r"conv|feat_extract|num_labels", 10**9),
    (r"vocab_size|num_embeddings", 99),
    (r"period|depths", 2),
    (r"window_size", 4),
    (r"offset|n_groups", 1),
    (r"kv_shared|nextn|mtp|num_dense|first_k_dense", 1),
    (r"experts_per_tok|top_?k", 2),
    (r"experts", 4),
    (r"(key_value|kv|value|key)_heads|query_groups|multi_query_group", 2),
    (r"heads|n_head", 4),
    (r"mamba_(d_head|head_dim)", 16),
    (r"head_dim|d_kv|head_size|rope_dim|kv_channels", 8),
    (r"rank", 8),
    (r"layers|^depth$|n_layer$|num_blocks", 4),
    (r"max_.*(position|length|len)|n_positions|seq_len|n_ctx|context_length", 64),
    (r"image_size|^img_size|input_size", 32),
    (r"patch_size", 8),
    (r"intermediate|ffn|d_ff|n_inner|mlp_dim|shared_size", 48),
    (r"state_size|d_state", 4),
    (r"hidden_size|d_model|n_embd|embed(ding)?_(dim|size)|hidden_dim|^dim$|projection_dim|width|lru_width", 32),
]
_DERIVED = ("per_layer_config", "transformers_version", "architectures")  # of the other fields
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def shrink(values: dict[str, Any]) -> dict[str, Any]:
    """A config's fields with small sizes, whatever the model; two blocks of each kind where kinds alternate."""
    small = {key: _small(key, value) for key, value in values.items() if key not in _DERIVED}
    depth = next((len(small[key]) for key in _PER_LAYER if isinstance(small.get(key), list)), 4)
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    for key in ("num_hidden_layers", "num_layers"):
        if isinstance(before := values.get(key), int):
            small[key] = min(before, depth)
            for other, value in values.items():  # such as one width for each layer
                if isinstance(value, list) and len(value) == before and other not in _PER_LAYER:
                    small[other] = small[other][: small[key]]
    return small


def _small(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return shrink(value) if key.endswith("config") or "model_type" in value else value
    if key in _PER_LAYER and isinstance(value, list):
        return list(dict.fromkeys(value)) * 2
    if key.endswith(("token_id", "token_index")):
        return value if value is None or isinstance(value, list) else min(value, _TOKENS.get(key, 3))
    if isinstance(value, list | tuple) and re.search("intermediate|depths|heads", key):
        return [2 if "heads" in key else _small(key, member) for member in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    size = next((size for pattern, size in _SIZES if re.search(pattern, key)), value)
    return min(value, size)


def build(model_type: str) -> nn.Module:
    """The shrunken model, with weights of a size that matters."""
    default = CONFIG_MAPPING[model_type]()
    config: PretrainedConfig = type(default).from_dict(shrink(default.to_dict()))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size} parameters in the smallest model that could be made")
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation="eager")
    with suppress(Exception):  # models without experts
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            scale = 1 / max(parameter[0].numel(), 1) ** 0.5
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
        elif not parameter.any():
            parameter.data.fill_(0.1)  # gates that let nothing through
    return model.eval()


def inputs_of(model: nn.Module) -> list[dict[str, Any]]:
    """What the model's forward may take, to be tried in turn."""
    torch.manual_seed(1)
    config = model.config
    tokens = torch.randint(4, 90, (2, 8))
    image = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", 32)
    height, width = image if isinstance(image, list | tuple) else (image, image)
    pixels = torch.randn(2, getattr(config, "num_channels", 3), height, width)
    mels = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", 80)
    sound = torch.randn(2, mels, 2 * getattr(config, "max_source_positions", 16))
    text = {"input_ids": tokens}
    known = [
        text,
        {**text, "decoder_input_ids": tokens[:, :5]},
        {"pixel_values": pixels},
        {**text, "pixel_values": pixels},
        {"input_features": sound, "decoder_input_ids": tokens[:, :5]},
        {"input_features": sound.transpose(1, 2)},
        {"input_values": torch.randn(2, 800)},
        {"input_values": torch.randn(2, 1, 64, 64)},
    ]
    return [inputs for inputs in known if model.main_input_name in inputs]


def output_of(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """All tensors of the output with values that are differentiable, as one vector."""
    output = model(**inputs)
    found = [value.flatten() for value in _tensors(output) if value.is_floating_point()]
    return torch.cat([value.double() for value in found])


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value)


@dataclass
class Verdict:
    """What became of one model type: chains, links, and by shortcut 'right' or what went wrong."""

    model_type: str
    skipped: str = ""
    layers: int = 0
    chains: int = 0
    links: int = 0
    by_shortcut: dict[str, str] = field(default_factory=dict)

    @property
    def unclear(self) -> list[str]:
        """Wrong results, and errors that are not this library's own."""
        return [f"{s}: {v}" for s, v in self.by_shortcut.items() if v.startswith(("wrong", "crash"))]


def sweep(model_type: str) -> Verdict:
    """Build the model, run it, and compare each shortcut with the oracle."""
    verdict = Verdict(model_type)
    try:
        with _at_most(SECONDS):
            base = build(model_type).double()
            if not any(isinstance(module, nn.Linear | Conv1D) for module in base.modules()):
                raise ValueError("no linear layers to adapt")
            inputs = _inputs_that_run(base)
            for shortcut, pre_num in MODES:
                verdict.by_shortcut[shortcut] = _compare(base, inputs, shortcut, pre_num, verdict)
    except Exception as error:
        verdict.skipped = f"{type(error).__name__}: {_first_line(error)}"
    return verdict


def _inputs_that_run(base: nn.Module) -> dict[str, Any]:
    errors = []
    for inputs in inputs_of(base):
        inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        try:
            first, second = (output_of(copy.deepcopy(base), inputs) for _ in range(2))
            first.sum().backward()
        except Exception as error:
            errors.append(error)
            continue
        if first.requires_grad and torch.isfinite(first).all() and torch.equal(first, second):
            return inputs
    raise ValueError(f"none of the inputs runs, the first with: {_first_line(errors[0]) if errors else 'no gradient'}")


def _compare(base: nn.Module, inputs: dict[str, Any], shortcut: str, pre_num: int, verdict: Verdict) -> str:
    config = ResLoRAConfig(r=2, target_modules="all-linear", shortcut=shortcut, pre_num=pre_num)
    try:
        model = randomize_adapters(get_peft_model(copy.deepcopy(base), config)).double().eval()
    except ValueError as error:
        return f"refused: {_first_line(error)}" if _is_ours(error) else f"crash: {_first_line(error)}"
    chains = [chain.names for chain in chains_of(model, "default")]
    verdict.layers, verdict.chains = sum(map(len, chains)), len(chains)
    verdict.links = verdict.layers - verdict.chains
    try:
        actual = output_of(model, inputs)
        probe = torch.randn(actual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        (actual * probe).sum().backward()
    except Exception as error:
        return f"{'error' if _is_ours(error) else 'crash'}: {_first_line(error)}"
    expected, gradients = _expected(base, inputs, model, chains, shortcut, pre_num, probe)
    return _judge(model, actual, expected, gradients)


def _expected(
    base: nn.Module,
    inputs: dict[str, Any],
    model: nn.Module,
    chains: list[list[str]],
    shortcut: str,
    pre_num: int,
    probe: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    factors = factors_of(model)
    with _replaced(oracle, "chains_by_block", lambda *_: chains):
        expected = run_oracle(base, inputs, factors, shortcut, pre_num, output_of)
    (expected * probe).sum().backward()
    gradients = {}
    for name, (A, B, _) in factors.items():
        gradients |= {f"{name}.lora_A": A.grad, f"{name}.lora_B": B.grad}
    return expected, gradients


def _judge(
    model: nn.Module, actual: torch.Tensor, expected: torch.Tensor, gradients: dict[str, torch.Tensor | None]
) -> str:
    worst = relative_error(actual, expected)
    largest = max((float(g.norm()) for g in gradients.values() if g is not None), default=0.0)
    for name, leaf in gradients.items():
        ours = model.get_submodule(f"base_model.model.{name}")["default"].weight.grad
        ours, theirs = (0.0 if g is None else g.double() for g in (ours, leaf))
        difference = torch.as_tensor(ours - theirs).norm() / max(float(torch.as_tensor(theirs).norm()), 1e-3 * largest)
        worst = max(worst, float(difference))
    return "right" if worst < TOLERANCE else f"wrong by {worst:.1e}"


def _is_ours(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "peft_reslora" in Path(frames[-1].filename).parts


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _replaced(module: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def page(verdicts: list[Verdict]) -> str:
    """The verdicts as a page in Markdown."""
    verdicts = sorted(verdicts, key=lambda verdict: verdict.model_type)
    swept = [v for v in verdicts if not v.skipped]
    lines = [
        "# Models",
        "",
        "Made by `PYTHONPATH=tests python -m helpers.sweep --write docs/models.md` with transformers "
        f"{__version__}: {len(swept)} model types in small sizes, all linear layers targeted, output "
        "and gradients compared with the plain model in float64. *right* is right up to rounding; *refused* is "
        "refused at injection, *error* in the forward pass, both with the cause. Where `input` and `middle` are not "
        "right, use `block`, or leave the layers out that the message names.",
        "",
        "| model type | layers | chains | links | input | block | middle | what to do |",
        "|" + " --- |" * 8,
        *(_row(v) for v in swept),
        "",
        f"{len(verdicts) - len(swept)} more types were not swept, since no small model of them could be built and run "
        "without their own preparation: " + ", ".join(v.model_type for v in verdicts if v.skipped) + ".",
        "",
    ]
    return "\n".join(lines)


def _row(v: Verdict) -> str:
    words = [v.by_shortcut.get(shortcut, "-").split(":")[0] for shortcut, _ in MODES]
    reasons = dict.fromkeys(verdict for verdict in v.by_shortcut.values() if verdict != "right")
    advice = "; ".join(reason.replace("|", "/")[:300] for reason in list(reasons)[:1])
    return f"| {v.model_type} | {v.layers} | {v.chains} | {v.links} | {' | '.join(words)} | {advice} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*", default=sorted(CONFIG_MAPPING_NAMES))
    parser.add_argument("--write", type=Path, help="the page to write")
    args = parser.parse_args()
    verdicts = []
    for model_type in args.model_types:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdicts.append(sweep(model_type))
        sys.stdout.write(f"{verdicts[-1]}\n")
        sys.stdout.flush()
        if args.write:
            args.write.parent.mkdir(exist_ok=True)
            args.write.write_text(page(verdicts), encoding="utf-8")
    return 1 if any(v.unclear for v in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
